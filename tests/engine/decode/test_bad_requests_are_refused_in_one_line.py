"""Whatever a request asks that cannot be served, one line names it, what was found and the rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cluster.codec import Codec
from engine.decode.request_rules import (
    MAX_LOGPROB_FIGURES,
    check_ids,
    check_logprobs_fit,
    check_request,
    check_sampling,
)
from engine.errors import PromptError
from engine.host.messages import EVENTS, Finished, Generate, SamplingSettings, TokenLogprobs
from engine.plan.plan import PlanShape
from engine.plan.presets import single

VOCABULARY = 99

BAD_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1.0}, "temperature must be a number at least 0 and at most 100, got -1"),
    ({"temperature": math.nan}, "temperature must be .* got nan"),
    ({"temperature": math.inf}, "temperature must be .* got inf"),
    ({"temperature": 1e9}, "temperature must be"),
    ({"top_p": 2.0}, "top_p must be a number above 0 and at most 1, got 2"),
    ({"top_p": 0.0}, "top_p must be"),
    ({"top_p": math.nan}, "top_p must be"),
    ({"top_k": -1}, "top_k must be a whole number from 0 to .* got -1"),
    ({"top_k": 2**31}, "top_k must be"),
    ({"min_p": -0.1}, "min_p must be a number from 0 to 1, got -0.1"),
    ({"min_p": 1.5}, "min_p must be"),
    ({"min_p": math.nan}, "min_p must be"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be a number from 0.01 to 100, got 0"),
    ({"repetition_penalty": -1.3}, "repetition_penalty must be"),
    ({"repetition_penalty": math.inf}, "repetition_penalty must be"),
    ({"presence_penalty": 2.1}, "presence_penalty must be a number from -2 to 2, got 2.1"),
    ({"presence_penalty": math.nan}, "presence_penalty must be"),
    ({"frequency_penalty": -2.1}, "frequency_penalty must be a number from -2 to 2"),
    ({"frequency_penalty": math.inf}, "frequency_penalty must be"),
    ({"seed": 2**64}, "seed must be a whole number from 0 to 18446744073709551615, got 184467"),
    ({"seed": 10**5000}, "seed must be .* got one of more than 40 digits"),
    ({"seed": -1}, "seed must be"),
    ({"logit_bias": ((VOCABULARY, 1.0),)}, "token id 99 is not in the vocabulary of 99"),
    ({"logit_bias": ((-1, 1.0),)}, "token id -1 is not in"),
    ({"logit_bias": ((5, math.nan),)}, "logit_bias of token 5 must be a number .* got nan"),
    ({"logit_bias": ((5, -101.0),)}, "logit_bias of token 5 must be a number from -100 to 100"),
    ({"logit_bias": ((5, 1.0), (5, 2.0))}, "logit_bias names token 5 twice"),
    ({"logit_bias": tuple((5, 0.0) for _ in range(1025))}, "1,025 tokens, at most 1,024"),
]

BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": -1}, "max_tokens must be a whole number from 0 to .* got -1"),
    ({"max_tokens": 10**18}, "max_tokens must be"),
    ({"min_tokens": -1}, "min_tokens must be"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens 5 is more than max_tokens 4"),
    ({"batch_index": -1}, "batch_index must be"),
    ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20, got 21"),
    ({"logprobs": -1}, "logprobs must be"),
    ({"stop": ("a",) * 65}, "65 stop texts, at most 64"),
    ({"stop": ("a" * 1025,)}, "a stop text has 1,025 characters, at most 1,024"),
    ({"stop_ids": (VOCABULARY,)}, "stop id 99 is not in the vocabulary of 99"),
    ({"stop_ids": (-5,)}, "stop id -5 is not in"),
    ({"stop_ids": (1,) * 257}, "257 stop ids, at most 256"),
    ({"stop_sequences": ((),)}, "a stop sequence has 0 ids, it must have 1 to 64"),
    ({"stop_sequences": ((1,) * 65,)}, "a stop sequence has 65 ids"),
    ({"stop_sequences": ((1, VOCABULARY),)}, "stop sequence: token id 99 is not in"),
    ({"stop_sequences": ((1, 2),) * 65}, "65 stop sequences, at most 64"),
]


def refused(call: Generate, words: str, vocab_size: int | None = VOCABULARY) -> None:
    with pytest.raises(PromptError, match=words) as caught:
        check_request(call, vocab_size)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("change", "words"), BAD_SAMPLING)
def test_sampling_that_breaks_a_rule_is_named(change: dict[str, Any], words: str) -> None:
    sampling = SamplingSettings(**change)
    refused(Generate(request_id=1, sampling=sampling), words)
    with pytest.raises(PromptError, match=words):
        check_sampling(sampling, VOCABULARY)


@pytest.mark.parametrize(("change", "words"), BAD_REQUESTS)
def test_a_request_that_breaks_a_rule_is_named(change: dict[str, Any], words: str) -> None:
    refused(Generate(request_id=1, **change), words)


def test_before_a_model_is_open_only_its_vocabulary_is_not_known() -> None:
    above = SamplingSettings(logit_bias=((10**6, 1.0),))
    call = Generate(request_id=1, sampling=above, stop_ids=(10**6,), stop_sequences=((10**6,),))
    check_request(call)
    refused(call, "1000000 is not in the vocabulary of 99")
    refused(Generate(request_id=1, stop_ids=(-1,)), "ids begin at 0", None)


def test_the_borders_themselves_are_allowed() -> None:
    sampling = SamplingSettings(
        temperature=100.0,
        top_p=1.0,
        top_k=1 << 30,
        min_p=1.0,
        repetition_penalty=0.01,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        seed=2**64 - 1,
        logit_bias=((0, -100.0), (VOCABULARY - 1, 100.0)),
    )
    call = Generate(
        request_id=1,
        sampling=sampling,
        max_tokens=4,
        min_tokens=4,
        logprobs=20,
        stop=("a" * 1024,) * 64,
        stop_ids=(VOCABULARY - 1,) * 256,
        stop_sequences=((0,) * 64,) * 64,
    )
    check_request(call, VOCABULARY)


@given(st.floats() | st.integers().map(float))
def test_no_number_at_all_gets_past_a_rule_by_being_odd(number: float) -> None:
    """A NaN compares false with everything; whatever passes lies within the borders."""
    for name, low, high in (
        ("temperature", 0, 100), ("top_p", 0, 1), ("min_p", 0, 1), ("repetition_penalty", 0.01, 100)
    ):  # fmt: skip
        try:
            check_sampling(SamplingSettings(**{name: number}))
        except PromptError:
            continue
        assert low <= number <= high


def test_logprobs_that_would_not_fit_a_message_are_refused() -> None:
    check_logprobs_fit(None, 1 << 24)
    check_logprobs_fit(20, 8192)
    with pytest.raises(PromptError, match="logprobs 20 of an answer of up to 20,000 tokens"):
        check_logprobs_fit(20, 20_000)


@pytest.mark.parametrize("logprobs", [0, 1, 20])
def test_as_many_logprobs_as_are_allowed_fit_a_message(logprobs: int) -> None:
    """Each figure as long as it gets: ids of 5 bytes, texts of 5 letters a token."""
    limit = MAX_LOGPROB_FIGURES // (logprobs + 2)
    check_logprobs_fit(logprobs, limit)
    with pytest.raises(PromptError):
        check_logprobs_fit(logprobs, limit + 1)
    told = TokenLogprobs(logprob=-1.5, top=((100_000, -1.5),) * logprobs)
    shape = PlanShape(num_layers=1, num_heads=1, num_kv_heads=1, mlp_width=32, vocab_size=256)
    finished = Finished(
        request_id=1,
        finish_reason="length",
        text="abcde" * limit,
        token_ids=(100_000,) * limit,
        prompt_tokens=1,
        seed=2**64 - 1,
        ttft_s=0.1,
        prefill_tps=0.1,
        decode_tps=0.1,
        devices=(),
        plan=single(shape, "this/cpu"),
        logprobs=(told,) * limit,
    )
    codec: Codec[Any] = Codec(EVENTS)
    (header,) = codec.encode(finished)
    assert codec.decode([header])[0] == finished


def test_ids_outside_the_vocabulary_are_named() -> None:
    check_ids([0, VOCABULARY - 1], VOCABULARY)
    with pytest.raises(PromptError, match=r"token id 99 is not in the vocabulary of 99 \(0 to 98"):
        check_ids([5, VOCABULARY], VOCABULARY)
