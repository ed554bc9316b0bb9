"""The vocabulary of Meta's Llama 3 and 4 tokenizer.model: base64 tokens with their ranks.

In: the bytes of the file. Out: a Vocabulary. The file has no special tokens: the models define
them, after the ranked tokens, and the number of ranks tells the models apart.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError
from engine.text.bpe_settings import bpe_settings, byte_text, merges_of_ranks
from engine.text.folder_settings import FolderSettings
from engine.text.pretokenizers import PRE_TOKENIZERS
from engine.text.special_tokens import assign_roles
from engine.text.vocabulary import Vocabulary
from engine.weights.mapped import one_line

_FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]{1,512}={0,2} [0-9]{1,9}\r?(?:\n|\Z)")


@dataclass(frozen=True, slots=True)
class RankFamily:
    """What a model adds to its ranked tokens.

    Attributes:
        special_tokens: texts, from the first id after the ranks on.
        pre: name of the rule that cuts text into words.
        pad: text of the token that fills batches.
        ends: texts of the tokens that end an answer.
    """

    special_tokens: tuple[str, ...]
    pre: str
    pad: str
    ends: tuple[str, ...]


def _numbered(pattern: str, first: int, count: int) -> list[str]:
    return [pattern.format(number) for number in range(first, first + count)]


def _llama3() -> RankFamily:
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    names += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id"]
    names += ["eom_id", "eot_id", "python_tag", "image"]
    names += _numbered("reserved_special_token_{}", 2, 256 - len(names))
    return RankFamily(
        special_tokens=tuple(f"<|{name}|>" for name in names),
        pre="llama3",
        pad="<|finetune_right_pad_id|>",
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    )


def _llama4() -> RankFamily:
    text, vision = "text_post_train_reserved_special_token_{}", "vision_reserved_special_token_{}"
    reasoning = "reasoning_reserved_special_token_{}"
    names = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]
    names += ["header_start", "header_end", "eom", "eot", "step", *_numbered(text, 0, 6)]
    # The reserved numbers 6 and 7 are left out by the model's own definition.
    names += ["python_start", "python_end", "finetune_right_pad", *_numbered(text, 8, 61)]
    names += ["image_start", "image_end", *_numbered(vision, 0, 2)]
    names += ["tile_x_separator", "tile_y_separator", *_numbered(vision, 2, 4)]
    names += ["image", *_numbered(vision, 6, 1), "patch", *_numbered(vision, 7, 1041)]
    names += [*_numbered(reasoning, 0, 8), "reasoning_thinking_start", "reasoning_thinking_end"]
    names += _numbered("reserved_special_token_{}", 0, 2048 - len(names))
    return RankFamily(
        special_tokens=tuple(f"<|{name}|>" for name in names),
        pre="llama4",
        pad="<|finetune_right_pad|>",
        ends=("<|end_of_text|>", "<|eom|>", "<|eot|>"),
    )


def rank_family(path: Path, num_ranks: int) -> RankFamily:
    """The model that a file of so many ranks belongs to.

    Raises: CheckpointError: no known model has as many.
    Source: Meta's published prompt formats and tokenizers of Llama 3 to 3.3 and Llama 4.
    """
    if num_ranks == 128_000:
        return _llama3()
    if num_ranks == 200_000:
        return _llama4()
    raise CheckpointError(
        f"{path}: {num_ranks:,} ranked tokens; known are Llama 3 with 128,000 and Llama 4 with "
        "200,000; use the model's tokenizer.json"
    )


def is_rank_file(data: bytes) -> bool:
    """Whether a file begins as such a list does."""
    return _FIRST_LINE.match(data) is not None


def parse_ranks(path: Path, data: bytes) -> list[bytes]:
    """Tokens in order of their ranks.

    Raises: CheckpointError: a line is malformed, or ranks or tokens are missing or there twice.
    """
    found: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        encoded, _, rank_text = line.partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            token = b""
        if not token or not rank_text.isdigit() or len(rank_text) > 9:
            shown = one_line(line[:60].decode("utf-8", errors="replace"))
            raise CheckpointError(
                f"{path}: line {number} {shown!r} is not a base64 token and its rank; fetch the "
                "file again"
            )
        if found.setdefault(int(rank_text), token) is not token:
            raise CheckpointError(f"{path}: line {number}: rank {int(rank_text)} is there twice")
    tokens = [found[rank] for rank in sorted(found)]
    if max(found, default=-1) != len(found) - 1:
        raise CheckpointError(
            f"{path}: {len(found):,} ranks, the last is {max(found):,}; fetch the file again"
        )
    distinct = {*tokens}
    if len(distinct) != len(tokens):
        raise CheckpointError(f"{path}: two ranks have the same token; fetch the file again")
    missing = next((byte for byte in range(256) if bytes([byte]) not in distinct), None)
    if missing is not None:
        raise CheckpointError(
            f"{path}: no token for byte {missing:#04x}, so some text could not be written; fetch "
            "the file again"
        )
    return tokens


def make_rank_vocabulary(path: Path, data: bytes, settings: FolderSettings) -> Vocabulary:
    """Read such a file.

    Args:
        path: for messages.
        data: the whole file.
        settings: of the folder, or empty.
    Raises:
        CheckpointError: the file is damaged or of an unknown model.
        ConfigError: a declared end is outside the vocabulary.
    """
    ranked = parse_ranks(path, data)
    family = rank_family(path, len(ranked))
    pre = PRE_TOKENIZERS[family.pre]
    vocab = {byte_text(token): rank for rank, token in enumerate(ranked)}
    tokens = {rank: text for text, rank in vocab.items()}
    tokens |= {len(ranked) + place: text for place, text in enumerate(family.special_tokens)}
    ids = {text: len(ranked) + place for place, text in enumerate(family.special_tokens)}
    bos = family.special_tokens[0]
    roles = assign_roles(
        tokens=tokens,
        control=ids.values(),
        others=(),
        ends=settings.known_end_ids(tokens) | {ids[text] for text in family.ends},
        bos_id=ids[bos],
        template=settings.chat_template,
    )
    # A ranked token may be written like a special one; that one stays text.
    backend = bpe_settings(
        vocab=vocab,
        merges=merges_of_ranks(ranked),
        normalizer=pre.normalizer,
        words=pre.words,
        ignores_merges=pre.ignores_merges,
    )
    return Vocabulary(
        path=path,
        backend=backend,
        tokens=tokens,
        kind="byte_level",
        control=roles.control,
        protected=ids,
        raw=frozenset(),
        pad_id=ids[family.pad],
        bos_id=ids[bos],
        eos_ids=roles.ends,
        adds_bos=True,
        special_tokens={
            "bos_token": bos,
            "eos_token": family.ends[0],
            "pad_token": family.pad,
        },
        chat_template=settings.chat_template,
    )
