"""The content of a SentencePiece model: its pieces, and its settings as they are stored.

In: the bytes of a `.model` file, or pieces from elsewhere. Out: a checked model that can be changed
piece by piece, and its bytes again. The wire format is protobuf; the `sentencepiece` library does
the segmentation and every check of the settings that is not made here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from engine.errors import CheckpointError
from engine.weights.mapped import one_line

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_PIECES = 1 << 22
# The libraries look for the longest piece at every place of a text: endless ones would stop them.
MAX_PIECE_BYTES = 4096
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Numbers of fields in sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_TRAINER_MODEL_TYPE, _TRAINER_SUFFIX, _TRAINER_BYTES = 3, 24, 35
_TRAINER_UNKNOWN, _TRAINER_BOS, _TRAINER_EOS, _TRAINER_PAD = 45, 46, 47, 48
_NORMALIZER_NAME, _NORMALIZER_TABLE = 1, 2
_NORMALIZER_PREFIX, _NORMALIZER_REMOVES, _NORMALIZER_ESCAPES = 3, 4, 5
_BPE = 2

Field = tuple[int, int | bytes]


class Piece(NamedTuple):
    """One token.

    Attributes:
        text: with U+2581 for spaces.
        score: merge priority (BPE) or logarithm of its probability (unigram).
        kind: NORMAL to BYTE, as in the file format.
    """

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """Pieces, whose places are their ids, and encoded settings.

    Attributes:
        bos, eos, unknown, pad: texts of these pieces, present or not.
        has_prefix: whether a space is written before a text.
    """

    pieces: tuple[Piece, ...]
    trainer: bytes
    normalizer: bytes
    bos: str = "<s>"
    eos: str = "</s>"
    unknown: str = "<unk>"
    pad: str = "<pad>"
    has_prefix: bool = True

    def serialized(self) -> bytes:
        """The bytes of a `.model` file."""
        found = bytearray()
        text_key, score_key = _key(_PIECE_TEXT, _BYTES), _key(_PIECE_SCORE, _FIXED32)
        kinds = [_number_field(_PIECE_KIND, kind) for kind in range(BYTE + 1)]
        for piece in self.pieces:
            text = piece.text.encode("utf-8")
            body = text_key + _varint(len(text)) + text + score_key
            body += struct.pack("<f", piece.score) + kinds[piece.kind]
            found += _length_field(_PIECES, body)
        found += _length_field(_TRAINER, self.trainer)
        found += _length_field(_NORMALIZER, self.normalizer)
        return bytes(found)

    def with_pieces(self, pieces: Sequence[Piece]) -> SentencePieceModel:
        """The same settings with other pieces."""
        return replace(self, pieces=tuple(pieces))

    def without_prefix(self) -> SentencePieceModel:
        """The same model, which writes no space before a text."""
        # The last value of a field counts.
        changed = self.normalizer + _number_field(_NORMALIZER_PREFIX, 0)
        return replace(self, normalizer=changed, has_prefix=False)


def filler(name: object) -> str:
    """Text of a piece that no file has: between two code points that are no characters."""
    return f"\ufdd0{name}\ufdd1"


def is_filler(text: str) -> bool:
    """Whether a text was made by `filler`."""
    return text.startswith("\ufdd0")


def make_bpe_model(
    pieces: Iterable[Piece], *, has_prefix: bool, has_bytes: bool, unknown: str
) -> SentencePieceModel:
    """A BPE model that takes text as it is.

    Args:
        pieces: in order of their ids; exactly one is UNKNOWN.
        has_prefix: whether a space is written before a text.
        has_bytes: whether characters that no piece has become BYTE pieces, all 256 of them.
        unknown: text of the UNKNOWN piece.
    """
    trainer = _number_field(_TRAINER_MODEL_TYPE, _BPE)
    trainer += _number_field(_TRAINER_BYTES, int(has_bytes))
    trainer += _length_field(_TRAINER_UNKNOWN, unknown.encode("utf-8"))
    normalizer = _length_field(_NORMALIZER_NAME, b"identity")
    normalizer += _number_field(_NORMALIZER_PREFIX, int(has_prefix))
    normalizer += _number_field(_NORMALIZER_REMOVES, 0)
    normalizer += _number_field(_NORMALIZER_ESCAPES, 1)
    return SentencePieceModel(
        pieces=tuple(pieces),
        trainer=trainer,
        normalizer=normalizer,
        unknown=unknown,
        has_prefix=has_prefix,
    )


def parse_model(path: Path, data: bytes) -> SentencePieceModel:
    """Read a `.model` file.

    Args:
        path: for messages.
        data: the whole file.
    Raises: CheckpointError: it is no such file, is damaged, or decodes otherwise than supported.
    """
    pieces: list[Piece] = []
    # A message that is stored in several parts is the parts joined.
    trainer_parts: list[bytes] = []
    normalizer_parts: list[bytes] = []
    for number, value in _fields(path, data):
        if number == _PIECES:
            if len(pieces) == MAX_PIECES:
                raise CheckpointError(
                    f"{path}: more than {MAX_PIECES:,} pieces, which no model has; fetch the file "
                    "again"
                )
            pieces.append(_parse_piece(path, len(pieces), _as_bytes(path, value)))
        elif number == _TRAINER:
            trainer_parts.append(_as_bytes(path, value))
        elif number == _NORMALIZER:
            normalizer_parts.append(_as_bytes(path, value))
        elif number == _DENORMALIZER and dict(_fields(path, _as_bytes(path, value))).get(
            _NORMALIZER_TABLE
        ):
            raise CheckpointError(
                f"{path}: the model rewrites text after decoding, which is not supported; use the "
                "model's tokenizer.json"
            )
    trainer, normalizer = b"".join(trainer_parts), b"".join(normalizer_parts)
    training = dict(_fields(path, trainer))
    if training.get(_TRAINER_SUFFIX):
        raise CheckpointError(
            f"{path}: the model writes spaces behind words, which is not supported; use the "
            "model's tokenizer.json"
        )
    names = {
        name: _text(path, training.get(number, default))
        for name, number, default in (
            ("unknown", _TRAINER_UNKNOWN, b"<unk>"),
            ("bos", _TRAINER_BOS, b"<s>"),
            ("eos", _TRAINER_EOS, b"</s>"),
            ("pad", _TRAINER_PAD, b"<pad>"),
        )
    }
    settings = dict(_fields(path, normalizer))
    return SentencePieceModel(
        pieces=tuple(pieces),
        trainer=trainer,
        normalizer=normalizer,
        has_prefix=bool(settings.get(_NORMALIZER_PREFIX, 1)),
        **names,
    )


def _parse_piece(path: Path, id: int, data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(path, data):
        if number == _PIECE_TEXT:
            text = _text(path, value)
        elif number == _PIECE_SCORE and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif number == _PIECE_KIND and isinstance(value, int):
            kind = value
    if not text or not NORMAL <= kind <= BYTE or not math.isfinite(score):
        shown = f"text {one_line(text)!r}, score {score}, type {kind}"
        raise CheckpointError(
            f"{path}: piece {id} has {shown}; a text, a number and a type of 1 to 6 are needed; "
            "fetch the file again"
        )
    check_piece_length(path, id, text)
    return Piece(text, score, kind)


def check_piece_length(path: Path, id: int, text: str) -> None:
    """Raises: CheckpointError: a piece is longer than MAX_PIECE_BYTES."""
    if len(text) > MAX_PIECE_BYTES // 4 and len(text.encode("utf-8")) > MAX_PIECE_BYTES:
        raise CheckpointError(
            f"{path}: piece {id} is longer than {MAX_PIECE_BYTES:,} bytes, as in no model; fetch "
            "the file again"
        )


def _fields(path: Path, data: bytes) -> Iterator[Field]:
    """Number and value of every field of a message; groups do not occur."""
    offset, end = 0, len(data)
    while offset < end:
        # Nearly all keys and sizes are one byte; a vocabulary has a million of them.
        key = data[offset]
        offset += 1
        if key > 0x7F:
            key, offset = _read_varint(path, data, offset - 1)
        wire = key & 7
        if wire == _VARINT:
            value, offset = _read_varint(path, data, offset)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            if offset < end and data[offset] < 0x80:
                size = data[offset]
                offset += 1
            else:
                size, offset = _read_varint(path, data, offset)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise _damaged(path, f"a field of unknown form {wire}")
        if size > end - offset:
            raise _damaged(path, f"a field of {size:,} bytes where {end - offset:,} are left")
        yield key >> 3, data[offset : offset + size]
        offset += size


def _read_varint(path: Path, data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if offset + place >= len(data):
            break
        byte = data[offset + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, offset + place + 1
    raise _damaged(path, "a number without an end")


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged SentencePiece model ({found}); fetch the file again")


def _as_bytes(path: Path, value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _damaged(path, "a number where a message belongs")
    return value


def _text(path: Path, value: int | bytes) -> str:
    try:
        return _as_bytes(path, value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, "a text that is no UTF-8") from error


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _number_field(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _varint(value)


def _length_field(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(value)) + value
