"""What a request for an answer may ask, checked before anything is computed.

In: a call as it came from a window, a command line or a program. Out: the same call, or one error
that names the setting, what was found and the rule. Lengths of prompts are checked where the KV
window is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from engine.errors import PromptError
from engine.host.messages import Generate, SamplingSettings

MAX_SEED = 2**64 - 1
MAX_BATCH_INDEX = 2**32 - 1
MAX_TOP_K = 1 << 30
MAX_TOKENS = 1 << 24
MAX_BIASES = 1024
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_STOP_IDS = 256
MAX_SEQUENCE_IDS = 64
MAX_LOGPROBS = 20
# Finished carries them in one header of at most 4 MiB; a figure takes up to 15 bytes.
MAX_LOGPROB_FIGURES = 200_000


def check_sampling(settings: SamplingSettings, vocab_size: int | None = None) -> None:
    """Check how tokens are chosen.

    Args:
        vocab_size: of the model, where it is known.
    Raises: PromptError: names the setting, its value and the rule it breaks.
    """
    temperature = settings.temperature
    if not (math.isfinite(temperature) and 0 <= temperature <= 100):
        raise _broken("temperature", "a number at least 0 and at most 100", temperature)
    if not (math.isfinite(settings.top_p) and 0 < settings.top_p <= 1):
        raise _broken("top_p", "a number above 0 and at most 1", settings.top_p)
    ranges = [
        # Far from numbers at which a logit overflows.
        ("repetition_penalty", settings.repetition_penalty, 0.01, 100.0),
        ("min_p", settings.min_p, 0.0, 1.0),
        ("presence_penalty", settings.presence_penalty, -2.0, 2.0),
        ("frequency_penalty", settings.frequency_penalty, -2.0, 2.0),
    ]
    for name, value, low, high in ranges:
        if not (math.isfinite(value) and low <= value <= high):
            raise _broken(name, f"a number from {low:g} to {high:g}", value)
    _check_count("top_k", settings.top_k, MAX_TOP_K, "0 takes all tokens")
    if settings.seed is not None:
        _check_count("seed", settings.seed, MAX_SEED, "choose another, or leave it out")
    _check_biases(settings.logit_bias, vocab_size)


def check_request(call: Generate, vocab_size: int | None = None) -> None:
    """Check everything that a request for an answer asks, but its prompt.

    Args:
        vocab_size: of the model, where it is known.
    Raises: PromptError: names the setting, its value and the rule it breaks.
    """
    check_sampling(call.sampling, vocab_size)
    _check_count("max_tokens", call.max_tokens, MAX_TOKENS, "0 sets no limit")
    _check_count("min_tokens", call.min_tokens, MAX_TOKENS, "0 asks for none")
    _check_count("batch_index", call.batch_index, MAX_BATCH_INDEX, "number a batch from 0")
    if call.max_tokens and call.min_tokens > call.max_tokens:
        raise PromptError(
            f"min_tokens {call.min_tokens} is more than max_tokens {call.max_tokens}; "
            "an answer cannot be both. Lower one, or raise the other"
        )
    _check_stops(call, vocab_size)
    if call.logprobs is not None:
        _check_count("logprobs", call.logprobs, MAX_LOGPROBS, "the likeliest tokens to report")


def check_logprobs_fit(logprobs: int | None, max_tokens: int) -> None:
    """Check that the logprobs of an answer can be told.

    Args:
        max_tokens: the longest that the answer can get.
    Raises: PromptError: there would be too many.
    """
    if logprobs is None:
        return
    limit = MAX_LOGPROB_FIGURES // (logprobs + 2)
    if max_tokens > limit:
        raise PromptError(
            f"logprobs {logprobs} of an answer of up to {max_tokens:,} tokens are too many, with "
            f"{logprobs} it may have {limit:,}. Lower max_tokens or logprobs"
        )


def check_ids(ids: Iterable[int], vocab_size: int | None, what: str = "token id") -> None:
    """Check token ids.

    Args:
        vocab_size: None checks only that none is negative.
    Raises: PromptError: names the first that is not in the vocabulary.
    """
    for i in ids:
        if i < 0 or (vocab_size is not None and i >= vocab_size):
            where = (
                f"the vocabulary of {vocab_size:,} (0 to {vocab_size - 1})"
                if vocab_size is not None
                else "any vocabulary (ids begin at 0)"
            )
            raise PromptError(f"{what} {i} is not in {where}. Choose another id")


def _broken(name: str, rule: str, value: float) -> PromptError:
    return PromptError(
        f"{name} must be {rule}, got {value:g}. Choose another --{name.replace('_', '-')}"
    )


def _check_count(name: str, value: int, limit: int, hint: str) -> None:
    if not 0 <= value <= limit:
        raise PromptError(
            f"{name} must be a whole number from 0 to {limit}, got {_short(value)} ({hint})"
        )


def _short(value: int) -> str:
    """A number as text; Python refuses to write out those of thousands of digits."""
    return str(value) if abs(value) < 10**40 else "one of more than 40 digits"


def _check_biases(biases: tuple[tuple[int, float], ...], vocab_size: int | None) -> None:
    if len(biases) > MAX_BIASES:
        raise PromptError(
            f"logit_bias names {len(biases):,} tokens, at most {MAX_BIASES:,} are taken. "
            "Leave some out"
        )
    seen: set[int] = set()
    for i, value in biases:
        check_ids([i], vocab_size, "logit_bias: token id")
        if i in seen:
            raise PromptError(f"logit_bias names token {i} twice; give it one bias")
        seen.add(i)
        if not (math.isfinite(value) and -100 <= value <= 100):
            raise PromptError(
                f"logit_bias of token {i} must be a number from -100 to 100, got {value:g}. "
                "Choose another --logit-bias"
            )


def _check_stops(call: Generate, vocab_size: int | None) -> None:
    counts = [
        ("stop texts", len(call.stop), MAX_STOPS),
        ("stop ids", len(call.stop_ids), MAX_STOP_IDS),
        ("stop sequences", len(call.stop_sequences), MAX_STOPS),
    ]
    for what, count, limit in counts:
        if count > limit:
            raise PromptError(f"{count:,} {what}, at most {limit} are taken. Leave some out")
    longest = max((len(stop) for stop in call.stop), default=0)
    if longest > MAX_STOP_CHARACTERS:
        raise PromptError(
            f"a stop text has {longest:,} characters, at most {MAX_STOP_CHARACTERS:,} are taken. "
            "Shorten it"
        )
    check_ids(call.stop_ids, vocab_size, "stop id")
    for sequence in call.stop_sequences:
        if not 1 <= len(sequence) <= MAX_SEQUENCE_IDS:
            raise PromptError(
                f"a stop sequence has {len(sequence):,} ids, it must have 1 to {MAX_SEQUENCE_IDS}. "
                "Change or drop it"
            )
        check_ids(sequence, vocab_size, "stop sequence: token id")
