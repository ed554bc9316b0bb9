"""Answers with a draft model's guesses are those without, whatever it guesses and however it ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.client import Event
from engine.cluster.messages import Message
from engine.errors import CheckpointError, ConfigError, PlanError
from engine.host import messages as api
from engine.plan.plan import PlanShape
from engine.plan.presets import even, single
from engine.session import Session, SessionOptions, simulated_devices
from tests.engine.host.conftest import runner_of
from tests.engine.host.test_nothing_is_left_running import assert_gone
from tests.tiny_models import VOCAB_SIZE, save_tiny_llama

pytestmark = pytest.mark.network

NUM_TOKENS = 60
DRAFT_DEVICE = "draft/cpu"
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
# Flat enough that chance decides, so that text of random weights does not run in circles.
WARM = api.SamplingSettings(temperature=0.6, top_p=1.0, seed=7)
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampling": WARM},
    "penalties": {
        "sampling": api.SamplingSettings(
            temperature=0.0, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1
        )
    },
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "a stop": {"stop": ("e", "t"), "sampling": WARM},
}


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other random weights in other sizes, with the same letters, and rows that have none."""
    folder = tmp_path_factory.mktemp("other")
    save_tiny_llama(
        folder, vocab_size=120, num_hidden_layers=1, hidden_size=36, num_attention_heads=4
    )
    return folder


class Heard:
    """What a session says of its draft model."""

    def __init__(self) -> None:
        self.losses: list[str] = []
        self.num_tokens = 0
        self.on_tokens: Callable[[int], None] = lambda _count: None

    def __call__(self, message: Message) -> None:
        if isinstance(message, api.DraftModelLost):
            self.losses.append(message.message)
        elif isinstance(message, api.TokensGenerated):
            self.num_tokens += len(message.token_ids)
            self.on_tokens(self.num_tokens)


@pytest.fixture(scope="module")
def with_itself(tiny_folder: Path) -> Iterator[Session]:
    """A model that guesses for itself."""
    options = SessionOptions(
        model=str(tiny_folder), dtype="float32", kv_window=600, draft_model=str(tiny_folder)
    )
    with Session(options) as session:
        yield session


@pytest.fixture(scope="module")
def with_other(tiny_folder: Path, other_folder: Path) -> Iterator[Session]:
    options = SessionOptions(
        model=str(tiny_folder),
        dtype="float32",
        num_workers=2,
        kv_window=600,
        draft_model=str(other_folder),
    )
    with Session(options) as session:
        yield session


@pytest.fixture(scope="module", params=["with_itself", "with_other"])
def session(request: pytest.FixtureRequest) -> Session:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reopened(tiny_folder: Path) -> Iterator[Session]:
    """For tests that open models of their own."""
    with Session(SessionOptions(model=str(tiny_folder), dtype="float32")) as session:
        yield session


def reopen(session: Session, model: Path, draft: Path, kv_window: int | None = None) -> None:
    """Open a model with a draft model, and put a plan in force."""
    call = api.OpenModel(
        request_id=session.client.next_request_id(),
        path=str(model),
        dtype="float32",
        kv_window=kv_window,
        draft_path=str(draft),
    )
    found: list[api.ModelOpened] = []

    def on_event(event: Event) -> None:
        if isinstance(event.message, api.ModelOpened):
            found.append(event.message)

    session.client.run(call, on_event, timeout_seconds=60)
    assert found[0].draft_name == draft.name
    session.apply(single(PlanShape.from_config(found[0].config), "this/cpu"))


def answer(session: Session, speculation: api.Speculation, **options: Any) -> api.Finished:
    defaults = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    return session.generate(
        "the quick brown fox", raw=True, speculation=speculation, **{**defaults, **options}
    )


def assert_same(guessed: api.Finished, plain: api.Finished) -> None:
    assert guessed.token_ids == plain.token_ids
    assert guessed.text == plain.text
    assert guessed.finish_reason == plain.finish_reason


@pytest.mark.parametrize("request_name", REQUESTS)
def test_no_option_makes_a_difference(session: Session, request_name: str) -> None:
    options = REQUESTS[request_name]
    plain = answer(session, "off", **options)
    assert plain.model_drafted_tokens == 0
    for speculation in ("on", "auto"):
        guessed = answer(session, speculation, **options)
        assert_same(guessed, plain)
        assert guessed.decode_steps == len(plain.token_ids) - 1 - guessed.accepted_tokens


def test_a_model_that_guesses_for_itself_is_nearly_always_right(with_itself: Session) -> None:
    """It computes in a narrower format than the one it guesses for, so not quite always."""
    guessed = answer(with_itself, "on")
    assert guessed.model_accepted_tokens > guessed.model_drafted_tokens * 3 // 4
    assert guessed.model_accepted_tokens > NUM_TOKENS // 2
    assert guessed.decode_steps < NUM_TOKENS // 3


def test_other_weights_are_nearly_never_right(with_other: Session) -> None:
    guessed = answer(with_other, "on", sampling=WARM)
    assert guessed.model_drafted_tokens > NUM_TOKENS
    assert guessed.model_accepted_tokens < guessed.model_drafted_tokens // 10


def test_every_member_of_a_batch_is_guessed_for(session: Session) -> None:
    """Prompts of all lengths, two with a common beginning, and one that takes several pieces."""
    prompts = ["abc", "the quick brown fox", "zz", "the quick brown dog", "lorem ipsum " * 40]
    options: dict[str, Any] = {"raw": True, "max_tokens": 40, "ignore_eos": True, "sampling": WARM}
    plain = session.generate_batch(prompts, speculation="off", **options)
    guessed = session.generate_batch(prompts, speculation="on", **options)
    for found, expected in zip(guessed, plain, strict=True):
        assert_same(found, expected)
        assert found.model_drafted_tokens > 0


def test_the_next_turn_of_a_chat_is_guessed_for(with_itself: Session) -> None:
    """What the draft model holds of the turn before has to be cut back to what is still true."""
    prompt = "a long story about a fox"
    for _turn in range(3):
        plain = with_itself.generate(prompt, raw=True, max_tokens=30, speculation="off")
        guessed = with_itself.generate(prompt, raw=True, max_tokens=30, speculation="on")
        assert_same(guessed, plain)
        assert guessed.model_accepted_tokens > guessed.model_drafted_tokens * 2 // 3
        prompt += guessed.text[:20] + "and then?"


def test_windows_that_slide_make_no_difference(reopened: Session, tiny_folder: Path) -> None:
    reopen(reopened, tiny_folder, tiny_folder, kv_window=40)
    plain = answer(reopened, "off", max_tokens=150)
    guessed = answer(reopened, "on", max_tokens=150)
    assert_same(guessed, plain)
    assert guessed.model_accepted_tokens > 0


def test_tokens_that_the_draft_model_has_no_row_for_end_its_guesses(
    reopened: Session, tiny_folder: Path, other_folder: Path
) -> None:
    reopen(reopened, other_folder, tiny_folder)
    heard = Heard()
    reopened.listen(heard)
    hot = api.SamplingSettings(temperature=0.4, top_p=1.0, seed=7)
    plain = answer(reopened, "off", sampling=hot)
    assert any(token_id >= VOCAB_SIZE for token_id in plain.token_ids)
    guessed = answer(reopened, "on", sampling=hot)
    assert_same(guessed, plain)
    assert not heard.losses


@needs_signals
def test_another_plan_and_a_lost_device_leave_the_draft_model_alone(with_other: Session) -> None:
    heard = Heard()
    with_other.listen(heard)
    shape = PlanShape.from_config(with_other.model.config)
    with_other.apply(even(shape, simulated_devices(2)))
    plain = answer(with_other, "off")
    draft = runner_of(with_other, DRAFT_DEVICE)
    victim = runner_of(with_other, "local-2/cpu")
    heard.on_tokens = lambda count: victim.kill() if count == NUM_TOKENS + 20 else None
    heard.num_tokens = NUM_TOKENS
    assert_same(answer(with_other, "on"), plain)
    with_other.apply(single(shape, "this/cpu"))
    guessed = answer(with_other, "on")
    assert_same(guessed, plain)
    assert guessed.model_drafted_tokens > 0
    assert runner_of(with_other, DRAFT_DEVICE) == draft
    assert not heard.losses


@needs_signals
@pytest.mark.parametrize("fault", ["kill", "suspend", "kill while idle"])
def test_an_answer_goes_on_when_the_draft_model_is_lost(
    reopened: Session, tiny_folder: Path, other_folder: Path, fault: str
) -> None:
    reopen(reopened, tiny_folder, other_folder)
    heard = Heard()
    reopened.listen(heard)
    plain = answer(reopened, "off", sampling=WARM)
    victim = runner_of(reopened, DRAFT_DEVICE)

    def harm(count: int) -> None:
        if count == NUM_TOKENS + 20:
            victim.suspend() if fault == "suspend" else victim.kill()

    if fault == "kill while idle":
        victim.kill()
    else:
        heard.on_tokens = harm
    assert_same(answer(reopened, "on", sampling=WARM), plain)
    later = answer(reopened, "on", sampling=WARM)
    assert_same(later, plain)
    assert later.model_drafted_tokens == 0
    (loss,) = heard.losses
    assert "\n" not in loss
    assert ("no longer answers" if fault == "suspend" else "killed by SIGKILL") in loss
    assert_gone([victim])
    reopened.apply(reopened.plan)
    assert_same(answer(reopened, "on", sampling=WARM), plain)
    assert len(heard.losses) == 1


@needs_signals
def test_opening_another_model_and_closing_end_its_process(tiny_folder: Path) -> None:
    """Also one that is frozen, when the host closes."""
    session = Session(SessionOptions(model=str(tiny_folder), draft_model=str(tiny_folder)))
    try:
        first = runner_of(session, DRAFT_DEVICE)
        reopen(session, tiny_folder, tiny_folder)
        assert_gone([first])
        assert answer(session, "on").model_drafted_tokens > 0
        host = psutil.Process(session.client.host_pid)
        processes = [host, *host.children(recursive=True)]
        runner_of(session, DRAFT_DEVICE).suspend()
    finally:
        session.close()
    assert_gone(processes)


def test_a_draft_model_that_cannot_be_used_is_refused_in_one_line(
    reopened: Session, tiny_folder: Path, tmp_path: Path
) -> None:
    mixed, smaller = tmp_path / "mixed", tmp_path / "smaller"
    save_tiny_llama(mixed)
    tokenizer = json.loads((mixed / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (mixed / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    save_tiny_llama(smaller)
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    tokenizer["model"]["vocab"] = {token: i for token, i in vocab.items() if i < 98}
    (smaller / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    for folder, found in ((mixed, "'b', that of"), (smaller, "token 98 is missing")):
        with pytest.raises(ConfigError, match="same, token for token") as refused:
            reopen(reopened, tiny_folder, folder)
        for words in (str(folder), str(tiny_folder), found):
            assert words in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(CheckpointError, match="--draft-model"):
        reopen(reopened, tiny_folder, tmp_path / "none")
    reopen(reopened, tiny_folder, tiny_folder)
    assert answer(reopened, "on").model_drafted_tokens > 0


def test_a_draft_model_that_does_not_fit_is_refused(
    reopened: Session, tiny_folder: Path, tmp_path: Path
) -> None:
    """A long window of the model's leaves room, the draft model's many layers take more than all."""
    total = psutil.virtual_memory().total
    bytes_of_model, bytes_of_draft_layer = 3 * 2 * 20 * 2 * 4, 2 * 20 * 2 * 2
    window = min(1 << 24, total // 4 // bytes_of_model)
    save_tiny_llama(
        tmp_path,
        num_hidden_layers=total // (bytes_of_draft_layer * window) + 1,
        max_position_embeddings=1 << 24,
    )
    with pytest.raises(PlanError, match=r"the draft model .* needs .* smaller one") as refused:
        reopen(reopened, tiny_folder, tmp_path, kv_window=window)
    assert "\n" not in str(refused.value)
