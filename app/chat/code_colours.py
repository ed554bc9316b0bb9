"""Colours of code: which run of characters has which role. No Qt."""

from __future__ import annotations

from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Keyword, Literal, Name, Number, Operator, String, _TokenType
from pygments.util import ClassNotFound

MAX_COLOURED_CHARS = 50_000
_ROLES: tuple[tuple[_TokenType, str], ...] = (
    (Comment, "text_muted"),
    (Keyword, "accent"),
    (Operator.Word, "accent"),
    (Name.Builtin, "accent"),
    (Name.Tag, "accent"),
    (Name.Function, "warning"),
    (Name.Class, "warning"),
    (Name.Decorator, "warning"),
    (String, "good"),
    (Number, "bad"),
    (Literal, "good"),
)


def coloured_runs(language: str, text: str) -> list[tuple[str, str]]:
    """Split code into runs with the theme role of each.

    Args:
        language: as the fence names it; an unknown one leaves the code plain.
    Returns: pairs (text, role) whose texts join to the code again.
    """
    if not language or len(text) > MAX_COLOURED_CHARS:
        return [(text, "text")]
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return [(text, "text")]
    runs: list[tuple[str, str]] = []
    for kind, value in lexer.get_tokens(text):
        role = _role(kind)
        if runs and runs[-1][1] == role:
            runs[-1] = (runs[-1][0] + value, role)
        elif value:
            runs.append((value, role))
    return runs if "".join(run for run, _ in runs) == text else [(text, "text")]


def _role(kind: _TokenType) -> str:
    for known, role in _ROLES:
        if kind in known:
            return role
    return "text"
