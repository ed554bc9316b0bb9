"""What the files beside a tokenizer say: special tokens, ends of an answer, the chat template.

In: a model folder with any of tokenizer_config.json, special_tokens_map.json, added_tokens.json,
generation_config.json, config.json, chat_template.jinja and chat_template.json. Out: their content
in one form, whatever form the files use. It knows no vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from engine.errors import CheckpointError, ConfigError
from engine.weights.json_settings import read_json_object, refuse_own_code
from engine.weights.mapped import one_line

MAX_TEMPLATE_BYTES = 1 << 22
MAX_TOKEN_ID = 1 << 22
SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Without them a model cannot be run as it was trained; the others are never used here.
_NEEDED_NAMES = ("bos_token", "eos_token", "unk_token")
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that a folder adds to a vocabulary.

    Attributes:
        is_special: whether it carries structure; otherwise it is text.
    """

    text: str
    is_special: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSettings:
    """The files of one folder.

    Attributes:
        path: the folder, for messages.
        tokenizer_config: that file, or empty.
        special_tokens: names such as bos_token to texts.
        added: by id.
        end_ids: of generation_config.json, else of config.json.
        chat_template: Jinja source, or None.
    """

    path: Path
    tokenizer_config: Json = field(default_factory=dict[str, Any])
    special_tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    added: Mapping[int, AddedToken] = field(default_factory=dict[int, AddedToken])
    end_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    def flag(self, key: str) -> bool | None:
        """A bool of tokenizer_config.json; None where it is absent or null."""
        value = self.tokenizer_config.get(key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(
                f"{self.path / 'tokenizer_config.json'}: {key} must be true or false, found "
                f"{one_line(value)}; correct the file"
            )
        return value

    def known_special_tokens(self, ids: Container[str]) -> dict[str, str]:
        """The special tokens that a vocabulary has.

        Args:
            ids: its texts.
        Raises: ConfigError: the beginning, the end or the unknown token is not among them.
        """
        for name in _NEEDED_NAMES:
            text = self.special_tokens.get(name)
            if text is not None and text not in ids:
                raise ConfigError(
                    f"{self.path}: {name} {one_line(text)!r} is not in the vocabulary; files of "
                    "two models are mixed"
                )
        return {name: text for name, text in self.special_tokens.items() if text in ids}

    def known_end_ids(self, tokens: Container[int]) -> set[int]:
        """The declared ends.

        Args:
            tokens: ids that have a token.
        Raises: ConfigError: a declared end has no token.
        """
        for id in self.end_ids:
            if id not in tokens:
                raise ConfigError(
                    f"{self.path}: eos_token_id {id} has no token in the vocabulary; files of two "
                    "models are mixed"
                )
        return {*self.end_ids}


def as_object(path: Path, value: object, what: str) -> Json:
    """A JSON object.

    Raises: CheckpointError: something else.
    """
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is not a JSON object")
    return cast("Json", value)


def as_list(path: Path, value: object, what: str) -> list[Any]:
    """A JSON array; null or nothing is an empty one.

    Raises: CheckpointError: something else.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise CheckpointError(f"{path}: {what} {one_line(value)} is not a JSON array")
    return cast("list[Any]", value)


def read_folder_settings(folder: Path) -> FolderSettings:
    """Read the files of a folder; all may be absent.

    Raises:
        CheckpointError: one is malformed.
        ConfigError: one wants to run code of its own, or names a token in an unknown form.
    """
    config_path = folder / "tokenizer_config.json"
    settings = _optional(config_path)
    refuse_own_code(config_path, settings)
    _check_class(config_path, settings.get("tokenizer_class"))
    named = {**_optional(folder / "special_tokens_map.json"), **settings}
    special = {name: _token_text(config_path, name, named.get(name)) for name in SPECIAL_NAMES}
    return FolderSettings(
        path=folder,
        tokenizer_config=settings,
        special_tokens={name: text for name, text in special.items() if text},
        added=_added_tokens(folder, settings),
        end_ids=_end_ids(folder),
        chat_template=_chat_template(folder, settings),
    )


def _optional(path: Path) -> Json:
    return read_json_object(path) if path.is_file() else {}


def _check_class(path: Path, value: object) -> None:
    # "repository--module.Class" is how files name code of another repository.
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"\w{1,80}", value)):
        raise ConfigError(
            f"{path}: tokenizer_class {one_line(value)}: the model asks to run its own code, which "
            "is not supported; use a model of a built-in architecture"
        )


def _token_text(path: Path, name: str, value: object) -> str | None:
    """A special token, given as its text or as an object with a content."""
    if isinstance(value, dict):
        value = cast("Json", value).get("content")
    if value is not None and not isinstance(value, str):
        raise ConfigError(
            f"{path}: {name} must be a text or an object with a content, found {one_line(value)}; "
            "correct the file"
        )
    return value


def _added_tokens(folder: Path, settings: Json) -> dict[int, AddedToken]:
    found: dict[int, AddedToken] = {}
    path = folder / "added_tokens.json"
    for text, id in _optional(path).items():
        if type(id) is not int or not 0 <= id < MAX_TOKEN_ID or not text:
            raise ConfigError(f"{path}: token {one_line(text)!r} has id {one_line(id)}")
        if id in found:
            raise ConfigError(f"{path}: two tokens have id {id}")
        # Files of this form do not say; what looks like a mark is protected as one.
        found[id] = AddedToken(text, text[0] in "<[" and text[-1] in ">]")
    path = folder / "tokenizer_config.json"
    value = settings.get("added_tokens_decoder")
    entries = {} if value is None else as_object(path, value, "added_tokens_decoder")
    for key, entry_value in entries.items():
        entry = as_object(path, entry_value, f"added token {one_line(key)}")
        text = entry.get("content")
        is_id = key.isascii() and key.isdigit() and len(key) < 9 and int(key) < MAX_TOKEN_ID
        if not is_id or not isinstance(text, str) or not text:
            raise ConfigError(
                f"{path}: added token {one_line(key)} {one_line(entry)} has no valid id and text"
            )
        found[int(key)] = AddedToken(text, entry.get("special") is True)
    return found


def _end_ids(folder: Path) -> tuple[int, ...]:
    for path in (folder / "generation_config.json", folder / "config.json"):
        value: object = _optional(path).get("eos_token_id")
        values = cast("list[object]", value if isinstance(value, list) else [value])
        found = [id for id in values if id is not None]
        for id in found:
            if type(id) is not int:
                raise ConfigError(
                    f"{path}: eos_token_id {one_line(id)} is neither an id nor a list of ids; "
                    "correct the file"
                )
        if found:
            return tuple(cast("list[int]", found))
    return ()


def _chat_template(folder: Path, settings: Json) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            size = path.stat().st_size
            if size > MAX_TEMPLATE_BYTES:
                raise CheckpointError(
                    f"{path}: {size:,} bytes of template, at most {MAX_TEMPLATE_BYTES:,} are read"
                )
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    value = settings.get("chat_template")
    if value is None:  # where the processors of vision models keep it
        value = _optional(folder / "chat_template.json").get("chat_template")
    if isinstance(value, list):
        named = [as_object(folder, entry, "a chat template") for entry in cast("list[Any]", value)]
        templates = {str(entry.get("name")): entry.get("template") for entry in named}
        value = templates.get("default")
        if value is None and len(templates) == 1:
            (value,) = templates.values()
    if value is not None and not isinstance(value, str):
        raise CheckpointError(
            f"{folder}: the chat template is neither a text nor a list of named texts, found "
            f"{one_line(value)}; correct tokenizer_config.json"
        )
    return value
