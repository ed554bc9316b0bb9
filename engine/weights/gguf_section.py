"""Typed access to the keys of one architecture in a GGUF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.errors import ConfigError
from engine.weights.gguf_split import GgufModel
from engine.weights.mapped import one_line


class Section:
    """The keys that begin with the architecture's name.

    Attributes:
        file: checked headers.
        path: for messages.
    """

    def __init__(self, file: GgufModel, architecture: str) -> None:
        self.file = file
        self.path: Path = file.path
        self._prefix = f"{architecture}."

    def fail(self, key: str, reason: str) -> ConfigError:
        """An error about one key."""
        return ConfigError(f"{self.path}: {self._prefix}{key} {reason}")

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return self._prefix + key in self.file.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number, or the default where the key is absent."""
        full = self._prefix + key
        value = self.file.metadata.get(full, default)
        if value is None:
            raise self.fail(key, "is missing; the file is incomplete")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"must be one integer, found {self.file.type_of(full)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A real number, or the default where the key is absent."""
        full = self._prefix + key
        value = self.file.metadata.get(full, default)
        if value is None:
            raise self.fail(key, "is missing; the file is incomplete")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"must be one number, found {self.file.type_of(full)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false, or the default where the key is absent."""
        full = self._prefix + key
        value = self.file.metadata.get(full, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be one bool, found {self.file.type_of(full)}")
        return value

    def text(self, key: str, default: str) -> str:
        """A string, or the default where the key is absent."""
        full = self._prefix + key
        value = self.file.metadata.get(full, default)
        if not isinstance(value, str):
            raise self.fail(key, f"must be one string, found {self.file.type_of(full)}")
        return value

    def flags(self, key: str) -> list[bool] | None:
        """An array of bools, or None where the key is absent or one number."""
        value = self.file.metadata.get(self._prefix + key)
        if not isinstance(value, np.ndarray):
            return None
        if value.dtype != np.bool_:
            raise self.fail(key, f"must be bool[], found {self.file.type_of(self._prefix + key)}")
        return [bool(item) for item in value]

    def refuse_unsupported(self, neutral: dict[str, tuple[object, ...]]) -> None:
        """Refuse keys that change the arithmetic in a way that is not built.

        Args:
            neutral: key to the values that change nothing; a missing key is neutral too, and so is
                an array of such values.
        Raises: ConfigError: another value.
        """
        for key, allowed in neutral.items():
            value = self.file.metadata.get(self._prefix + key)
            if value is None:
                continue
            values = value.tolist() if isinstance(value, np.ndarray) else [value]
            if not all(isinstance(v, int | float) and v in allowed for v in values):
                raise self.fail(
                    key, f"= {one_line(value)} is not supported; use a model without it"
                )
