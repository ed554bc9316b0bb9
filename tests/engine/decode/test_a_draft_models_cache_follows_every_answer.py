"""What a draft model guesses is its own greedy text, whatever came true of the guesses before.

A wrong cache would change no answer, so only guesses themselves can show it. One real runner; the
oracle is transformers, which computes the whole text anew.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import zmq
from transformers import LlamaForCausalLM

from engine.cluster import messages as m
from engine.cluster.coordinator import Coordinator, DeviceAnswer
from engine.cluster.processes import Greeting
from engine.cluster.runner_links import RunnerAddress
from engine.cluster.runner_start import runner_settings, start_runner
from engine.cluster.security import new_key_pair
from engine.cluster.transport import new_local_endpoint
from engine.decode.batching import Work, generated_works
from engine.decode.draft_model import DraftModel, DraftPlan
from engine.decode.draft_rule import MOST_GUESSED
from engine.decode.drafting import MODEL_SOURCE, Draft
from engine.decode.sequence import NextToken
from engine.decode.sequence import Sequence as Answer
from engine.decode.speculation import StepTimes
from engine.decode.stopping import StopMatcher
from engine.errors import EngineError
from engine.host.messages import SamplingSettings
from engine.host.opened_draft import DRAFT_DEVICE, OpenedDraft
from engine.host.opened_model import OpenedModel
from engine.model.view import LONGEST_STEP
from tests.tiny_models import VOCAB_SIZE, save_tiny_llama

pytestmark = pytest.mark.network

# Two candidates of random weights closer than this may change places with the order of a sum.
CLOSE = 1e-3
LONG = LONGEST_STEP + 200


class WatchedCoordinator(Coordinator):
    """The real one, which keeps what the runner said last."""

    cache_bytes = -1

    def step(
        self,
        step: m.Step,
        embeddings: m.Array | None,
        should_abort: Callable[[], bool],
        on_sent: Callable[[], None],
    ) -> list[DeviceAnswer]:
        answers = super().step(step, embeddings, should_abort, on_sent)
        self.cache_bytes = answers[0].answer.cache_bytes
        return answers


class NoText:
    """Nobody reads these answers."""

    def push(self, id: int, /) -> str:
        return ""

    def finish(self) -> str:
        return ""


class NoLookup:
    """Leaves every guess to the draft model."""

    def draft(self, ids: Sequence[int], limit: int) -> Draft:
        return Draft([], 0)


class Bench:
    """A draft model with its runner, and the oracle of its guesses."""

    def __init__(self, model: DraftModel, coordinator: WatchedCoordinator) -> None:
        self.model = model
        self.coordinator = coordinator
        self.oracle: LlamaForCausalLM
        self.losses: list[EngineError] = []
        self._num_answers = 0

    def answer(self, prompt: list[int], **options: bool) -> Answer:
        """A sequence whose prompt the big model has read, and which has its first token."""
        self._num_answers += 1
        answer = Answer(
            request_id=self._num_answers,
            checkpoint_id="",
            ids=list(prompt),
            num_prompt=len(prompt),
            max_tokens=1000,
            settings=SamplingSettings(temperature=0.0),
            seed=0,
            eos_ids=frozenset(),
            stops=StopMatcher(()),
            detokenizer=NoText(),
            on_text=lambda _id, _text: None,
            on_prefill=lambda _done, _total: None,
            speculation="on",
            drafter=NoLookup(),
            **options,
        )
        answer.advance(len(prompt))
        answer.accept(NextToken(5, None))
        return answer

    def guesses(self, answers: list[Answer]) -> list[list[int]]:
        """What it guesses for each of them; [] where it still reads."""
        self.model.follow({answer.request_id for answer in answers})
        works: list[Work] = generated_works(answers, 1)
        self.model.add_guesses(works, StepTimes(), VOCAB_SIZE, lambda: False)
        assert not self.losses
        assert all(work.guess.source == MODEL_SOURCE for work in works if work.guess.ids)
        return [work.guess.ids for work in works]

    def check(self, answer: Answer, guess: list[int]) -> None:
        """Compare with the greedy text of the oracle."""
        with torch.inference_mode():
            logits_SV = self.oracle(torch.tensor([[*answer.ids, *guess]])).logits[0]
        for n, id in enumerate(guess):
            logits = logits_SV[len(answer.ids) - 1 + n]
            assert logits.max() - logits[id] < CLOSE, f"guess {n} of {guess} after {answer.ids}"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder: Path = tmp_path_factory.mktemp("draft")
    oracle = save_tiny_llama(folder, max_position_embeddings=2000)
    model = OpenedModel(folder, "float32", None)
    opened = OpenedDraft(str(folder), model)
    keys = new_key_pair()
    settings = runner_settings(new_local_endpoint(), "tcp://127.0.0.1:*", "zmq", "", 0, True)
    greeting = Greeting(keys.public.decode("ascii"), settings)
    child = start_runner(DRAFT_DEVICE, greeting, lambda _child: None)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    coordinator = WatchedCoordinator(context)
    draft = DraftModel(
        coordinator, lambda: False, lambda error: found.losses.append(error), lambda: None
    )
    found = Bench(draft, coordinator)
    found.oracle = oracle
    try:
        address = child.address(60)
        control, exchange, *_ = address.endpoints
        runner = RunnerAddress(
            DRAFT_DEVICE, control, exchange, address.public_key.encode("ascii"), keys
        )
        load = opened.load_request(1, kept_positions=300)
        load = load._replace(dtype="float32", kv_dtype="float32")
        draft.put(DraftPlan(load, runner, opened.checkpoint), lambda *_: None, lambda: False)
        assert not found.losses
        yield found
    finally:
        draft.close()
        child.end()
        context.term()
        opened.close()
        model.close()


def take(answer: Answer, guess: list[int], num_right: int, num_more: int = 0) -> None:
    """So many guesses came true, then another token came, and more that nobody had guessed."""
    other = (guess[num_right] + 1) % VOCAB_SIZE if num_right < len(guess) else 7
    ids = [*guess[:num_right], other, *range(20, 20 + num_more)]
    for id in ids:
        answer.accept(NextToken(id, None))
    answer.advance(len(ids))


def test_guesses_are_its_own_greedy_text_however_many_came_true(bench: Bench) -> None:
    """None, some, all; and with tokens after them that prompt lookup might have guessed."""
    chance = random.Random(3)
    answers = [bench.answer([*range(1, 12)]), bench.answer([*range(40, 60)])]
    for _ in range(12):
        for answer, guess in zip(answers, bench.guesses(answers), strict=True):
            assert len(guess) == MOST_GUESSED
            bench.check(answer, guess)
            num_right = chance.choice([0, 1, 3, MOST_GUESSED - 1, MOST_GUESSED])
            take(answer, guess, num_right, chance.choice([0, 0, 3, 12]))


def test_a_long_conversation_is_read_in_pieces_while_others_are_guessed_for(bench: Bench) -> None:
    short = bench.answer([*range(1, 12)])
    long = bench.answer([(7 * n) % VOCAB_SIZE for n in range(LONG)])
    num_rounds = 0
    while True:
        num_rounds += 1
        assert num_rounds < LONG
        found = bench.guesses([short, long])
        bench.check(short, found[0])
        take(short, found[0], 2)
        if found[1]:
            break
        take(long, [], 0)
    assert num_rounds > 1
    bench.check(long, found[1])


def test_a_turn_that_follows_and_one_with_a_common_beginning_are_not_read_again(
    bench: Bench,
) -> None:
    """Places of ended answers are taken over, copied, or cut back to what is the same."""
    first = bench.answer([3 * n % VOCAB_SIZE for n in range(40)])
    (guess,) = bench.guesses([first])
    take(first, guess, 4)
    other = bench.answer([*first.ids[:30], 9, 9, 9])
    for answer, guess in zip([first, other], bench.guesses([first, other]), strict=True):
        bench.check(answer, guess)
    turn = bench.answer([*first.ids, 1, 2, 3])
    for answer, guess in zip([turn, other], bench.guesses([turn, other]), strict=True):
        bench.check(answer, guess)


@pytest.mark.parametrize("may_reuse", [True, False])
def test_answers_that_ended_leave_what_may_be_kept_and_no_more(
    bench: Bench, may_reuse: bool
) -> None:
    bench.model.follow(set())
    before = bench.coordinator.cache_bytes
    for n in range(6):
        answer = bench.answer([(n + 5 * i) % VOCAB_SIZE for i in range(30)], may_reuse=may_reuse)
        (guess,) = bench.guesses([answer])
        bench.check(answer, guess)
    bench.model.follow(set())
    many = [
        bench.answer([(n + 3 * i) % VOCAB_SIZE for i in range(290)], may_reuse=may_reuse)
        for n in range(3)
    ]
    for _ in range(8):
        bench.guesses(many)
    during = bench.coordinator.cache_bytes
    bench.model.follow(set())
    left = bench.coordinator.cache_bytes
    assert 0 < left < during // 2 if may_reuse else left == before
