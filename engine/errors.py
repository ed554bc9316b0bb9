"""The errors that a person, a file or a peer can cause.

Every message has four parts in one line: what was asked, what was found, the limit, what to do.
A process border prints the message alone, never a traceback.
"""


class EngineError(Exception):
    """Base of everything below; `str(error)` is one line for a person."""


class CheckpointError(EngineError):
    """A model file is missing, damaged, foreign, or of an unsupported kind."""


class ConfigError(EngineError):
    """A model's or a user's configuration names a value that breaks a rule."""


class PromptError(EngineError):
    """A request cannot be served as asked: prompt, sampling settings, template."""


class PlanError(EngineError):
    """A plan does not fit the model or the devices."""


class ProtocolError(EngineError):
    """A peer broke the rules of the wire."""


class PeerRefused(EngineError):  # noqa: N818 - the domain's word
    """A peer is not trusted, or speaks another protocol version."""


class WorkerLost(EngineError):  # noqa: N818
    """A worker or runner died, hung, or cannot be reached.

    Attributes:
        device: whose runner it was, where that is known.
        link: two devices that live and cannot reach each other, where that is what was lost.
    """

    device: str | None = None
    link: tuple[str, str] | None = None


class CacheFull(EngineError):  # noqa: N818
    """A sequence needs more positions than its slot has."""


class Cancelled(EngineError):  # noqa: N818
    """The request was cancelled by its owner."""


def error_by_name(name: str, message: str) -> EngineError:
    """Rebuild an error that crossed a process border.

    Args:
        name: class name as sent; an unknown one becomes a plain EngineError.
        message: the one line.
    """
    for kind in EngineError.__subclasses__():
        if kind.__name__ == name:
            return kind(message)
    return EngineError(message)


def one_line(text: str, limit: int = 300) -> str:
    """Text of a peer or a file, fit for an error or a log: printable, one line, not for ever."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]
