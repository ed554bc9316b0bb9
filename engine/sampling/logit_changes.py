"""What a request changes of the raw logits at one position: bias, penalties, forbidden tokens.

In: the settings and the tokens so far. Out: the ids concerned, and a function of raw logits that
changes those and no others. It knows nothing of temperature and filters; both roads of the sampler
(short form and full logits) use the same function.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.host.messages import SamplingSettings


@dataclass(frozen=True, slots=True)
class LogitChanges:
    """See the module.

    Attributes:
        ids: int64, ascending, unique: every token whose logit may change.
        bias: float64, added first, in the order of `ids`.
        is_repeated: bool, whether the repetition penalty lowers the token.
        repetition_penalty: > 0.
        subtracted: float64, taken off last; inf forbids the token.
    """

    ids: NDArray[np.int64]
    bias: NDArray[np.float64]
    is_repeated: NDArray[np.bool_]
    repetition_penalty: float
    subtracted: NDArray[np.float64]

    def touches(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `ids` may have another logit than the model gave."""
        return np.isin(ids, self.ids)

    def apply(self, ids: NDArray[np.int64], logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """The changed logits.

        Args:
            ids: int64 [N], unique.
            logits: float64 [N], raw, finite.
        Returns: float64 [N]; -inf for a forbidden token, untouched ids bit for bit as they were.
        Source: repetition penalty of arXiv 1909.05858 with the sign rule that later
            implementations agree on, so that it never raises a token; presence and frequency
            penalty as the OpenAI API defines them.
        """
        if not self.ids.size:
            return logits
        at = np.minimum(np.searchsorted(self.ids, ids), self.ids.size - 1)
        where = np.flatnonzero(self.ids[at] == ids)
        at = at[where]
        values = logits[where] + self.bias[at]
        penalty = self.repetition_penalty
        lowered = np.where(values > 0, values / penalty, values * penalty)
        changed = logits.copy()
        changed[where] = np.where(self.is_repeated[at], lowered, values) - self.subtracted[at]
        return changed


NO_CHANGES = LogitChanges(
    np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0, dtype=np.bool_), 1.0, np.zeros(0)
)


def logit_changes(
    settings: SamplingSettings, ids: Sequence[int], num_prompt: int, forbidden: Collection[int] = ()
) -> LogitChanges:
    """What a request changes of the next token's logits.

    Args:
        settings: valid.
        ids: prompt, then the answer so far. The repetition penalty looks at both, presence and
            frequency penalty at the answer alone.
        num_prompt: tokens of the prompt.
        forbidden: ids that may not be chosen.
    """
    bias = dict(settings.logit_bias)
    repeated = set(ids) if settings.repetition_penalty != 1 else set[int]()
    presence, frequency = settings.presence_penalty, settings.frequency_penalty
    counts = Counter(ids[num_prompt:]) if presence or frequency else Counter[int]()
    subtracted = {i: presence + frequency * count for i, count in counts.items()}
    subtracted.update(dict.fromkeys(forbidden, math.inf))
    touched = sorted({*bias, *repeated, *subtracted})
    return LogitChanges(
        np.array(touched, dtype=np.int64),
        np.array([bias.get(i, 0.0) for i in touched], dtype=np.float64),
        np.array([i in repeated for i in touched], dtype=np.bool_),
        settings.repetition_penalty,
        np.array([subtracted.get(i, 0.0) for i in touched], dtype=np.float64),
    )
