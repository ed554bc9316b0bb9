"""Every name of the GQA cluster document, over real worker processes, beside transformers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer

from engine.errors import CacheFull, ConfigError, EngineError, PlanError, PromptError, ProtocolError
from engine.seed_api import Tokenizer, hugging_face_model_handler, llama_cluster_transformer
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.network

# Float32 of order one, another order of additions.
TOLERANCE = 1e-5
PROMPTS = ["Hello, world", "GQA", "a rather longer text, of 7 * 6 letters or so"]
LENGTH = 24
PERCENTAGES = {"one device": [100], "three uneven shares": [0.5, 0.2, 0.3]}


class Tiny:
    """A tiny model's folder, what transformers says of it, and a cluster that runs it."""

    def __init__(self, folder: Path, oracle: Any, model: llama_cluster_transformer) -> None:
        self.folder, self.oracle, self.model = folder, oracle, model

    def expected(self, prompt: str, **options: Any) -> list[int]:
        """New ids of a greedy answer."""
        ids = self.model.tokenizer.encode(prompt)
        answer = self.oracle.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=LENGTH,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return answer[0, len(ids) :].tolist()

    def text(self, ids: list[int]) -> str:
        """Text of an answer, which its control tokens are no part of."""
        return self.model.tokenizer.decode(ids)


@pytest.fixture(scope="module", params=PERCENTAGES)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("tiny")
    oracle = save_tiny_llama(folder)
    handler = hugging_face_model_handler(
        model_path=folder,
        percentages=PERCENTAGES[request.param],
        CPU_GPU_select_list=[False] * len(PERCENTAGES[request.param]),
        backend_select_list=["torch"] * len(PERCENTAGES[request.param]),
        split_dim=0,
    )
    with llama_cluster_transformer(Tokenizer(folder), handler, dtype="float32") as model:
        yield Tiny(folder, oracle, model)


def test_answers_equal_transformers_whatever_the_shares(tiny: Tiny) -> None:
    texts = tiny.model.generate(prompts=PROMPTS, max_gen_len=LENGTH, temperature=0.0, top_p=1.0)
    assert texts == [tiny.text(tiny.expected(prompt)) for prompt in PROMPTS]
    # One text is a batch of one.
    assert tiny.model.generate(PROMPTS[1], LENGTH, 0.0) == texts[1:2]


def test_tokens_stream_with_their_batch_index(tiny: Tiny) -> None:
    heard: dict[int, list[tuple[int, str]]] = {0: [], 1: [], 2: []}

    def on_token(batch_index: int, token_id: int, text: str) -> None:
        heard[batch_index].append((token_id, text))

    texts = tiny.model.generate(
        prompts=PROMPTS, max_gen_len=LENGTH, temperature=0.0, on_token=on_token
    )
    for index, prompt in enumerate(PROMPTS):
        assert [token for token, _ in heard[index]] == tiny.expected(prompt)
        assert "".join(text for _, text in heard[index]) == texts[index]


def test_a_repeated_token_never_becomes_likelier(tiny: Tiny) -> None:
    """Bug of an original: negative logits were divided by the penalty, which raises them."""
    for penalty in (1.3, 1.9):
        texts = tiny.model.generate(PROMPTS, LENGTH, 0.0, repetition_penalty=penalty)
        expected = [tiny.expected(p, repetition_penalty=penalty) for p in PROMPTS]
        assert texts == [tiny.text(ids) for ids in expected]
        # The oracle's logits have both signs, so dividing all would choose other tokens.
        assert texts != tiny.model.generate(PROMPTS, LENGTH, 0.0)


def test_every_kind_of_stop_ends_an_answer(tiny: Tiny) -> None:
    ids = tiny.expected(PROMPTS[0])
    text = tiny.text(ids)
    place = next(n for n in range(4, len(ids)) if ids[n] not in ids[:n])
    options: dict[str, Any] = {"max_gen_len": LENGTH, "temperature": 0.0}
    assert tiny.model.generate(PROMPTS[0], stop_ids=[ids[place]], **options) == [
        tiny.text(ids[:place])
    ]
    run = ids[place - 1 : place + 1]
    assert tiny.model.generate(PROMPTS[0], stop_sequences=[run], **options) == [
        tiny.text(ids[: place - 1])
    ]
    word = text[3:6]  # of several tokens: each of them is one letter
    assert tiny.model.generate(PROMPTS[0], stop_words=[word], **options) == [
        text[: text.index(word)]
    ]


def test_a_seed_gives_the_same_texts_and_another_seed_others(tiny: Tiny) -> None:
    options: dict[str, Any] = {"max_gen_len": LENGTH, "temperature": 1.5, "top_p": 0.95}
    first = tiny.model.generate(PROMPTS, seed=5, **options)
    assert first == tiny.model.generate(PROMPTS, seed=5, **options)
    assert first != tiny.model.generate(PROMPTS, seed=6, **options)
    # As in the document, the seed is fixed where none is given.
    assert tiny.model.generate(PROMPTS, **options) == tiny.model.generate(PROMPTS, **options)
    assert len(set(tiny.model.generate(["same"] * 3, **options))) > 1


def test_one_layer_over_the_shares_equals_that_of_transformers(tiny: Tiny) -> None:
    ids = torch.tensor([tiny.model.tokenizer.encode(PROMPTS[2])])
    with torch.no_grad():
        states = tiny.oracle(ids, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        whole = tiny.model.run_QKV_mlp_cluster(layer, states[layer], start_pos=0)
        assert (whole - states[layer + 1]).abs().max() <= TOLERANCE
        # In pieces over the layer's own cache; rows alone are taken as well as a batch of one.
        found = [
            tiny.model.run_QKV_mlp_cluster(layer, states[layer][0, :9], 0),
            tiny.model.run_QKV_mlp_cluster(layer, states[layer][0, 9:10]),
            tiny.model.run_QKV_mlp_cluster(layer, states[layer][0, 10:], start_pos=10),
        ]
        assert (torch.cat(found) - states[layer + 1][0]).abs().max() <= TOLERANCE
    tiny.model.clear_kv_cache()
    again = tiny.model.run_QKV_mlp_cluster(0, states[0])
    assert (again - states[1]).abs().max() <= TOLERANCE


def test_what_a_layer_cannot_take_is_refused(tiny: Tiny) -> None:
    tiny.model.clear_kv_cache()
    x = torch.zeros(1, 3, 48)
    for call, error, text in (
        (lambda: tiny.model.run_QKV_mlp_cluster(3, x), PlanError, "layers 0 to 2"),
        (lambda: tiny.model.run_QKV_mlp_cluster(0, x[..., :7]), PromptError, r"\[tokens, 48\]"),
        (lambda: tiny.model.run_QKV_mlp_cluster(0, x, 5), ProtocolError, "expected position 0"),
        (lambda: tiny.model.run_QKV_mlp_cluster(0, x.repeat(2, 1, 1)), PromptError, "takes 1"),
        (lambda: tiny.model.generate([]), PromptError, "no prompts"),
        (lambda: tiny.model.generate("x", stop_ids=[99]), PromptError, "vocabulary of 99"),
        (lambda: tiny.model.generate("x" * 300), CacheFull, "needs 300 positions"),
    ):
        with pytest.raises(error, match=text) as found:
            call()
        assert "\n" not in str(found.value)
    # Nothing of it stayed behind.
    assert len(tiny.model.generate(PROMPTS, 3, 0.0)) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    path = tmp_path_factory.mktemp("folder")
    save_tiny_llama(path)
    return path


def test_the_tokenizer_equals_that_of_transformers(folder: Path) -> None:
    oracle = AutoTokenizer.from_pretrained(folder)
    for path in (folder, str(folder / "tokenizer.json")):
        tokenizer = Tokenizer(path)
        for text in (*PROMPTS, ""):
            ids = oracle.encode(text, add_special_tokens=False)
            assert tokenizer.encode(text) == ids
            # The tiny vocabulary has no space.
            assert tokenizer.decode(ids) == text.replace(" ", "")
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 99)
    assert tokenizer.encode("ab", bos=True, eos=True) == [1, *tokenizer.encode("ab"), 2]
    assert tokenizer.decode([1, *tokenizer.encode("ab"), 2]) == "ab"


def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    sentences = [f"{a} and {b} make {a + b}, which is fine" for a in range(30) for b in range(9)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(written.getvalue())
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer(path)
    for text in ("12 and 7 make 19", "which bytes: größer 中文", ""):
        assert tokenizer.encode(text) == oracle.encode(text)
        assert tokenizer.decode(oracle.encode(text)).strip() == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (oracle.bos_id(), oracle.eos_id())


def test_the_environment_sets_window_and_dtype(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = hugging_face_model_handler(folder)
    ids = list(range(3, 40))
    with llama_cluster_transformer(Tokenizer(folder), handler, dtype="float32") as model:
        exact = model.session.logits(ids)
        assert model.session.model.kv_window == 256
    monkeypatch.setenv("OPEN_CLUSTER_KV_WINDOW", "40")
    monkeypatch.setenv("OPEN_CLUSTER_KV_CACHE_DTYPE", "fp16")
    with llama_cluster_transformer(Tokenizer(folder), handler, dtype="float32") as model:
        assert model.session.model.kv_window == 40
        difference = np.abs(model.session.logits(ids) - exact).max()
        # Rounded to 11 bits, and not at all lost.
        assert 1e-6 < difference < 1e-2
        with pytest.raises(CacheFull, match="the KV window has 40"):
            model.generate("x" * 41)
    monkeypatch.setenv("OPEN_CLUSTER_KV_CACHE_DTYPE", "fp12")
    with pytest.raises(ConfigError, match="'fp12' is no dtype of the KV cache"):
        llama_cluster_transformer(Tokenizer(folder), handler)


def test_shares_become_a_plan(folder: Path) -> None:
    handler = hugging_face_model_handler(folder, percentages=[50, 0, 50], split_dim=1)
    assert handler.plan.devices == ("local-1/cpu", "local-2/cpu", "local-3/cpu")
    assert handler.plan.used_devices() == (0, 2)
    assert handler.plan.unit_range(handler.plan.shape.attention_row(1), 2) == (3, 6)
    assert handler.split_dim == 1 and handler.percentages == (50.0, 0.0, 50.0)
    assert hugging_face_model_handler(folder, [1.0]).plan.devices == ("this/cpu",)
    assert hugging_face_model_handler(folder, [0.7, 0.3]).percentages == (70.0, 30.0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sum": ({"percentages": [50, 40]}, "sum to 90, they must sum to 100"),
    "negative": ({"percentages": [-1, 101]}, "not numbers >= 0"),
    "gpu": ({"CPU_GPU_select_list": ["cuda:77"]}, "GPU 77 was asked for"),
    "device": ({"CPU_GPU_select_list": ["tpu"]}, "CPU_GPU_select_list holds 'tpu'"),
    "devices": ({"CPU_GPU_select_list": [False, False]}, "2 entries for 1 percentages"),
    "backend": ({"backend_select_list": ["opencl"]}, "backend 'opencl' is not one of ours"),
    "backends": ({"backend_select_list": []}, "0 entries for 1 percentages"),
    "dimension": ({"split_dim": 2}, "split_dim 2 is not 0"),
    "model": ({"model_path": "/no/such/model"}, "/no/such/model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_handler_refuses_what_it_cannot_do_in_one_line(name: str, folder: Path) -> None:
    changes, text = REFUSED[name]
    with pytest.raises(EngineError, match=text) as found:
        hugging_face_model_handler(**{"model_path": folder, **changes})
    assert "\n" not in str(found.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this computer has a GPU")
def test_a_gpu_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="GPU 0 was asked for in CPU_GPU_select_list, this"):
        hugging_face_model_handler(folder, [50, 50], [True, False])


def test_the_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"q":', '"~~":'), "utf-8")
    handler = hugging_face_model_handler(folder)
    with pytest.raises(ConfigError, match="the tokenizer is not that of"):
        llama_cluster_transformer(Tokenizer(tmp_path), handler)
