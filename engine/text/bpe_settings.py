"""Settings of the `tokenizers` library for byte-level BPE, and merges from a ranked vocabulary.

In: tokens, merges and how words are cut. Out: what `tokenizer.json` of such a model would hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.byte_level import CHARACTER_OF_BYTE


def bpe_settings(
    *,
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[tuple[int, str]] = (),
    normalizer: dict[str, Any] | None = None,
    words: dict[str, Any] | None = None,
    ignores_merges: bool = False,
) -> dict[str, Any]:
    """Settings of a byte-level BPE model.

    Args:
        vocab: text in the byte alphabet to id.
        merges: pairs of such texts, first rank first.
        added: id and text of tokens that match before anything is cut into words.
        normalizer: the library's settings, or None.
        words: the library's pre-tokenizer.
        ignores_merges: whether a word that is a whole token is taken at once.
    """
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": text, **dict.fromkeys(flags, False)} for id, text in added
        ],
        "normalizer": normalizer,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignores_merges,
            "vocab": dict(vocab),
            "merges": list(merges),
        },
    }


def byte_text(token: bytes) -> str:
    """A token in the alphabet of byte-level vocabularies."""
    return "".join(map(CHARACTER_OF_BYTE.__getitem__, token))


def merges_of_ranks(tokens: Sequence[bytes]) -> list[tuple[str, str]]:
    """Merges that join any two tokens into a third, the lowest rank first.

    Args:
        tokens: in order of their ranks, no two equal.
    """
    # One character for each byte, so that texts can be cut in place of the bytes.
    texts = [byte_text(token) for token in tokens]
    ranks = {text: rank for rank, text in enumerate(texts)}
    merges: list[tuple[str, str]] = []
    for text in texts:
        cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges
