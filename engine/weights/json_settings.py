"""JSON files of a model folder, read as unique keys with checked types.

In: a path. Out: plain values, or one line that names the key. It gives keys no meaning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from engine.errors import CheckpointError, ConfigError
from engine.weights.mapped import one_line

MAX_CONFIG_BYTES = 1 << 24


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{one_line(key)!r} appears twice")
        found[key] = value
    return found


def parse_json_object(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """One JSON object whose keys are unique.

    Args:
        path: for the message.
        text: UTF-8.
        what: names the text in the message.
    Raises: CheckpointError: not UTF-8, not JSON, nested too deeply, not an object, a key twice.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = one_line(str(error), 200)
        raise CheckpointError(f"{path}: {what} cannot be read: {reason}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} is not a JSON object")
    return cast("dict[str, Any]", value)


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON file of a model folder.

    Raises: CheckpointError: it is missing, too large or malformed.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path}: {size:,} bytes of JSON, at most {max_bytes:,} are read")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return parse_json_object(path, text, "the JSON")


def refuse_own_code(path: Path, settings: dict[str, Any]) -> None:
    """Raises: ConfigError: the file names Python code of its own."""
    for key in ("auto_map", "trust_remote_code"):
        if settings.get(key):
            raise ConfigError(
                f"{path}: {key}: the model asks to run its own code, which is not supported; "
                "use a model of a built-in architecture"
            )


class Settings:
    """Typed access to one JSON object; null counts as absent.

    Attributes:
        path: for messages.
        where: begins the name of every key in messages, such as "text_config.".
    """

    def __init__(self, path: Path, values: dict[str, Any], where: str = "") -> None:
        self.path = path
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def fail(self, key: str, reason: str) -> ConfigError:
        """An error about one key."""
        return ConfigError(f"{self.path}: {self.where}{key} {reason}")

    def shown(self, key: str) -> str:
        """The value of a key, for a message."""
        return one_line(self.values.get(key))

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at most 63 bits."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing; it must be a whole number")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"{one_line(value)} is not a whole number")
        if abs(value) >= 1 << 63:
            raise self.fail(key, "is beyond 64 bits")
        return value

    def between(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from `low` to `high`."""
        value = self.integer(key, default)
        if not low <= value <= high:
            raise self.fail(key, f"{value} is not between {low} and {high:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A real number."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(key, "is missing; it must be a number")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"{one_line(value)} is not a number")
        try:
            return float(value)
        except OverflowError as error:
            raise self.fail(key, "is too large for a number") from error

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, f"{one_line(value)} is not true or false")
        return default if value is None else value

    def section(self, key: str) -> Settings | None:
        """An object inside this one, or None where it is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, f"{one_line(value)} is not an object")
        return Settings(self.path, cast("dict[str, Any]", value), f"{self.where}{key}.")

    def strings(self, key: str, length: int) -> list[str] | None:
        """A list of exactly `length` strings, or None where it is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.fail(key, f"{one_line(value)} is not a list")
        items = cast("list[object]", value)
        if len(items) != length:
            raise self.fail(key, f"has {len(items):,} items, the model has {length} layers")
        wrong = next((item for item in items if not isinstance(item, str)), None)
        if wrong is not None or not all(isinstance(item, str) for item in items):
            raise self.fail(key, f"holds {one_line(wrong)}, which is not a name")
        return cast("list[str]", items)

    def integers(self, key: str) -> list[int] | None:
        """A list of whole numbers, or None where it is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.fail(key, f"{one_line(value)} is not a list")
        for item in cast("list[object]", value):
            if isinstance(item, bool) or not isinstance(item, int):
                raise self.fail(key, f"holds {one_line(item)}, which is not a whole number")
        return cast("list[int]", value)

    def refuse_unsupported(self, neutral: dict[str, tuple[object, ...]]) -> None:
        """Refuse keys that would change the arithmetic.

        Args:
            neutral: key to the values that change nothing; null and a missing key are neutral too.
        Raises: ConfigError: another value.
        """
        for key, allowed in neutral.items():
            if key in self and self.values[key] not in allowed:
                raise self.fail(key, f"{self.shown(key)} is not supported; use a model without it")
