"""A runner that goes on by itself gives the answer of single steps, wherever that ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine.errors import ConfigError
from engine.host import messages as api
from engine.kernels.build_native import source_hash
from engine.kernels.native_library import PATH, NativeLibrary
from engine.session import Session, SessionOptions
from tests.engine.host.conftest import runner_of
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.network

NUM_TOKENS = 90
GREEDY = api.SamplingSettings(temperature=0.0)
DRAWN = {
    "at 0.5": api.SamplingSettings(temperature=0.5, top_p=1.0, seed=3),
    "at 1.5 from a nucleus": api.SamplingSettings(temperature=1.5, top_p=0.8, seed=2**64 - 1),
    "of the likeliest": api.SamplingSettings(temperature=1.0, top_k=5, seed=5),
    "by a least chance": api.SamplingSettings(temperature=1.0, min_p=0.2, top_p=1.0, seed=6),
}


def tied_folder(folder: Path, dtype: torch.dtype) -> Path:
    """A model whose head is its embedding."""
    try:
        NativeLibrary(PATH, source_hash())
    except (OSError, ConfigError) as error:
        pytest.skip(f"only native kernels go on by themselves: {error}")
    model: Any = save_tiny_llama(folder, tie_word_embeddings=True)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A head that is its embedding to the bit, on a runner with native kernels."""
    folder = tied_folder(tmp_path_factory.mktemp("tied"), torch.bfloat16)
    options = SessionOptions(model=str(folder), dtype="bfloat16", num_workers=1)
    with Session(options) as opened:
        yield opened


def answer(session: Session, sampling: api.SamplingSettings, **options: Any) -> api.Finished:
    defaults: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "speculation": "off"}
    options = defaults | options
    return session.generate("abcabcabcab", raw=True, sampling=sampling, **options)


def by_single_steps(sampling: api.SamplingSettings) -> api.SamplingSettings:
    """A bias of nothing: what a request changes of the logits is the host's to choose by."""
    return msgspec.structs.replace(sampling, logit_bias=((40, 0.0),))


STEP_BY_STEP = by_single_steps(GREEDY)


def assert_same(session: Session, sampling: api.SamplingSettings = GREEDY, **options: Any) -> None:
    expected = answer(session, by_single_steps(sampling), **options)
    for _ in range(3):
        found = answer(session, sampling, **options)
        assert found.token_ids == expected.token_ids
        assert found.text == expected.text
        assert found.finish_reason == expected.finish_reason
        assert found.logprobs == expected.logprobs


def test_an_answer_takes_fewer_steps_and_is_the_same(session: Session) -> None:
    assert_same(session)
    assert answer(session, STEP_BY_STEP).decode_steps == NUM_TOKENS - 1
    assert answer(session, GREEDY).decode_steps < NUM_TOKENS // 2


@pytest.mark.parametrize("sampling", DRAWN.values(), ids=DRAWN)
def test_so_does_an_answer_that_is_drawn(session: Session, sampling: api.SamplingSettings) -> None:
    assert_same(session, sampling)
    assert_same(session, sampling, logprobs=4, max_tokens=17)
    assert answer(session, by_single_steps(sampling)).decode_steps == NUM_TOKENS - 1
    assert answer(session, sampling).decode_steps < NUM_TOKENS // 2


def test_a_head_that_was_rounded_again_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its rows are not the inputs that single steps have."""
    folder = tied_folder(tmp_path, torch.float16)
    options = SessionOptions(model=str(folder), dtype="bfloat16", num_workers=1)
    with Session(options) as session:
        assert_same(session)
        assert answer(session, GREEDY).decode_steps == NUM_TOKENS - 1


def test_a_draft_model_is_credited_with_its_own_guesses_alone(tmp_path: Path) -> None:
    """Another model, whose guesses are mostly wrong."""
    folder = tied_folder(tmp_path / "big", torch.bfloat16)
    save_tiny_llama(tmp_path / "other", num_hidden_layers=1)
    options = SessionOptions(
        model=str(folder), dtype="bfloat16", num_workers=1, draft_model=str(tmp_path / "other")
    )
    with Session(options) as session:
        expected = answer(session, STEP_BY_STEP, max_tokens=400)
        found = answer(session, GREEDY, max_tokens=400, speculation="auto")
    assert found.token_ids == expected.token_ids
    assert found.model_accepted_tokens <= found.model_drafted_tokens <= found.drafted_tokens
    assert found.accepted_tokens <= found.drafted_tokens


either = pytest.mark.parametrize("sampling", [GREEDY, DRAWN["at 0.5"]], ids=["greedy", "drawn"])


@either
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 17, 50])
def test_it_ends_after_as_many_tokens_as_were_asked_for(
    session: Session, sampling: api.SamplingSettings, max_tokens: int
) -> None:
    assert_same(session, sampling, max_tokens=max_tokens)


def test_one_of_a_batch_is_drawn_by_its_own_noise(session: Session) -> None:
    sampling = DRAWN["at 0.5"]
    assert_same(session, sampling, batch_index=3)
    found = answer(session, sampling, batch_index=3)
    assert found.decode_steps < NUM_TOKENS // 2
    assert found.token_ids != answer(session, sampling).token_ids


@either
def test_guesses_beside_it_change_nothing(session: Session, sampling: api.SamplingSettings) -> None:
    for speculation in ("auto", "on"):
        assert_same(session, sampling, speculation=speculation)


def test_what_is_asked_besides_comes_with_every_token(session: Session) -> None:
    assert_same(session, logprobs=4)


@either
def test_stops_end_it_between_tokens_that_came_together(
    session: Session, sampling: api.SamplingSettings
) -> None:
    whole = answer(session, by_single_steps(sampling))
    for place in range(40, 50, 3):
        assert_same(session, sampling, stop=(whole.text[place : place + 3],))
        assert_same(session, sampling, stop_sequences=(whole.token_ids[place : place + 2],))
        assert_same(session, sampling, stop_ids=(whole.token_ids[place],))


def test_what_is_kept_of_an_answer_that_was_cut_is_what_its_next_turn_begins_with(
    session: Session,
) -> None:
    whole = answer(session, STEP_BY_STEP)
    cut = answer(session, GREEDY, stop=(whole.text[45:48],))
    turn = "abcabcabcab" + cut.text + "z"
    again = session.generate(turn, raw=True, max_tokens=20, sampling=GREEDY)
    fresh = session.generate(turn, raw=True, max_tokens=20, sampling=STEP_BY_STEP)
    assert again.reused_tokens > 20
    assert again.token_ids == fresh.token_ids


@either
def test_a_runner_that_dies_between_them_loses_no_word(
    session: Session, sampling: api.SamplingSettings
) -> None:
    expected = answer(session, by_single_steps(sampling), max_tokens=400)
    victim = runner_of(session, session.plan.devices[0])
    heard: list[int] = []

    def on_token(_index: int, token_id: int, _text: str) -> None:
        heard.append(token_id)
        if len(heard) == 100:
            victim.kill()

    (found,) = session.generate_batch(
        ["abcabcabcab"],
        raw=True,
        sampling=sampling,
        on_token=on_token,
        max_tokens=400,
        ignore_eos=True,
        speculation="off",
    )
    assert found.token_ids == expected.token_ids
    assert tuple(heard) == found.token_ids
    assert found.decode_steps < 200  # It goes on after what was computed again, too.


@either
def test_others_beside_it_have_their_answers(
    session: Session, sampling: api.SamplingSettings
) -> None:
    prompts = ["abcabc", "the quick brown fox", "zz", "x" * 30]
    options: dict[str, Any] = {"raw": True, "max_tokens": 60, "ignore_eos": True}
    expected = session.generate_batch(prompts, sampling=by_single_steps(sampling), **options)
    found = session.generate_batch(prompts, sampling=sampling, **options)
    assert [f.token_ids for f in found] == [f.token_ids for f in expected]
