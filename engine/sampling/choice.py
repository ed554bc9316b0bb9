"""Choosing the next token from logits, exactly, and from as few of them as that takes.

In: the largest raw logits of each vocabulary shard, or all of them, and a request's settings. Out:
a token id, or None when the short form cannot prove its choice and the full logits are needed.
Numpy only; the noise is a function of (seed, sequence, position), so it does not depend on company.

Every filter keeps a beginning of the tokens in falling order of their changed logits, so all of
them together come down to one number: how many tokens stay.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.host.messages import TokenLogprobs
from engine.sampling.logit_changes import LogitChanges

# Sums over shards and sums over all tokens round differently, by less than this share of the whole
# for vocabularies of millions. A choice this close to the border of two tokens is not proven.
BORDER_MARGIN = 1e-9


class Filters(Protocol):
    """What decides how a token is drawn, as `SamplingSettings` says."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Candidates:
    """Raw logits of some tokens, and what is known of the others.

    Attributes:
        ids: int64, unique.
        logits: float64, raw, in the order of `ids`.
        floor: no token outside `ids` has a larger raw logit; -inf when there is none outside.
        log_sum: log of the sum of exp(logit / temperature) over all tokens that the request does
            not change.
        raw_log_sum: log of the sum of exp(logit) over all tokens; 0 where nobody asked.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float64]
    floor: float
    log_sum: float
    raw_log_sum: float = 0.0

    @property
    def is_all(self) -> bool:
        """Whether `ids` is the whole vocabulary."""
        return self.floor == -math.inf


@dataclass(frozen=True, slots=True)
class ShardLogits:
    """One vocabulary shard's short answer for one position.

    Attributes:
        ids, logits: its largest raw logits, descending.
        asked: raw logits of the ids it was asked for.
        log_sum: over the shard without `asked`, at the request's temperature.
        is_whole: whether `ids` is the whole shard.
        raw_log_sum: over the whole shard at temperature 1; 0 where nobody asked.
    """

    ids: Sequence[int]
    logits: Sequence[float]
    asked: Mapping[int, float]
    log_sum: float
    is_whole: bool
    raw_log_sum: float = 0.0


def merge_shards(shards: Collection[ShardLogits]) -> Candidates:
    """Put the shards' short answers together."""
    logits: dict[int, float] = {}
    floor = -math.inf
    for shard in shards:
        logits.update(zip(shard.ids, shard.logits, strict=True))
        logits.update(shard.asked)
        if not shard.is_whole:
            floor = max(floor, shard.logits[-1])
    return Candidates(
        np.fromiter(logits.keys(), dtype=np.int64, count=len(logits)),
        np.fromiter(logits.values(), dtype=np.float64, count=len(logits)),
        floor,
        _log_of_sum([shard.log_sum for shard in shards]),
        _log_of_sum([shard.raw_log_sum for shard in shards]),
    )


def _log_of_sum(logs: Sequence[float]) -> float:
    return logs[0] if len(logs) == 1 else float(np.logaddexp.reduce(logs))


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
    candidates: Candidates, settings: Filters, changes: LogitChanges, noise: float
) -> int | None:
    """The next token.

    Args:
        settings: valid; `SamplingSettings` says in which order they apply.
        changes: of the logits; all their ids must be candidates.
        noise: uniform in [0, 1).
    Returns: the id, or None where tokens outside the candidates might matter, or where a logit is
        not a finite number. From all tokens None is only given for the latter.
    """
    if not np.isfinite(candidates.logits).all():
        return None
    changed = changes.apply(candidates.ids, candidates.logits)
    if settings.temperature == 0:
        return _likeliest(candidates, changed)
    order = np.lexsort((candidates.ids, -changed))
    ordered = changed[order]
    # Down to here the order is the whole vocabulary's; a tie with the floor is not known.
    num_known = int(np.searchsorted(-ordered, -candidates.floor, side="left"))
    if candidates.is_all:
        num_known = ordered.size
    if not num_known or ordered[0] == -math.inf:
        return None
    if settings.top_k > num_known and not candidates.is_all:
        return None
    with np.errstate(over="ignore"):  # A tiny temperature leaves nothing but the likeliest token.
        scaled = (ordered[:num_known] - ordered[0]) / settings.temperature
    is_whole = candidates.is_all or settings.top_k > 0
    scaled = scaled[: settings.top_k or None]
    total: float | None = None
    margin = 0.0 if candidates.is_all else BORDER_MARGIN
    if not is_whole:
        largest = float(ordered[0]) / settings.temperature
        margin += 1e-15 * abs(largest)  # The rounding of a large exponent.
        total = _total(candidates, changed, settings.temperature, changes, largest)
    outside = (candidates.floor - float(ordered[0])) / settings.temperature
    index = _draw(_Ordered(scaled, is_whole, outside, total, margin), settings, noise)
    return None if index is None else int(candidates.ids[order[index]])


def _likeliest(candidates: Candidates, changed: NDArray[np.float64]) -> int | None:
    """The token with the largest changed logit, of equals the first; None as of `choose`."""
    largest = changed.max(initial=-math.inf)
    # A tie with the floor is not known.
    if largest == -math.inf or not (candidates.is_all or largest > candidates.floor):
        return None
    return int(candidates.ids[changed == largest].min())


def token_logprobs(candidates: Candidates, token_id: int, num_top: int) -> TokenLogprobs | None:
    """How likely a token was in the model's own distribution, and which were the likeliest.

    Args:
        candidates: with `raw_log_sum`, or all of them.
        token_id: one of the candidates.
    Returns: None where tokens outside the candidates might be among the likeliest.
    """
    ids, logits = candidates.ids, candidates.logits
    order = np.lexsort((ids, -logits))[:num_top]
    is_known = logits[order] > candidates.floor
    if not candidates.is_all and (order.size < num_top or not is_known.all()):
        return None
    log_sum = candidates.raw_log_sum
    if candidates.is_all:
        largest = float(logits.max())
        log_sum = largest + math.log(float(np.exp(logits - largest).sum()))
    chosen = float(logits[ids == token_id][0])
    top = tuple((int(ids[i]), float(logits[i]) - log_sum) for i in order)
    return TokenLogprobs(logprob=chosen - log_sum, top=top)


@dataclass(frozen=True, slots=True)
class _Ordered:
    """Tokens in falling order of their changed logits.

    Attributes:
        scaled: (changed logit - the largest) / temperature.
        is_whole: whether the filters to come have no other tokens to choose among.
        outside: no other token has a larger `scaled`.
        total: sum of exp over all tokens, where `is_whole` is false.
        margin: a share of the mass by which another way of adding might move a border.
    """

    scaled: NDArray[np.float64]
    is_whole: bool
    outside: float
    total: float | None
    margin: float


def _draw(tokens: _Ordered, settings: Filters, noise: float) -> int | None:
    """Place of the chosen token, or None where that is not proven."""
    scaled = tokens.scaled
    cumulative = np.cumsum(np.exp(scaled))
    total = float(cumulative[-1]) if tokens.total is None else tokens.total
    # How many tokens stay; None: more than these.
    num_kept = scaled.size if tokens.is_whole else None
    if settings.min_p > 0:
        # Compared as logarithms, so that the kept set does not hang on how exp rounds.
        lowest = math.log(settings.min_p)
        if tokens.is_whole or tokens.outside < lowest:
            num_kept = int(np.count_nonzero(scaled >= lowest))
        elif settings.top_p == 1:
            return None
    if settings.top_p < 1:
        shares = cumulative / total
        if _is_near(shares, settings.top_p, tokens.margin):
            return None
        nucleus = int(np.searchsorted(shares, settings.top_p, side="left")) + 1
        if nucleus <= shares.size:
            # Where min-p's cut is not proven it lies past the tokens at hand, so past this one.
            num_kept = nucleus if num_kept is None else min(num_kept, nucleus)
        elif num_kept is None:
            return None
    mass = total if num_kept is None else float(cumulative[num_kept - 1])
    borders = cumulative[:num_kept] / mass
    if _is_near(borders, noise, tokens.margin):
        return None
    index = int(np.searchsorted(borders, noise, side="right"))
    return index if index < borders.size else None


def _is_near(borders: NDArray[np.float64], value: float, margin: float) -> bool:
    """Whether a border might lie on the other side of a value."""
    return bool(margin) and bool((np.abs(borders - value) <= margin).any())


def _total(
    candidates: Candidates,
    changed: NDArray[np.float64],
    temperature: float,
    changes: LogitChanges,
    largest: float,
) -> float:
    """Sum of exp(changed / temperature - largest) over the whole vocabulary."""
    if not math.isfinite(largest):
        return math.inf  # The margin is infinite too: nothing is proven.
    total = math.exp(min(candidates.log_sum - largest, 700.0))
    touched = changed[changes.touches(candidates.ids)]
    with np.errstate(over="ignore"):  # To -inf, whose share is 0 anyway.
        return total + float(np.exp(touched / temperature - largest).sum())
