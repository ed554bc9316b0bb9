"""Puts the window together and takes it apart again.

In: start options and the settings file. Out: an exit code. The order of the start is the order of
the lines of `Desk.__init__`; the end is its reverse, and leaves no process behind.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pyqtgraph as pg
from PySide6.QtCore import QObject, QSocketNotifier
from PySide6.QtWidgets import QApplication

from app.bridge import Bridge, Client
from app.look import Look
from app.session import Session
from app.settings import Settings
from app.stages import StartOptions
from app.window import MainWindow
from engine.client import EngineClient

EXIT_INTERRUPTED = 130


class Desk(QObject):
    """One window with its engine."""

    def __init__(
        self,
        options: StartOptions,
        settings: Settings,
        make_client: Callable[[], Client] = EngineClient,
    ) -> None:
        """Builds everything and shows the window; the engine starts in its own thread."""
        super().__init__()
        pg.setConfigOptions(antialias=True)
        self.look = Look(settings, self)
        self.look.apply()
        self.bridge = Bridge(make_client, self)
        self.session = Session(self.bridge, options, self)
        self.window = MainWindow(self.session, self.look, settings)
        self.bridge.engine_started.connect(self.session.engine_started)
        self.bridge.events_arrived.connect(self.session.hear)
        self.bridge.engine_lost.connect(self.session.engine_lost)
        self._is_closed = False

    def start(self) -> None:
        """Show the window and start the engine."""
        self.window.show()
        self.window.show_page(0)
        self.session.start()

    def close(self) -> None:
        """Close the window, end the engine; returns when all its processes are gone."""
        if self._is_closed:
            return
        self._is_closed = True
        self.window.close()
        self.bridge.close()


class SignalWatch(QObject):
    """Turns Ctrl+C and SIGTERM into the end of the event loop."""

    def __init__(self, parent: QObject) -> None:
        """Takes over both signals; the main thread must make it."""
        super().__init__(parent)
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        # Python runs its handlers only between bytecodes, and Qt's loop has none: the byte that
        # a signal writes wakes the loop.
        signal.set_wakeup_fd(self._writer.fileno())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _ignore_here)
        self._notifier = QSocketNotifier(self._reader.fileno(), QSocketNotifier.Type.Read, self)
        self._notifier.activated.connect(self._on_signal)

    def close(self) -> None:
        """Give the signals back."""
        self._notifier.setEnabled(False)
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()

    def _on_signal(self) -> None:
        numbers = self._reader.recv(64)
        QApplication.exit(EXIT_INTERRUPTED if signal.SIGINT in numbers else 0)


def run(options: StartOptions, settings_path: Path) -> int:
    """Show the window until it is closed.

    Returns: the exit code.
    """
    application = make_application()
    watch = SignalWatch(application)
    desk = Desk(options, Settings(settings_path))
    application.aboutToQuit.connect(desk.close)
    try:
        desk.start()
        return application.exec()
    finally:
        desk.close()
        watch.close()


def make_application() -> QApplication:
    """The application object, in Qt's own style so that it looks the same everywhere."""
    existing = QApplication.instance()
    application = existing if isinstance(existing, QApplication) else QApplication(sys.argv[:1])
    application.setApplicationName("Shardmix")
    application.setDesktopFileName("shardmix")
    application.setStyle("Fusion")
    return application


def _ignore_here(number: int, frame: object) -> None:
    """The wake-up byte does the work."""
    del number, frame
