"""Progress as one bar and one line, with the time left once that can be told. No Qt."""

from __future__ import annotations

from collections.abc import Mapping

from app.figures import figure_bytes, figure_percent, figure_seconds
from engine.host.messages import Progress

ETA_AFTER_SECONDS = 3.0
BAR_STEPS = 1000
_PHASE_WORDS = {
    "fetch": "Fetching the model",
    "start": "Starting the computing processes",
    "weights": "Loading weights",
    "connect": "Connecting the devices",
    "prefill": "Reading the prompt",
}


def overall(progress: Mapping[str, Progress]) -> Progress | None:
    """All devices' progress as one; None where nothing is known yet."""
    states = list(progress.values())
    if len(states) < 2:
        return states[0] if states else None
    weights = [state for state in states if state.phase == "weights"]
    return Progress(
        request_id=weights[0].request_id,
        phase="weights",
        subject="",
        done=sum(state.done for state in weights),
        total=sum(state.total for state in weights),
    )


def bar_range(progress: Progress | None) -> tuple[int, int]:
    """Upper end and value of a progress bar; an end of 0 means unknown.

    A model's bytes do not fit the 32 bits of Qt's bars, so these are thousandths.
    """
    if progress is None or not progress.total:
        return 0, 0
    return BAR_STEPS, round(BAR_STEPS * progress.done / progress.total)


class ProgressText:
    """Progress in words, with the time left once it can be told."""

    def __init__(self) -> None:
        """Nothing runs."""
        self._key: tuple[str, str] | None = None
        self._started = 0.0
        self._first_done = 0

    def describe(self, progress: Progress, now: float) -> str:
        """Such as "fetching the model 42 % · 41.3 of 98.4 MB · about 4.2 s left"."""
        key = (progress.phase, progress.subject)
        if key != self._key:
            self._key, self._started, self._first_done = key, now, progress.done
        words = _PHASE_WORDS[progress.phase]
        if not progress.total:
            return words
        if progress.phase in ("start", "connect"):
            return f"{words}  {progress.done} of {progress.total}"
        text = f"{words}  {figure_percent(round(progress.done / progress.total, 2))}"
        if progress.phase in ("fetch", "weights"):
            text += f" · {figure_bytes(progress.done)} of {figure_bytes(progress.total)}"
        spent, moved = now - self._started, progress.done - self._first_done
        if spent > ETA_AFTER_SECONDS and moved > 0:
            left = (progress.total - progress.done) * spent / moved
            text += f" · about {figure_seconds(left)} left"
        return text
