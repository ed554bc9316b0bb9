"""The vocabulary of a tokenizer.model: a SentencePiece model, or Meta's list of ranked tokens.

In: the path of the file, or of the model folder that has it. Out: a Vocabulary. The two forms have
nothing in common but the name; the content tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import CheckpointError, ConfigError
from engine.text.folder_settings import AddedToken, FolderSettings, read_folder_settings
from engine.text.rank_vocabulary import is_rank_file, make_rank_vocabulary
from engine.text.sentencepiece_model import (
    BYTE,
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    filler,
    is_filler,
    parse_model,
)
from engine.text.special_tokens import assign_roles
from engine.text.vocabulary import Prefix, Vocabulary
from engine.weights.mapped import one_line

FILE_NAME = "tokenizer.model"
MAX_MODEL_BYTES = 1 << 25
MAX_ADDED_GAP = 1 << 16


def read_model_vocabulary(path: Path, vocab_size: int | None = None) -> Vocabulary:
    """Read the vocabulary of a tokenizer.model.

    Args:
        path: a folder that has the file, or the file. Files beside it are read too if it has its
            usual name; under another name it stands alone.
        vocab_size: rows of the model's embedding: tokens that the folder adds beyond them are left
            out, so that their texts are ordinary ones. None: all tokens are kept.
    Raises:
        CheckpointError: it is missing, damaged, too large or of neither form.
        ConfigError: ids clash or lie outside, or the folder wants to run its own code.
    """
    path = path / FILE_NAME if path.is_dir() else path
    has_folder = path.name == FILE_NAME
    settings = read_folder_settings(path.parent) if has_folder else FolderSettings(path=path)
    try:
        size = path.stat().st_size
        if size > MAX_MODEL_BYTES:
            raise CheckpointError(
                f"{path}: {size:,} bytes of tokenizer, at most {MAX_MODEL_BYTES:,} are read; fetch "
                "the file again"
            )
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if is_rank_file(data):
        return make_rank_vocabulary(path, data, settings)
    # Every SentencePiece model begins with its first piece.
    if data[:1] != b"\x0a":
        shown = data[:8].hex(" ") or "nothing"
        raise CheckpointError(
            f"{path}: neither a SentencePiece model nor a list of base64 tokens with ranks (begins "
            f"with {shown}); fetch the file again"
        )
    model = parse_model(path, data)
    added = _placed_tokens(path, model, settings.added)
    if vocab_size is not None:
        first_dropped = max(vocab_size, len(model.pieces))
        added = {id: token for id, token in added.items() if id < first_dropped}
    return make_piece_vocabulary(path, _extended(model, added), settings, added)


def _placed_tokens(
    path: Path, model: SentencePieceModel, added: Mapping[int, AddedToken]
) -> dict[int, AddedToken]:
    """The folder's tokens, of which those with the id of a piece must be that piece."""
    places = {piece.text: id for id, piece in enumerate(model.pieces)}
    limit = len(model.pieces) + MAX_ADDED_GAP
    for id, token in added.items():
        is_piece = id < len(model.pieces)
        shown = one_line(token.text)
        if (is_piece and places.get(token.text) != id) or (not is_piece and token.text in places):
            raise ConfigError(
                f"{path}: added token {shown!r} and another token share id {id} or the text; files "
                "of two models are mixed"
            )
        if id >= limit:
            raise ConfigError(
                f"{path}: added token {shown!r} has id {id}, the file ends at "
                f"{len(model.pieces) - 1}, and no id from {limit} on is taken"
            )
    if len({token.text for token in added.values()}) != len(added):
        raise ConfigError(f"{path}: two added tokens have the same text; correct the folder")
    return dict(added)


def _extended(model: SentencePieceModel, added: Mapping[int, AddedToken]) -> SentencePieceModel:
    """The model with a piece for every added token; ids between them get pieces without a use."""
    pieces = list(model.pieces)
    for id in range(len(pieces), max(added, default=-1) + 1):
        token = added.get(id)
        text = token.text if token else filler(id)
        pieces.append(Piece(text, 0.0, USER_DEFINED if token else UNUSED))
    return model.with_pieces(pieces)


def make_piece_vocabulary(
    path: Path,
    model: SentencePieceModel,
    settings: FolderSettings,
    added: Mapping[int, AddedToken],
) -> Vocabulary:
    """A vocabulary of a SentencePiece model.

    Args:
        path: for messages.
        model: with a piece for every added token.
        settings: of the folder, or empty.
        added: what the folder says of some ids.
    Raises: ConfigError: a declared special token is missing.
    """
    pieces = model.pieces
    tokens = {id: piece.text for id, piece in enumerate(pieces) if not is_filler(piece.text)}
    ids = {text: id for id, text in tokens.items()}
    kinds = {
        kind: {id for id, piece in enumerate(pieces) if piece.kind == kind}
        for kind in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)
    }
    own = {"bos_token": model.bos, "eos_token": model.eos, "pad_token": model.pad}
    special = {name: text for name, text in own.items() if ids.get(text) in kinds[CONTROL]}
    special["unk_token"] = model.unknown
    special = {name: text for name, text in special.items() if text in ids}
    special |= settings.known_special_tokens(ids)
    bos_id = ids.get(special.get("bos_token", ""))
    ends = settings.known_end_ids(tokens)
    if "eos_token" in special:
        ends.add(ids[special["eos_token"]])
    marked = {id for id, token in added.items() if token.is_special}
    roles = assign_roles(
        tokens=tokens,
        control=kinds[CONTROL] | kinds[UNKNOWN] | marked,
        others=kinds[USER_DEFINED] - marked,
        ends=ends,
        bos_id=bos_id,
        template=settings.chat_template,
    )
    adds_bos = settings.flag("add_bos_token") is not False
    return Vocabulary(
        path=path,
        backend=protected_model(model, roles.protected),
        tokens=tokens,
        kind="sentencepiece",
        control=roles.control,
        protected=roles.protected,
        raw=frozenset(),
        byte_values=byte_values(pieces),
        prefix=_prefix(model, settings),
        unknown_id=min(kinds[UNKNOWN], default=None),
        pad_id=ids.get(special.get("pad_token", "")),
        bos_id=bos_id,
        eos_ids=roles.ends,
        adds_bos=adds_bos and bos_id is not None,
        special_tokens=special,
        chat_template=settings.chat_template,
    )


def protected_model(model: SentencePieceModel, protected: Mapping[str, int]) -> SentencePieceModel:
    """The model in which no text becomes a protected token: control symbols match in no text."""
    hidden = {*protected.values()}
    pieces = [
        Piece(piece.text, piece.score, CONTROL) if id in hidden and piece.kind != UNKNOWN else piece
        for id, piece in enumerate(model.pieces)
    ]
    return model.with_pieces(pieces)


def byte_values(pieces: Sequence[Piece]) -> dict[int, int]:
    """The bytes of BYTE pieces, whose texts are <0x00> to <0xFF>."""
    names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    return {
        id: names[piece.text]
        for id, piece in enumerate(pieces)
        if piece.kind == BYTE and piece.text in names
    }


def _prefix(model: SentencePieceModel, settings: FolderSettings) -> Prefix:
    if not model.has_prefix or settings.flag("add_prefix_space") is False:
        return "none"
    # Before `legacy` was declared false, text after a control token got a space of its own.
    return "first" if settings.flag("legacy") is False else "every"
