"""Choosing the next token from logits, exactly, and from as few of them as that takes.

In: the largest raw logits of each vocabulary shard, or all of them, and a request's settings. Out:
a token id, or None when the short form cannot prove its choice and the full logits are needed.
Numpy only; the noise is a function of (seed, sequence, position), so it does not depend on company.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import PromptError
from engine.host.messages import SamplingSettings

MAX_SEED = 2**64 - 1


def validate_sampling(settings: SamplingSettings) -> SamplingSettings:
    """Return the settings, or raise.

    Raises: PromptError: names the setting, its value and the rule it breaks.
    """
    rules = [
        ("temperature", settings.temperature, 0.0, 100.0, True),
        ("top_p", settings.top_p, 0.0, 1.0, False),
        ("repetition_penalty", settings.repetition_penalty, 0.0, 100.0, False),
    ]
    for name, value, low, high, is_low_allowed in rules:
        is_high_enough = value >= low if is_low_allowed else value > low
        if not (math.isfinite(value) and is_high_enough and value <= high):
            comparison = "at least" if is_low_allowed else "above"
            raise PromptError(
                f"{name} must be a number {comparison} {low:g} and at most {high:g}, "
                f"got {value:g}. Choose another --{name.replace('_', '-')}"
            )
    if not 0 <= settings.top_k <= 1 << 30:
        raise PromptError(f"top_k must be 0 (all tokens) or more, got {settings.top_k}")
    if settings.seed is not None and not 0 <= settings.seed <= MAX_SEED:
        raise PromptError(f"seed must be between 0 and {MAX_SEED}, got {settings.seed}")
    return settings


@dataclass(frozen=True, slots=True)
class Candidates:
    """Raw logits of some tokens, and what is known of the others.

    Attributes:
        ids: int64, unique.
        logits: float64, raw, in the order of `ids`.
        floor: no token outside `ids` has a larger raw logit; -inf when there is none outside.
        log_sum: log of the sum of exp(logit / temperature) over all tokens that the repetition
            penalty leaves alone.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float64]
    floor: float
    log_sum: float


@dataclass(frozen=True, slots=True)
class ShardLogits:
    """One vocabulary shard's short answer for one position.

    Attributes:
        ids, logits: its largest raw logits, descending.
        asked: raw logits of the ids it was asked for.
        log_sum: over the shard without `asked`, at the request's temperature.
        is_whole: whether `ids` is the whole shard.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    asked: Mapping[int, float]
    log_sum: float
    is_whole: bool


def merge_shards(shards: Collection[ShardLogits]) -> Candidates:
    """Put the shards' short answers together."""
    logits: dict[int, float] = {}
    floor = -math.inf
    for shard in shards:
        logits.update(zip(shard.ids.tolist(), shard.logits.tolist(), strict=True))
        logits.update(shard.asked)
        if not shard.is_whole:
            floor = max(floor, float(shard.logits[-1]))
    log_sum = float(np.logaddexp.reduce([shard.log_sum for shard in shards]))
    return Candidates(
        np.fromiter(logits.keys(), dtype=np.int64, count=len(logits)),
        np.fromiter(logits.values(), dtype=np.float64, count=len(logits)),
        floor,
        log_sum,
    )


def all_candidates(logits_V: NDArray[np.float32]) -> Candidates:
    """Candidates from the full logits of a position."""
    return Candidates(
        np.arange(logits_V.shape[0], dtype=np.int64), logits_V.astype(np.float64), -math.inf, 0.0
    )


def uniform(seed: int, sequence: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    key = b"".join(n.to_bytes(8, "little") for n in (seed, sequence, position))
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def choose(
    candidates: Candidates, settings: SamplingSettings, repeated: Collection[int], noise: float
) -> int | None:
    """The next token.

    Args:
        repeated: ids that the repetition penalty lowers; all of them must be candidates unless
            the penalty is 1.
        noise: uniform in [0, 1).
    Returns: the id, or None where tokens outside the candidates might matter, or where a logit is
        not a finite number.
    """
    if not np.isfinite(candidates.logits).all():
        return None
    adjusted = _penalise(candidates, settings.repetition_penalty, repeated)
    order = np.lexsort((candidates.ids, -adjusted))
    ordered = adjusted[order]
    # Down to here the order is the whole vocabulary's; a tie with the floor is not known.
    num_known = int(np.searchsorted(-ordered, -candidates.floor, side="left"))
    if settings.temperature == 0:
        return int(candidates.ids[order[0]]) if num_known else None
    is_all = math.isinf(candidates.floor)
    scaled = ordered / settings.temperature
    if settings.top_k:
        if settings.top_k > num_known and not is_all:
            return None
        scaled = scaled[: settings.top_k]
        weights = np.exp(scaled - scaled[0])
        cumulative = np.cumsum(weights) / weights.sum()
        is_all = True
    else:
        weights = np.exp(scaled - scaled[0])
        total = (
            weights.sum() if is_all else _total(candidates, adjusted, settings, repeated, scaled[0])
        )
        cumulative = np.cumsum(weights)[: None if is_all else num_known] / total
    if not cumulative.size:
        return None
    end = int(np.searchsorted(cumulative, settings.top_p, side="left"))
    if end < cumulative.size:
        mass = cumulative[end]
    elif is_all:
        mass = cumulative[-1]
    elif settings.top_p < 1:
        return None
    else:
        mass = 1.0
    index = int(np.searchsorted(cumulative, noise * mass, side="right"))
    if index >= cumulative.size:
        if not is_all:
            return None
        index = cumulative.size - 1  # Rounding at the very end of the sum.
    return int(candidates.ids[order[index]])


def _penalise(
    candidates: Candidates, penalty: float, repeated: Collection[int]
) -> NDArray[np.float64]:
    """Divide positive logits and multiply negative ones, so that a penalty never raises a token.

    Source: arXiv 1909.05858, with the sign rule that later implementations agree on.
    """
    if penalty == 1 or not repeated:
        return candidates.logits
    is_repeated = np.isin(candidates.ids, np.fromiter(repeated, dtype=np.int64))
    lowered = np.where(
        candidates.logits > 0, candidates.logits / penalty, candidates.logits * penalty
    )
    return np.where(is_repeated, lowered, candidates.logits)


def _total(
    candidates: Candidates,
    adjusted: NDArray[np.float64],
    settings: SamplingSettings,
    repeated: Collection[int],
    scaled_max: float,
) -> float:
    """Sum of exp(adjusted / temperature - scaled_max) over the whole vocabulary."""
    total = math.exp(min(candidates.log_sum - scaled_max, 700.0))
    if settings.repetition_penalty != 1 and repeated:
        is_repeated = np.isin(candidates.ids, np.fromiter(repeated, dtype=np.int64))
        total += float(np.exp(adjusted[is_repeated] / settings.temperature - scaled_max).sum())
    return total
