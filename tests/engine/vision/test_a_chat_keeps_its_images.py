"""The next turn of a chat neither encodes its images again nor computes what stands before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.decode.slots import common_length
from engine.host import messages as api
from engine.session import Session
from engine.vision.kept_features import EncodedImage, KeptFeatures
from engine.vision.layout import TileGrid
from tests.engine.vision.tiny_vision import Vision, image_process, picture, user

ANSWER_SECONDS = 60.0
COUNT = 8


def ask(session: Session, turns: Sequence[api.ChatTurn]) -> api.Finished:
    """A greedy answer; a host that waits for its image process fails the test."""
    call = api.Generate(
        request_id=session.client.next_request_id(),
        turns=tuple(turns),
        max_tokens=COUNT,
        sampling=api.SamplingSettings(temperature=0.0),
        ignore_eos=True,
    )
    finished = session.client.run(call, timeout_seconds=ANSWER_SECONDS)
    assert isinstance(finished, api.Finished)
    return finished


def test_a_second_image_leaves_what_stands_before_it_as_it_was(
    vision: Vision, session: Session, tmp_path: Path
) -> None:
    """One mark for all images made each new one change those before: nothing was reused."""
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    first.write_bytes(picture(55, 40, 21))
    second.write_bytes(picture(25, 45, 22))
    chat = [user("what is to be seen", first)]
    begun = ask(session, chat)
    assert list(begun.token_ids) == vision.answer(chat, COUNT)

    held = [*vision.ids(chat), *begun.token_ids[:-1]]
    chat += [api.ChatTurn(role="assistant", content="a cat"), user("are you sure")]
    process = image_process(session.client.host_pid)
    process.suspend()  # Whoever needs it now waits in vain.
    try:
        again = ask(session, chat)
    finally:
        process.resume()
    assert list(again.token_ids) == vision.answer(chat, COUNT)
    assert again.reused_tokens == common_length(held, vision.ids(chat))
    assert again.reused_tokens >= begun.prompt_tokens

    held = [*vision.ids(chat), *again.token_ids[:-1]]
    chat += [api.ChatTurn(role="assistant", content="yes"), user("and here", second)]
    added = ask(session, chat)
    assert list(added.token_ids) == vision.answer(chat, COUNT)
    assert added.reused_tokens == common_length(held, vision.ids(chat))
    assert added.reused_tokens >= again.prompt_tokens


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=30))
def test_the_images_used_last_are_kept_within_the_limit(uses: list[tuple[int, int]]) -> None:
    """The model: walk back through the uses until one does not fit."""
    max_rows = 20
    kept = KeptFeatures(max_rows * 12)
    sizes: dict[int, int] = {}
    order: list[int] = []
    for name, wanted in uses:
        size = sizes.setdefault(name, wanted)
        features = np.full((size, 3), name, np.float32)
        image = EncodedImage(
            digest=bytes([name]), grid=TileGrid(rows=1, columns=1), features=features
        )
        kept.keep([image])
        order = [*(n for n in order if n != name), name]
        while sum(sizes[n] for n in order) > max_rows:
            order.pop(0)
        found = [n for n in range(10) if kept.find(bytes([n])) is not None]
        assert found == sorted(order)
