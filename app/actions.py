"""What can be done from the menus, as data: names, shortcuts, places.

In: nothing. Out: a table from which the window makes its menus. Who does it is the window's
business: every action names one of its methods.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """One menu entry.

    Attributes:
        name: object name of the action, and key for enabling it.
        handler: name of the window's method that does it.
        shortcut: in Qt's portable form; empty for none.
        group: entries of one menu with different groups are divided by a line.
        is_choice: whether it is one of several of which one is checked.
    """

    menu: str
    name: str
    title: str
    handler: str
    shortcut: str = ""
    group: int = 0
    is_choice: bool = False


ACTIONS = (
    ActionSpec("File", "openFile", "Open model file…", "_on_open_file", "Ctrl+O"),
    ActionSpec("File", "openFolder", "Open model folder…", "_on_open_folder", "Ctrl+Shift+O"),
    ActionSpec("File", "openDefault", "Open the default model", "_on_open_default"),
    ActionSpec("File", "quit", "Quit", "_on_quit", "Ctrl+Q", 1),
    ActionSpec("Chat", "newChat", "New chat", "_on_new_chat", "Ctrl+N"),
    ActionSpec("Chat", "stop", "Stop the answer", "_on_stop", "Esc"),
    ActionSpec("Chat", "regenerate", "Answer again", "_on_regenerate", "Ctrl+R"),
    ActionSpec("Chat", "parameters", "Parameters", "_on_parameters", "Ctrl+P", 1),
    ActionSpec("Split", "undo", "Undo", "_on_undo", "Ctrl+Z"),
    ActionSpec("Split", "redo", "Redo", "_on_redo", "Ctrl+Y"),
    ActionSpec("Split", "apply", "Apply the draft", "_on_apply", "Ctrl+Return", 1),
    ActionSpec("Split", "revert", "Revert the draft", "_on_revert", "", 1),
    ActionSpec("Split", "loadAgain", "Load the last split again", "_on_load_again", "", 2),
    ActionSpec("View", "showChat", "Chat", "_on_show_chat", "Ctrl+1"),
    ActionSpec("View", "showCluster", "Cluster", "_on_show_cluster", "Ctrl+2"),
    ActionSpec("View", "showSplit", "Split", "_on_show_split", "Ctrl+3"),
    ActionSpec("View", "showMonitor", "Monitor", "_on_show_monitor", "Ctrl+4"),
    ActionSpec("View", "themeSystem", "Theme as the desktop", "_on_theme_system", "", 1, True),
    ActionSpec("View", "themeLight", "Light theme", "_on_theme_light", "", 1, True),
    ActionSpec("View", "themeDark", "Dark theme", "_on_theme_dark", "", 1, True),
    ActionSpec("View", "largerText", "Larger text", "_on_larger_text", "Ctrl++", 2),
    ActionSpec("View", "smallerText", "Smaller text", "_on_smaller_text", "Ctrl+-", 2),
    ActionSpec("View", "defaultText", "Default text size", "_on_default_text", "Ctrl+0", 2),
)
MENUS = ("File", "Chat", "Split", "View")
