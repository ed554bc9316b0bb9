"""Special tokens, ends of an answer and chat templates are found in whatever form the files use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, processors

from engine.errors import ConfigError
from engine.text.gguf_vocabulary import vocabulary_from_metadata
from engine.text.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|eot_id|>", "<|im_end|>"]
UNK, BOS, EOS, PAD, EOT, IM_END = range(6)
TURN = "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path, train_bpe: Callable[..., tokenizers.Tokenizer]) -> Path:
    backend = train_bpe(SPECIAL, vocab_size=300)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, **data: Any) -> None:
    (folder / name).write_text(json.dumps(data))


def added(text: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": text, "special": True}


FORMS: list[dict[str, dict[str, Any]]] = [
    {
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        }
    },
    {
        "tokenizer_config.json": {
            "bos_token": added("<s>"),
            "eos_token": added("</s>"),
            "unk_token": added("<unk>"),
            "pad_token": added("<pad>"),
        }
    },
    {
        "tokenizer_config.json": {"pad_token": "<pad>"},
        "special_tokens_map.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "lstrip": False},
            "unk_token": "<unk>",
        },
    },
]


@pytest.mark.parametrize("form", FORMS, ids=["texts", "objects", "two files"])
def test_the_names_of_special_tokens(folder: Path, form: dict[str, dict[str, Any]]) -> None:
    from transformers import PreTrainedTokenizerFast

    for name, data in form.items():
        write(folder, name, **data)
    ours = load_tokenizer(folder)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.bos_id == reference.bos_token_id == BOS
    assert ours.eos_ids == {reference.eos_token_id} == {EOS}
    assert ours.pad_id == reference.pad_token_id == PAD
    assert ours.special_tokens["unk_token"] == reference.unk_token
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert ours.special_tokens == {name: getattr(reference, name) for name in names}


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (None, None, {EOS}),
        (EOT, None, {EOS, EOT}),
        ([EOS, EOT], None, {EOS, EOT}),
        (None, IM_END, {EOS, IM_END}),
        ([EOT], IM_END, {EOS, EOT}),  # generation_config.json is the more exact one
    ],
)
def test_sets_of_ends(folder: Path, generation: object, config: object, ends: set[int]) -> None:
    write(folder, "tokenizer_config.json", bos_token="<s>", eos_token="</s>")
    write(folder, "generation_config.json", eos_token_id=generation)
    write(folder, "config.json", eos_token_id=config)
    assert load_tokenizer(folder).eos_ids == ends


def test_a_turn_ends_only_with_what_the_template_names(folder: Path) -> None:
    """A base model has <|im_end|> in its vocabulary too, and must not stop at it."""
    write(folder, "tokenizer_config.json", eos_token="</s>")
    assert load_tokenizer(folder).eos_ids == {EOS}
    write(folder, "tokenizer_config.json", eos_token="</s>", chat_template=TURN)
    assert load_tokenizer(folder).eos_ids == {EOS, EOT}


def test_a_bare_file_goes_by_its_special_tokens(folder: Path) -> None:
    write(folder, "tokenizer_config.json", bos_token="<s>", eos_token="<|im_end|>")
    bare = folder / "bare.json"
    (folder / "tokenizer.json").rename(bare)
    ours = load_tokenizer(bare)
    assert (ours.bos_id, ours.eos_ids) == (BOS, {EOS})  # nothing beside it was read
    bare.rename(folder / "tokenizer.json")
    assert load_tokenizer(folder / "tokenizer.json").eos_ids == {IM_END}
    assert load_tokenizer(folder / "tokenizer.json").eos_ids == load_tokenizer(folder).eos_ids


TEMPLATES: list[dict[str, str]] = [
    {"tokenizer_config.json": json.dumps({"chat_template": TURN})},
    {
        "tokenizer_config.json": json.dumps(
            {
                "chat_template": [
                    {"name": "tool_use", "template": "other"},
                    {"name": "default", "template": TURN},
                ]
            }
        )
    },
    {"chat_template.jinja": TURN},
    {"tokenizer_config.json": json.dumps({"chat_template": "old"}), "chat_template.jinja": TURN},
]


@pytest.mark.parametrize("files", TEMPLATES, ids=["text", "named", "file", "file first"])
def test_templates_are_found_where_transformers_finds_them(
    folder: Path, files: dict[str, str]
) -> None:
    from transformers import PreTrainedTokenizerFast

    for name, text in files.items():
        (folder / name).write_text(text)
    messages = [{"role": "user", "content": "hi"}]
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = reference.apply_chat_template(messages, tokenize=False)
    ours = load_tokenizer(folder)
    assert ours.chat_template == TURN
    assert expected == "hi<|eot_id|>"


def test_templates_of_processors_and_single_names(folder: Path) -> None:
    write(folder, "chat_template.json", chat_template=TURN)
    assert load_tokenizer(folder).chat_template == TURN
    only = [{"name": "chat", "template": "x"}]
    write(folder, "tokenizer_config.json", chat_template=only)
    assert load_tokenizer(folder).chat_template == "x"


@pytest.mark.parametrize("declared", [None, True, False])
def test_a_declared_bos_wins_over_the_post_processor(
    tmp_path: Path, train_bpe: Callable[..., tokenizers.Tokenizer], declared: bool | None
) -> None:
    backend = train_bpe(SPECIAL, vocab_size=300)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", bos_token="<s>", add_bos_token=declared)
    assert load_tokenizer(tmp_path).adds_bos is (declared is not False)


def test_added_whitespace_and_digits_match_in_text_although_the_template_has_them(
    tmp_path: Path, train_bpe: Callable[..., tokenizers.Tokenizer]
) -> None:
    """Templates contain newlines and digits: such tokens were taken for marks and lost."""
    backend = train_bpe(["<s>"], vocab_size=300)
    extra = ["\n\n", "  ", "7", "<tool>"]
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in extra])
    backend.save(str(tmp_path / "tokenizer.json"))
    source = "{% for m in messages[7:] %}\n\n  {{ m.content }}<tool>{% endfor %}"
    write(tmp_path, "tokenizer_config.json", bos_token="<s>", chat_template=source)
    ours = load_tokenizer(tmp_path)
    text = "a\n\nb  7"
    assert ours.encode(text) == backend.encode(text).ids
    assert backend.token_to_id("\n\n") in ours.encode(text)
    assert backend.token_to_id("<tool>") not in ours.encode("<tool>")


def gguf_values(**extra: Any) -> dict[str, Any]:
    tokens = [*SPECIAL, "a", "b", "ab", "\n"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3] * 6 + [1] * 4, np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        **extra,
    }


def test_ends_of_a_gguf_file() -> None:
    path = Path("x.gguf")
    ours = Tokenizer(vocabulary_from_metadata(path, gguf_values()))
    assert (ours.eos_ids, ours.unk_id, ours.pad_id) == ({EOS}, None, None)
    extra = {
        "tokenizer.ggml.eot_token_id": EOT,
        "tokenizer.ggml.eom_token_id": IM_END,
        "tokenizer.ggml.unknown_token_id": UNK,
        "tokenizer.ggml.padding_token_id": PAD,
    }
    ours = Tokenizer(vocabulary_from_metadata(path, gguf_values(**extra)))
    assert (ours.eos_ids, ours.unk_id, ours.pad_id) == ({EOS, EOT, IM_END}, UNK, PAD)
    values = gguf_values(**{"tokenizer.chat_template": TURN})
    ours = Tokenizer(vocabulary_from_metadata(path, values))
    assert ours.eos_ids == {EOS, EOT}
    assert ours.chat_template == TURN


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("generation_config.json", {"eos_token_id": 300}, "eos_token_id 300 has no token"),
    ("generation_config.json", {"eos_token_id": [2, -1]}, "eos_token_id -1 has no token"),
    ("config.json", {"eos_token_id": "2"}, "eos_token_id 2 is neither an id nor a list of ids"),
    ("config.json", {"eos_token_id": [True]}, "eos_token_id True is neither an id nor a list"),
    ("tokenizer_config.json", {"bos_token": "<start>"}, "bos_token '<start>' is not in the vocab"),
    ("tokenizer_config.json", {"eos_token": 2}, "eos_token must be a text or an object"),
    ("tokenizer_config.json", {"unk_token": {"content": 7}}, "unk_token must be a text or an obj"),
    ("tokenizer_config.json", {"add_bos_token": 1}, "add_bos_token must be true or false, found 1"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "run its own code"),
    ("tokenizer_config.json", {"tokenizer_class": "me/code--mine.Mine"}, "run its own code"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"-1": added("x")}}, "no valid id and text"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: added("x")}}, "no valid id"),
    ("added_tokens.json", {"<a>": 1, "<b>": 1}, "two tokens have id 1"),
    ("added_tokens.json", {"<a>": "1"}, "token '<a>' has id 1"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD, ids=[case[2][:40] for case in BAD])
def test_contradictions_are_told_in_one_line(
    folder: Path, name: str, data: dict[str, Any], message: str
) -> None:
    write(folder, name, **data)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
