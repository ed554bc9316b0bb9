"""`generate --image`: files to tokens over real processes, as transformers answers them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from engine.errors import Cancelled, EngineError, PromptError
from engine.host import messages as api
from engine.session import Session, SessionOptions
from engine.text.tokenizer import load_tokenizer
from engine.vision.encoder import ImageEncoder
from engine.vision.layout import expand_images, find_image_tokens
from engine.vision.tiles import prepare_images
from engine.weights.checkpoint import open_checkpoint
from tests.tiny_families import IMAGE_TOKEN, save_tiny
from tests.tiny_models import VOCAB_SIZE, save_tiny_llama

IMAGE_TEXTS = {
    "<|image_start|>": 85,
    "<|image_end|>": 86,
    "<|image|>": 87,
    "<|tile_x_separator|>": 88,
    "<|tile_y_separator|>": 89,
    "<|patch|>": IMAGE_TOKEN,
}
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}</s>{% endfor %}"
)


def save_vision_tokenizer(folder: Path) -> None:
    """Single letters, the image tokens, and a template that places images."""
    control = {"<unk>": 0, "<s>": 1, "</s>": 2, **IMAGE_TEXTS}
    free = [i for i in range(VOCAB_SIZE) if i not in control.values()]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: len(free)]
    vocab = {**control, **dict(zip(letters, free, strict=True))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(control))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def picture(width: int, height: int, seed: int) -> bytes:
    """A noisy PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@dataclass(frozen=True)
class Vision:
    """A model that reads images, on disk and as the oracle, and some images."""

    folder: Path
    oracle: Any
    wide: Path
    small: Path

    def expected(self, text: str, paths: list[Path], count: int) -> list[int]:
        """Greedy tokens of transformers for one turn with images."""
        with open_checkpoint(self.folder) as checkpoint:
            vision = checkpoint.config.vision
        assert vision is not None
        tokenizer = load_tokenizer(self.folder)
        prepared = prepare_images([path.read_bytes() for path in paths], vision)
        ids = [IMAGE_TEXTS["<|image|>"]] * len(paths) + tokenizer.encode(text) + [2]
        tokens = find_image_tokens(tokenizer.control_id, vision)
        ids = expand_images(ids, prepared.grids, tokens, vision.tokens_per_tile)
        with torch.no_grad():
            output = self.oracle.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                pixel_values=torch.as_tensor(prepared.tiles),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return output[0, len(ids) :].tolist()


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


def ask(session: Session, text: str, *paths: Path, count: int = 12) -> api.Finished:
    """One turn with images."""
    turn = api.ChatTurn(role="user", content=text, images=tuple(str(p) for p in paths))
    return session.generate((turn,), max_tokens=count, ignore_eos=True)


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
    files = [vision.small.read_bytes()]
    try:
        with pytest.raises(Cancelled):
            encoder.encode(files, lambda: True)
        first = encoder.encode(files, lambda: False)
        process = encoder._process
        assert process is not None
        process.kill()
        with pytest.raises(EngineError, match="ended with code"):
            encoder.encode(files, lambda: False)
        again = encoder.encode(files, lambda: False)
        assert np.array_equal(first.features, again.features)
    finally:
        encoder.close()
