"""A conversation that begins like another gets that part copied, and answers as if it had not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.host import messages as api
from engine.plan.plan import PlanShape
from engine.plan.presets import even, single
from engine.session import Session, SessionOptions, simulated_devices
from engine.text.tokenizer import load_tokenizer
from tests.engine.host.conftest import runner_of
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.network

SYSTEM = "you are a tiny model with random weights. "
GREEDY = api.SamplingSettings(temperature=0.0)
LAST_SECONDS = 60.0


class Tiny:
    """A model on disk, and what transformers says of it."""

    def __init__(self, folder: Path) -> None:
        save_tiny_llama(folder, max_position_embeddings=512)
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        self.oracle: Any = LlamaForCausalLM.from_pretrained(folder).eval()

    def greedy(self, text: str, count: int) -> tuple[int, ...]:
        ids = self.tokenizer.encode(text)
        with torch.no_grad():
            output = self.oracle.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return tuple(output[0, len(ids) :].tolist())

    def common(self, first: str, second: str) -> int:
        """Tokens that two prompts begin with alike."""
        ids = [self.tokenizer.encode(text) for text in (first, second)]
        return next(n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def opened(tiny: Tiny) -> Iterator[Session]:
    options = SessionOptions(model=str(tiny.folder), dtype="float32", num_workers=2, kv_window=2000)
    with Session(options) as session:
        yield session


@pytest.fixture(params=["one runner", "two workers"])
def session(request: pytest.FixtureRequest, opened: Session) -> Session:
    """A plan put in force anew: nothing is in the cache."""
    shape = PlanShape.from_config(opened.model.config)
    is_one = request.param == "one runner"
    opened.apply(single(shape, "this/cpu") if is_one else even(shape, simulated_devices(2)))
    return opened


def ask(session: Session, text: str, count: int, **options: Any) -> api.Finished:
    return session.generate(text, raw=True, max_tokens=count, ignore_eos=True, **options)


def test_other_conversations_copy_the_beginning_and_the_first_keeps_its_own(
    tiny: Tiny, session: Session
) -> None:
    first = SYSTEM + "tell me of the sea, of ships, of harbours and of everything that is wet"
    answered = ask(session, first, 20)
    assert answered.reused_tokens == 0
    for question in ("who?", "and what of the mountains then?"):
        other = ask(session, SYSTEM + question, 12, speculation="on")
        assert other.reused_tokens >= len(tiny.tokenizer.encode(SYSTEM)) - 1
        assert other.token_ids == tiny.greedy(SYSTEM + question, 12)
    going_on = first + answered.text + " more"
    again = ask(session, going_on, 10)
    assert again.reused_tokens == len(tiny.tokenizer.encode(first)) + 19
    assert again.token_ids == tiny.greedy(going_on, 10)


def test_a_running_conversation_is_copied_from_while_it_goes_on(
    tiny: Tiny, session: Session
) -> None:
    long, short = SYSTEM + "a", SYSTEM + "b"
    calls = {
        name: api.Generate(
            request_id=session.client.next_request_id(),
            raw_prompt=text,
            max_tokens=count,
            ignore_eos=True,
            sampling=GREEDY,
        )
        for name, text, count in (("long", long, 100), ("short", short, 15))
    }
    ended: dict[int, api.Finished] = {}
    session.client.post(calls["long"])
    has_asked = False
    deadline = time.monotonic() + LAST_SECONDS
    while len(ended) < 2:
        assert time.monotonic() < deadline, f"only {len(ended)} of 2 answers ended"
        event = session.client.receive(0.5)
        if event is None:
            continue
        message = event.message
        assert not isinstance(message, api.CallFailed), message
        if isinstance(message, api.TokensGenerated) and not has_asked:
            has_asked = True
            session.client.post(calls["short"])
        if isinstance(message, api.Finished):
            ended[message.request_id] = message
    copied = ended[calls["short"].request_id]
    assert copied.reused_tokens == tiny.common(long, short)
    assert copied.token_ids == tiny.greedy(short, 15)
    assert ended[calls["long"].request_id].token_ids == tiny.greedy(long, 100)


def test_sixteen_at_once_with_one_beginning_answer_as_each_alone(
    tiny: Tiny, session: Session
) -> None:
    ask(session, SYSTEM + "first of all, read the beginning of all the others, please", 2)
    prompts = [f"{SYSTEM}{chr(97 + n) * (n + 1)}" for n in range(16)]
    order: list[int] = []
    found = session.generate_batch(
        prompts,
        raw=True,
        max_tokens=12,
        ignore_eos=True,
        on_token=lambda index, _id, _text: order.append(index),
    )
    for prompt, finished in zip(prompts, found, strict=True):
        assert finished.token_ids == tiny.greedy(prompt, 12)
        assert finished.reused_tokens >= len(tiny.tokenizer.encode(SYSTEM)) - 1
    # All at once: nobody's last token comes before everybody's first.
    firsts = [order.index(n) for n in range(16)]
    lasts = [len(order) - 1 - order[::-1].index(n) for n in range(16)]
    assert max(firsts) < min(lasts)


def test_a_copied_conversation_survives_a_lost_device(tiny: Tiny, opened: Session) -> None:
    shape = PlanShape.from_config(opened.model.config)
    opened.apply(even(shape, simulated_devices(2)))
    ask(opened, SYSTEM + "tell me of the sea, of ships, of harbours and of all that is wet", 4)
    prompt = SYSTEM + "and of a fox"
    victim = runner_of(opened, "local-2/cpu")
    num_heard = 0

    def on_token(_index: int, _id: int, _text: str) -> None:
        nonlocal num_heard
        num_heard += 1
        if num_heard == 8:
            victim.kill()

    (found,) = opened.generate_batch(
        [prompt], raw=True, max_tokens=40, ignore_eos=True, on_token=on_token, speculation="on"
    )
    assert found.reused_tokens >= len(tiny.tokenizer.encode(SYSTEM)) - 1
    assert found.token_ids == tiny.greedy(prompt, 40)
