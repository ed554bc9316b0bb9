"""`generate --image`: files to tokens over real processes, as transformers answers them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from engine.errors import CacheFull, Cancelled, EngineError, PromptError
from engine.host import messages as api
from engine.session import Session, SessionOptions
from engine.vision.encoder import ImageEncoder
from engine.vision.layout import TileGrid
from tests.engine.vision.tiny_vision import Vision, picture, user
from tests.tiny_models import save_tiny_llama

# float32 sums in another order; the features are of size 0.01.
GPU_TOLERANCE = 1e-6


def ask(session: Session, text: str, *paths: Path, count: int = 12) -> api.Finished:
    """One turn with images."""
    return session.generate((user(text, *paths),), max_tokens=count, ignore_eos=True)


def test_tokens_equal_transformers(vision: Vision, session: Session) -> None:
    for paths in ([vision.wide], [vision.small], [vision.small, vision.wide]):
        found = ask(session, "what", *paths)
        assert list(found.token_ids) == vision.expected("what", paths, 12)


def test_the_answer_depends_on_the_image(vision: Vision, session: Session) -> None:
    first = vision.expected("see", [vision.wide], 12)
    assert first != vision.expected("see", [vision.small], 12)
    assert list(ask(session, "see", vision.wide).token_ids) == first


def test_another_image_of_the_same_size_is_not_taken_for_one_read_before(
    vision: Vision, session: Session
) -> None:
    """Their tokens are equal; only the features differ."""
    other = vision.folder / "other.png"
    other.write_bytes(picture(70, 30, 9))
    question = "what is to be seen here"
    ask(session, question, vision.wide)
    again = ask(session, question, vision.wide)
    assert again.reused_tokens == again.prompt_tokens - 1
    changed = ask(session, question, other)
    assert changed.reused_tokens == 0
    assert list(changed.token_ids) == vision.expected(question, [other], 12)


def test_bad_images_end_their_request_only(
    vision: Vision, session: Session, tmp_path: Path
) -> None:
    tiny, text = tmp_path / "tiny.png", tmp_path / "text.png"
    tiny.write_bytes(picture(1, 1, 0))
    text.write_text("no image", encoding="utf-8")
    for path, message in (
        (tiny, "image 1 is 1 x 1, at least 4 x 4"),
        (text, "image 1"),
        (tmp_path / "absent.png", "image 1 cannot be read"),
    ):
        with pytest.raises(PromptError, match=message) as caught:
            ask(session, "what", path)
        assert "\n" not in str(caught.value)
    assert list(ask(session, "what", vision.small).token_ids)


def test_a_text_model_refuses_images(vision: Vision, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    command = [sys.executable, "-m", "engine.cli", "generate", "hi", "--model", str(tmp_path)]
    done = subprocess.run(
        [*command, "--image", str(vision.small)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("shardmix: --image:")
    assert done.stderr.count("\n") == 1


def test_the_command_line_shows_an_image(vision: Vision) -> None:
    command = [sys.executable, "-m", "engine.cli", "generate", "what", "--model"]
    settings = ["--temperature", "0", "--max-tokens", "6", "--dtype", "float32", "--json"]
    done = subprocess.run(
        [*command, str(vision.folder), "--image", str(vision.wide), *settings],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    expected = vision.expected("what", [vision.wide], 6)
    found = json.loads(done.stdout)["token_ids"]
    assert found == expected[: len(found)]
    assert len(found) == 6 or found[-1] == 2


def test_encoding_can_be_cancelled_and_goes_on_after_its_process_was_killed(vision: Vision) -> None:
    encoder = ImageEncoder(vision.folder)
    small, wide, other = vision.small.read_bytes(), vision.wide.read_bytes(), picture(9, 9, 5)
    try:
        with pytest.raises(Cancelled):
            encoder.encode([small], lambda: True)
        (first,) = encoder.encode([small], lambda: False)
        child = encoder._child
        assert child is not None
        child.process.kill()
        with pytest.raises(EngineError, match="ended with code"):
            encoder.encode([wide], lambda: False)
        _, again, _ = encoder.encode([small, wide, other], lambda: False)
    finally:
        encoder.close()
    with closing(ImageEncoder(vision.folder)) as fresh:
        alone, with_it = fresh.encode([small, wide], lambda: False)
    assert np.array_equal(alone.features, first.features)
    assert np.array_equal(with_it.features, again.features)
    with pytest.raises(EngineError, match="the model was closed"):
        encoder.encode([wide], lambda: False)


def test_a_process_that_reads_nothing_is_given_up_at_the_deadline(vision: Vision) -> None:
    """A request longer than a pipe blocked its writer for good."""
    with closing(ImageEncoder(vision.folder)) as encoder:
        encoder.encode([vision.small.read_bytes()], lambda: False)
        child = encoder._child
        assert child is not None
        stopped = psutil.Process(child.process.pid)
        stopped.suspend()
        large = picture(1000, 700, 4)
        assert len(large) > 1 << 20
        begun = time.monotonic()
        with pytest.raises(EngineError, match="took longer than 1 s and was given up"):
            encoder.encode([large], lambda: False, deadline_seconds=1.0)
        assert time.monotonic() - begun < 10
        assert not stopped.is_running()
        (image,) = encoder.encode([large], lambda: False)
        assert image.grid.num_tiles > 1


def test_a_prompt_that_is_too_long_is_refused_before_its_images_are_encoded(vision: Vision) -> None:
    """Features that nobody asked for would be taken for the next answer."""
    seen: list[tuple[TileGrid, ...]] = []

    def refuse(grids: tuple[TileGrid, ...]) -> None:
        seen.append(grids)
        raise CacheFull("too long")

    files = [vision.wide.read_bytes(), vision.small.read_bytes()]
    with closing(ImageEncoder(vision.folder)) as encoder:
        with pytest.raises(CacheFull, match="too long"):
            encoder.encode(files, lambda: False, refuse)
        small, wide = encoder.encode(files[::-1], lambda: False)
        assert seen == [(wide.grid, small.grid)]
        # The grids of images that are kept are known without the process.
        with pytest.raises(CacheFull, match="too long"):
            encoder.encode(files, lambda: False, refuse)
        assert seen[1] == seen[0]
    options = SessionOptions(model=str(vision.folder), dtype="float32", num_workers=1, kv_window=19)
    length = len(vision.ids([user("what", vision.wide)]))
    with Session(options) as session:
        with pytest.raises(CacheFull, match=f"needs {length} positions, the KV window has 19"):
            ask(session, "what", vision.wide)
        assert ask(session, "what", count=3).prompt_tokens == 5


@pytest.mark.gpu
def test_features_of_a_gpu_equal_those_of_the_cpu(
    vision: Vision, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [vision.small.read_bytes(), vision.wide.read_bytes()]
    with closing(ImageEncoder(vision.folder)) as on_gpu:
        found = on_gpu.encode(files, lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with closing(ImageEncoder(vision.folder)) as on_cpu:
        expected = on_cpu.encode(files, lambda: False)
    for ours, theirs in zip(found, expected, strict=True):
        difference = np.abs(ours.features - theirs.features)
        worst = np.unravel_index(int(difference.argmax()), difference.shape)
        assert difference.max() <= GPU_TOLERANCE, f"{difference.max()} at {worst}"
