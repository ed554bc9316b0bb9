"""The one place that knows how the window looks now, and tells the views when that changes.

In: the person's choices and the desktop's light or dark setting. Out: the current `Theme`, the
application's palette, font and style sheet.
"""

from __future__ import annotations

import qtawesome
from PySide6.QtCore import QObject, Qt, Signal
from PySide6.QtGui import QFont, QGuiApplication, QIcon
from PySide6.QtWidgets import QApplication

from app.settings import Settings
from app.theme import ThemeChoice, make_palette, make_style_sheet, make_theme, tabular

ICONS = {
    "chat": "ph.chat-circle-text",
    "cluster": "ph.desktop-tower",
    "split": "ph.sliders-horizontal",
    "monitor": "ph.chart-line",
    "send": "ph.paper-plane-right",
    "stop": "ph.stop",
    "new": "ph.plus",
    "parameters": "ph.faders",
    "down": "ph.arrow-down",
    "lock": "ph.lock-simple",
    "unlock": "ph.lock-simple-open",
    "add": "ph.plus-circle",
    "copy": "ph.copy",
    "warning": "ph.warning",
    "folder": "ph.folder-open",
    "file": "ph.file",
    "undo": "ph.arrow-counter-clockwise",
    "redo": "ph.arrow-clockwise",
    "again": "ph.arrow-clockwise",
    "computer": "ph.desktop",
    "simulated": "ph.copy-simple",
    "chip": "ph.cpu",
    "process": "ph.terminal-window",
    "state discovered": "ph.broadcast",
    "state pairing": "ph.handshake",
    "state starting": "ph.hourglass-medium",
    "state ready": "ph.check-circle",
    "state loading": "ph.download-simple",
    "state busy": "ph.lightning",
    "state stale": "ph.clock",
    "state lost": "ph.x-circle",
    "pair": "ph.handshake",
    "close": "ph.x",
    "expand": "ph.caret-right",
    "collapse": "ph.caret-down",
}


class Look(QObject):
    """Theme and text size of the whole application."""

    theme_changed = Signal()

    def __init__(self, settings: Settings, parent: QObject | None = None) -> None:
        """Reads the choices; `apply` makes them visible."""
        super().__init__(parent)
        self._settings = settings
        self._system_font = QFont(QApplication.font())
        self.theme = make_theme(self._wants_dark(), settings.base_font_px)
        QGuiApplication.styleHints().colorSchemeChanged.connect(self._on_color_scheme_changed)

    @property
    def choice(self) -> ThemeChoice:
        """What the person chose."""
        return self._settings.theme

    def choose(self, choice: ThemeChoice) -> None:
        """Light, dark, or as the desktop."""
        self._settings.theme = choice
        self.apply()

    def change_text_size(self, pixels: int) -> None:
        """Make all text larger or smaller; 0 returns to the default."""
        if pixels:
            self._settings.base_font_px = self._settings.base_font_px + pixels
        else:
            self._settings.base_font_px = make_theme(False).base_px
        self.apply()

    def apply(self) -> None:
        """Give the application its palette, font and style sheet."""
        self.theme = make_theme(self._wants_dark(), self._settings.base_font_px)
        font = tabular(self._system_font)
        font.setPixelSize(self.theme.font_px(0))
        application = QApplication.instance()
        assert isinstance(application, QApplication), "a window needs its application"
        application.setFont(font)
        application.setPalette(make_palette(self.theme))
        application.setStyleSheet(make_style_sheet(self.theme))
        self.theme_changed.emit()

    def icon(self, name: str, role: str = "text_muted", checked_role: str = "accent") -> QIcon:
        """A line icon in the colours of roles."""
        colours = {
            "color": self.theme.colour(role),
            "color_disabled": self.theme.colour("line"),
            "color_on": self.theme.colour(checked_role),
        }
        return qtawesome.icon(ICONS[name], **colours)

    def _wants_dark(self) -> bool:
        if self._settings.theme != "system":
            return self._settings.theme == "dark"
        return QGuiApplication.styleHints().colorScheme() == Qt.ColorScheme.Dark

    def _on_color_scheme_changed(self) -> None:
        if self._settings.theme == "system":
            self.apply()
