"""The fault matrix on the real model: a device that ends, is killed or freezes while weights are
loaded, a prompt is read, an answer is written, or another plan is applied. Every answer completes
and equals the undisturbed one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.client import Event
from engine.host import messages as api
from engine.plan.plan import PlanShape
from engine.plan.presets import even, from_percentages
from engine.session import Session, SessionOptions, simulated_devices
from tests.engine.host.conftest import runner_of

pytestmark = [
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals"),
]

PROMPT = "The lighthouse keeper counted the ships of the evening, and wrote down " * 12
NUM_TOKENS = 12
FAULTS = ("terminate", "kill", "suspend")
VICTIM = "local-2/cpu"


@pytest.fixture(scope="module")
def session(default_model_path: Path) -> Iterator[Session]:
    options = SessionOptions(model=str(default_model_path), dtype="float32", num_workers=3)
    with Session(options) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(session: Session) -> tuple[int, ...]:
    return session.generate(PROMPT, raw=True, max_tokens=NUM_TOKENS, ignore_eos=True).token_ids


def answer(session: Session, on_event: Callable[[Event], None]) -> tuple[int, ...]:
    call = api.Generate(
        request_id=session.client.next_request_id(),
        raw_prompt=PROMPT,
        max_tokens=NUM_TOKENS,
        sampling=api.SamplingSettings(temperature=0.0),
        ignore_eos=True,
        speculation="off",  # So that the rest needs more than the step under way.
    )
    finished = session.client.run(call, on_event, timeout_seconds=100)
    assert isinstance(finished, api.Finished)
    return finished.token_ids


class Saboteur:
    """Does something to the victim's runner at the first event that fits."""

    def __init__(self, session: Session, fault: str, fits: Callable[[object], bool]) -> None:
        self._session = session
        self._fault = fault
        self._fits = fits
        self.has_acted = False
        self.notes: list[str] = []

    def hear(self, event: Event) -> None:
        message = event.message
        if isinstance(message, api.PlanApplied):
            self.notes.append(message.note)
        if not self.has_acted and self._fits(message):
            self.has_acted = True
            getattr(runner_of(self._session, VICTIM), self._fault)()


def half_loaded(message: object) -> bool:
    return (
        isinstance(message, api.Progress)
        and message.phase == "weights"
        and message.subject == VICTIM
        and message.done >= message.total // 3
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_while_an_answer_is_written(
    session: Session, expected: tuple[int, ...], fault: str
) -> None:
    session.apply(even(PlanShape.from_config(session.model.config), simulated_devices(3)))
    saboteur = Saboteur(session, fault, lambda m: isinstance(m, api.TokensGenerated))
    assert answer(session, saboteur.hear) == expected
    assert "went to" in saboteur.notes[-1]


@pytest.mark.parametrize("fault", FAULTS)
def test_while_a_prompt_is_read(session: Session, expected: tuple[int, ...], fault: str) -> None:
    shape = PlanShape.from_config(session.model.config)
    session.apply(even(shape, simulated_devices(3)))
    saboteur = Saboteur(
        session,
        fault,
        lambda m: isinstance(m, api.Progress) and m.phase == "prefill" and m.done < m.total,
    )
    # What the last answer left in the cache is not this prompt's beginning.
    session.generate("Another beginning", raw=True, max_tokens=1)
    assert answer(session, saboteur.hear) == expected
    assert saboteur.has_acted
    assert "went to" in saboteur.notes[-1]


@pytest.mark.parametrize("fault", FAULTS)
def test_while_another_plan_is_applied_in_the_middle_of_an_answer(
    session: Session, expected: tuple[int, ...], fault: str
) -> None:
    shape = PlanShape.from_config(session.model.config)
    session.apply(even(shape, simulated_devices(3)))
    saboteur = Saboteur(session, fault, half_loaded)
    is_applying = False

    def on_event(event: Event) -> None:
        nonlocal is_applying
        if isinstance(event.message, api.TokensGenerated) and not is_applying:
            is_applying = True
            plan = from_percentages(shape, simulated_devices(3), [20, 60, 20])
            call = api.ApplyPlan(request_id=session.client.next_request_id(), plan=plan)
            session.client.post(call)
        saboteur.hear(event)

    assert answer(session, on_event) == expected
    assert saboteur.has_acted
    assert VICTIM in saboteur.notes[-1]


@pytest.mark.parametrize("fault", FAULTS)
def test_while_weights_are_loaded_for_the_first_plan(
    session: Session, expected: tuple[int, ...], fault: str
) -> None:
    """The question waits behind the plan, and is answered by what is left of it."""
    shape = PlanShape.from_config(session.model.config)
    model = api.OpenModel(
        request_id=session.client.next_request_id(), path=session.model.path, dtype="float32"
    )
    session.client.run(model)  # Ends the plan in force.
    plan = even(shape, simulated_devices(3))
    apply = api.ApplyPlan(request_id=session.client.next_request_id(), plan=plan)
    saboteur = Saboteur(session, fault, half_loaded)
    session.client.run(apply, saboteur.hear, timeout_seconds=60)
    assert saboteur.has_acted
    assert VICTIM in saboteur.notes[-1]
    assert answer(session, saboteur.hear) == expected
