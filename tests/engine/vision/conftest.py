"""Fixtures of the tests of images."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.session import Session, SessionOptions
from tests.engine.vision.tiny_vision import Vision, picture, save_vision_tokenizer
from tests.tiny_families import save_tiny


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Vision:
    folder = tmp_path_factory.mktemp("vision")
    oracle = save_tiny("llama4_vision", folder)
    save_vision_tokenizer(folder)
    wide, small = folder / "wide.png", folder / "small.png"
    wide.write_bytes(picture(70, 30, 1))
    small.write_bytes(picture(20, 25, 2))
    return Vision(folder, oracle, wide, small)


@pytest.fixture(scope="module")
def session(vision: Vision) -> Iterator[Session]:
    options = SessionOptions(model=str(vision.folder), dtype="float32", num_workers=2)
    with Session(options) as session:
        yield session
