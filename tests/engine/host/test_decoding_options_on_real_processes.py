"""What a request asks of its answer holds on real processes, on one runner and on two workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from engine.client import Event
from engine.cluster.messages import Message
from engine.errors import CacheFull, EngineError, PromptError
from engine.host import messages as api
from engine.plan.plan import PlanShape
from engine.plan.presets import even, single
from engine.session import Session, SessionOptions, simulated_devices

pytestmark = pytest.mark.network

GREEDY = api.SamplingSettings(temperature=0.0)
SAMPLED = api.SamplingSettings(
    temperature=1.2,
    top_p=0.97,
    min_p=0.002,
    repetition_penalty=1.1,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias=((40, 1.5), (41, -3.0)),
    seed=2**64 - 1,
)
# Log-probabilities of float32 logits of order 1.
TOLERANCE = 2e-5
LAST_SECONDS = 60.0


@pytest.fixture(scope="module", params=["one runner", "two workers"])
def session(request: pytest.FixtureRequest, opened_session: Session) -> Session:
    """The tiny model under a plan for one device, or evenly on two simulated nodes."""
    shape = PlanShape.from_config(opened_session.model.config)
    is_one = request.param == "one runner"
    plan = single(shape, "this/cpu") if is_one else even(shape, simulated_devices(2))
    if opened_session.plan != plan:
        opened_session.apply(plan)
    return opened_session


@pytest.fixture(scope="module")
def answers() -> set[tuple[int, ...]]:
    """What one request got under every plan so far."""
    return set()


@pytest.fixture(scope="module")
def oracle(tiny_folder: Path) -> Iterator[Any]:
    """The same weights in transformers."""
    yield LlamaForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()


def prompt_ids(session: Session, tiny_folder: Path, text: str) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tiny_folder / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert session.generate(text, raw=True, max_tokens=1).prompt_tokens == len(ids)
    return ids


def run_together(session: Session, calls: list[api.Generate]) -> list[api.Finished]:
    """Post all calls at once, and wait for their ends."""
    ended: dict[int, api.Finished] = {}
    for call in calls:
        session.client.post(call)
    while len(ended) < len(calls):
        event = session.client.receive(LAST_SECONDS)
        if event is None:
            continue
        assert not isinstance(event.message, api.CallFailed), event.message
        if isinstance(event.message, api.Finished):
            ended[event.message.request_id] = event.message
    return [ended[call.request_id] for call in calls]


def test_the_same_seed_gives_the_same_tokens_twice_in_company_and_under_another_plan(
    session: Session, answers: set[tuple[int, ...]]
) -> None:
    def call(text: str, **options: Any) -> api.Generate:
        options = {"sampling": SAMPLED, "max_tokens": 40, "ignore_eos": True, **options}
        return api.Generate(request_id=session.client.next_request_id(), raw_prompt=text, **options)

    first = session.generate("abc", raw=True, sampling=SAMPLED, max_tokens=40, ignore_eos=True)
    again = session.generate("abc", raw=True, sampling=SAMPLED, max_tokens=40, ignore_eos=True)
    assert len(first.token_ids) == 40
    assert first.seed == 2**64 - 1
    company = run_together(
        session,
        [
            call("the quick brown fox " * 4, sampling=GREEDY),
            call("abc", batch_index=1),
            call("abc"),
            call("zz", sampling=msgspec.structs.replace(SAMPLED, seed=5), logprobs=20),
            call("hello", stop=("q",), min_tokens=30),
        ],
    )
    assert first.token_ids == again.token_ids == company[2].token_ids
    assert company[1].token_ids != first.token_ids
    answers.add(first.token_ids)
    assert len(answers) == 1


def test_greedy_with_penalty_bias_and_min_tokens_is_that_of_transformers(
    session: Session, oracle: Any, tiny_folder: Path
) -> None:
    ids = prompt_ids(session, tiny_folder, "hello there")
    # Without min_tokens EOS, which gets a large bias, would come at once.
    biases = ((2, 30.0), (50, 0.5), (51, -2.0))
    expected = oracle.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=40,
        min_new_tokens=25,
        repetition_penalty=1.3,
        sequence_bias={(i,): bias for i, bias in biases},
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    finished = session.generate(
        "hello there",
        raw=True,
        max_tokens=40,
        min_tokens=25,
        sampling=msgspec.structs.replace(GREEDY, repetition_penalty=1.3, logit_bias=biases),
    )
    assert list(finished.token_ids) == expected
    assert len(expected) == 26
    assert finished.finish_reason == "stop"


@pytest.mark.parametrize("num_top", [0, 5, 20])
def test_logprobs_are_those_of_the_model_whatever_the_request_changes(
    num_top: int, session: Session, oracle: Any, tiny_folder: Path
) -> None:
    ids = prompt_ids(session, tiny_folder, "abc")
    finished = session.generate(
        "abc", raw=True, sampling=SAMPLED, max_tokens=30, ignore_eos=True, logprobs=num_top
    )
    assert finished.logprobs is not None
    assert len(finished.logprobs) == len(finished.token_ids) == 30
    with torch.no_grad():
        logits = oracle(torch.tensor([[*ids, *finished.token_ids]])).logits[0]
    expected = torch.log_softmax(logits.double(), dim=-1).numpy()[len(ids) - 1 : -1]
    for row, token_id, told in zip(expected, finished.token_ids, finished.logprobs, strict=True):
        assert abs(told.logprob - row[token_id]) < TOLERANCE
        assert len(told.top) == num_top
        figures = [figure for _, figure in told.top]
        assert figures == sorted(figures, reverse=True)
        for i, figure in told.top:
            assert abs(figure - row[i]) < TOLERANCE
        np.testing.assert_allclose(figures, np.sort(row)[::-1][:num_top], atol=TOLERANCE)


def test_no_logprobs_come_unasked(session: Session) -> None:
    assert session.generate("abc", raw=True, max_tokens=3).logprobs is None


def test_stop_ids_and_runs_of_ids_end_the_answer(session: Session) -> None:
    whole = session.generate("abc", raw=True, max_tokens=30, ignore_eos=True)
    ids = whole.token_ids
    by_id = session.generate("abc", raw=True, max_tokens=30, ignore_eos=True, stop_ids=(ids[6],))
    assert by_id.token_ids == ids[: ids.index(ids[6]) + 1]
    assert by_id.finish_reason == "stop"
    run = ids[10:12]
    end = next(n for n in range(2, 31) if ids[n - 2 : n] == run)
    by_run = session.generate(
        "abc", raw=True, max_tokens=30, ignore_eos=True, stop_sequences=(run,)
    )
    assert by_run.token_ids == ids[:end]
    assert by_run.finish_reason == "stop"
    assert whole.text.startswith(by_run.text)
    # One id is as good as a stop id: min_tokens forbids it too.
    late = session.generate(
        "abc", raw=True, max_tokens=30, ignore_eos=True, stop_sequences=((ids[6],),), min_tokens=12
    )
    assert ids[6] not in late.token_ids[:12]


# ---- batches ---------------------------------------------------------------------------------


def test_a_batch_streams_every_member_and_each_can_be_had_alone(session: Session) -> None:
    prompts = ["abc", "abc", "the quick brown fox jumps", "z", "abc"]
    heard: dict[int, list[tuple[int, str]]] = {n: [] for n in range(len(prompts))}
    order: list[int] = []

    def on_token(index: int, token_id: int, text: str) -> None:
        heard[index].append((token_id, text))
        order.append(index)

    options: dict[str, Any] = {"max_tokens": 25, "ignore_eos": True, "logprobs": 1}
    batch = session.generate_batch(
        prompts, raw=True, sampling=SAMPLED, on_token=on_token, **options
    )
    for n, finished in enumerate(batch):
        assert tuple(i for i, _ in heard[n]) == finished.token_ids
        assert "".join(text for _, text in heard[n]) == finished.text
        alone = session.generate(prompts[n], raw=True, sampling=SAMPLED, batch_index=n, **options)
        assert alone.token_ids == finished.token_ids
    assert len({batch[n].token_ids for n in (0, 1, 4)}) == 3
    # All at once: nobody's last token comes before everybody's first.
    firsts = [order.index(n) for n in heard]
    lasts = [len(order) - 1 - order[::-1].index(n) for n in heard]
    assert max(firsts) < min(lasts)


def test_a_batch_without_a_seed_draws_one_for_all(session: Session) -> None:
    unseeded = msgspec.structs.replace(SAMPLED, seed=None)
    batch = session.generate_batch(["abc", "abc"], raw=True, sampling=unseeded, max_tokens=20)
    assert batch[0].seed == batch[1].seed
    again = msgspec.structs.replace(SAMPLED, seed=batch[1].seed)
    alone = session.generate("abc", raw=True, sampling=again, batch_index=1, max_tokens=20)
    assert alone.token_ids == batch[1].token_ids
    assert session.generate_batch([]) == []


def test_a_member_that_cannot_be_served_ends_the_batch_and_nothing_else(session: Session) -> None:
    before = session.generate("abc", raw=True, max_tokens=10).token_ids
    with pytest.raises(CacheFull, match="prompt 1 of the batch: the prompt needs 100,001"):
        session.generate_batch(["abc", "x" * 100_001], raw=True, max_tokens=90_000, ignore_eos=True)
    assert session.generate("abc", raw=True, max_tokens=10).token_ids == before


def test_a_callback_that_raises_ends_the_batch_and_nothing_else(session: Session) -> None:
    before = session.generate("abc", raw=True, max_tokens=10).token_ids

    def on_token(_index: int, _id: int, _text: str) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        session.generate_batch(
            ["abc", "xyz"], raw=True, max_tokens=90_000, ignore_eos=True, on_token=on_token
        )
    assert session.generate("abc", raw=True, max_tokens=10).token_ids == before


# ---- bad requests ----------------------------------------------------------------------------

NAN = float("nan")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"sampling": api.SamplingSettings(temperature=NAN)}, "temperature must be .* got nan"),
    ({"sampling": api.SamplingSettings(top_p=0.0)}, "top_p must be"),
    ({"sampling": api.SamplingSettings(min_p=float("inf"))}, "min_p must be"),
    ({"sampling": api.SamplingSettings(repetition_penalty=0.0)}, "repetition_penalty must be"),
    ({"sampling": api.SamplingSettings(logit_bias=((99, 1.0),))}, "token id 99 is not in"),
    ({"sampling": api.SamplingSettings(logit_bias=((9, NAN),))}, "logit_bias of token 9"),
    ({"max_tokens": -1}, "max_tokens must be"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens 3 is more than max_tokens 2"),
    ({"stop_ids": (99,)}, "stop id 99 is not in"),
    ({"stop": ("x",) * 65}, "65 stop texts"),
    ({"logprobs": 21}, "logprobs must be"),
    ({"logprobs": 20}, "logprobs 20 of an answer of up to 99,998 tokens are too many"),
    ({"stop_ids": tuple(range(99)), "min_tokens": 1}, "min_tokens 1 forbids every token"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_a_bad_request_ends_alone(
    change: dict[str, Any], words: str, opened_session: Session
) -> None:
    """Sent past the session's own check, as a window or another program would."""
    client = opened_session.client
    computed: list[Message] = []

    def on_event(event: Event) -> None:
        if isinstance(event.message, api.TokensGenerated | api.Progress):
            computed.append(event.message)

    call = api.Generate(request_id=client.next_request_id(), raw_prompt="abc", **change)
    with pytest.raises(PromptError, match=words) as caught:
        client.run(call, on_event, timeout_seconds=LAST_SECONDS)
    assert "\n" not in str(caught.value)
    assert not computed
    assert len(opened_session.generate("abc", raw=True, max_tokens=2).token_ids) > 0


def test_numbers_that_no_message_can_carry_are_refused_before_they_are_sent(
    opened_session: Session,
) -> None:
    for sampling in (
        api.SamplingSettings(seed=2**64),
        api.SamplingSettings(top_k=10**30),
        api.SamplingSettings(logit_bias=((10**30, 0.0),)),
    ):
        with pytest.raises(PromptError):
            opened_session.generate("abc", raw=True, sampling=sampling)
    with pytest.raises(PromptError, match="max_tokens"):
        opened_session.generate_batch(["abc", "abc"], raw=True, max_tokens=10**30)
    assert len(opened_session.generate("abc", raw=True, max_tokens=2).token_ids) > 0


def test_what_does_not_fit_the_model_is_refused_before_weights_are_moved(
    tiny_folder: Path,
) -> None:
    told: list[Message] = []

    def check(opened: api.ModelOpened) -> None:
        raise PromptError(f"no, not with {opened.config.vocab_size}")

    with pytest.raises(EngineError, match="no, not with 99"):
        Session(SessionOptions(model=str(tiny_folder)), told.append, check)
    assert any(isinstance(message, api.ModelOpened) for message in told)
    assert not any(isinstance(m, api.Progress) and m.phase == "weights" for m in told)
