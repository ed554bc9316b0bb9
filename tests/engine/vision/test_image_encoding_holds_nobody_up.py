"""While images are encoded, other prompts are answered, and whoever waits can be cancelled."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine.errors import Cancelled, error_by_name
from engine.host import messages as api
from engine.session import Session
from tests.engine.vision.tiny_vision import Vision, image_process, picture, user

# Far above what it takes, and far below ENCODE_SECONDS.
ANSWER_SECONDS = 60.0
CANCEL_SECONDS = 2.0


def generate(session: Session, turn: api.ChatTurn) -> api.Generate:
    return api.Generate(
        request_id=session.client.next_request_id(),
        turns=(turn,),
        max_tokens=6,
        sampling=api.SamplingSettings(temperature=0.0),
        ignore_eos=True,
    )


def end_of(session: Session, request_id: int, seconds: float) -> api.Finished | api.CallFailed:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        event = session.client.receive(0.1)
        message = event.message if event is not None else None
        if isinstance(message, api.Finished | api.CallFailed):
            assert message.request_id == request_id, "another call ended"
            return message
    pytest.fail(f"call {request_id} did not end within {seconds} s")


def cancel(session: Session, request_id: int) -> None:
    session.client.post(api.Cancel(request_id=request_id))
    ended = end_of(session, request_id, CANCEL_SECONDS)
    assert isinstance(ended, api.CallFailed)
    assert isinstance(error_by_name(ended.error, ended.message), Cancelled)


def test_text_goes_past_images_and_those_that_wait_are_cancelled_at_once(
    vision: Vision, session: Session, tmp_path: Path
) -> None:
    """One thread read text and images: a cancel was answered after up to ten minutes."""
    session.generate((user("warm", vision.small),), max_tokens=1)
    process = image_process(session.client.host_pid)
    process.suspend()  # The slowest encoding there can be.
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(images):
        path.write_bytes(picture(65, 33, 40 + seed))
    begun, waiting = (generate(session, user("what", path)) for path in images)
    text = generate(session, user("hello"))
    try:
        for call in (begun, waiting, text):
            session.client.post(call)
        answered = end_of(session, text.request_id, ANSWER_SECONDS)
        assert isinstance(answered, api.Finished)
        cancel(session, waiting.request_id)
        cancel(session, begun.request_id)
        assert not process.is_running()
    finally:
        if process.is_running():
            process.kill()
    found = session.generate((user("what", images[0]),), max_tokens=6, ignore_eos=True)
    assert list(found.token_ids) == vision.expected("what", [images[0]], 6)
