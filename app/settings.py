"""What the window remembers between runs: its place, its theme, its text size, the last model.

A small INI file in the user's configuration folder; a damaged or missing one gives the defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import platformdirs
from PySide6.QtCore import QByteArray, QSettings

from app.theme import BASE_FONT_PX, ThemeChoice

MIN_FONT_PX = 10
MAX_FONT_PX = 22


def default_settings_path() -> Path:
    """Where the settings file lies."""
    return platformdirs.user_config_path("shardmix", appauthor=False) / "window.ini"


class Settings:
    """Typed access to the settings file."""

    def __init__(self, path: Path) -> None:
        """Args: path: of the INI file; made at the first change."""
        self._store = QSettings(str(path), QSettings.Format.IniFormat)

    @property
    def geometry(self) -> QByteArray | None:
        """The window's place and size, as Qt saved it."""
        value = self._store.value("window/geometry")
        return value if isinstance(value, QByteArray) else None

    @geometry.setter
    def geometry(self, value: QByteArray) -> None:
        self._store.setValue("window/geometry", value)

    @property
    def theme(self) -> ThemeChoice:
        """The chosen theme; "system" follows the desktop."""
        value = self._store.value("window/theme")
        return cast("ThemeChoice", value) if value in ("light", "dark") else "system"

    @theme.setter
    def theme(self, value: ThemeChoice) -> None:
        self._store.setValue("window/theme", value)

    @property
    def base_font_px(self) -> int:
        """Size of body text in pixels."""
        try:
            value = int(str(self._store.value("window/base_font_px", BASE_FONT_PX)))
        except ValueError:
            return BASE_FONT_PX
        return min(max(value, MIN_FONT_PX), MAX_FONT_PX)

    @base_font_px.setter
    def base_font_px(self, value: int) -> None:
        self._store.setValue("window/base_font_px", min(max(value, MIN_FONT_PX), MAX_FONT_PX))

    @property
    def last_model(self) -> str | None:
        """Path of the model that was opened last; None means the default model."""
        value = self._store.value("model/path")
        return value if isinstance(value, str) and value else None

    @last_model.setter
    def last_model(self, value: str | None) -> None:
        self._store.setValue("model/path", value or "")

    def save(self) -> None:
        """Write what changed."""
        self._store.sync()
