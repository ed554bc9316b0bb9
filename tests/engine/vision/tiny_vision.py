"""A tiny model that reads images, on disk and as the oracle, and what it is asked."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from engine.host import messages as api
from engine.text.tokenizer import load_tokenizer
from engine.vision.layout import expand_images, find_image_tokens
from engine.vision.tiles import prepare_images
from engine.weights.checkpoint import open_checkpoint
from tests.processes import processes_below
from tests.tiny_families import IMAGE_TOKEN
from tests.tiny_models import VOCAB_SIZE

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

    def ids(self, turns: Sequence[api.ChatTurn]) -> list[int]:
        """A chat as the model reads it."""
        with open_checkpoint(self.folder) as checkpoint:
            vision = checkpoint.config.vision
        assert vision is not None
        tokenizer = load_tokenizer(self.folder)
        ids: list[int] = []
        for turn in turns:
            ids += [IMAGE_TEXTS["<|image|>"]] * len(turn.images)
            ids += [*tokenizer.encode(turn.content), 2]
        tokens = find_image_tokens(tokenizer.control_id, vision)
        grids = prepare_images(_files(turns), vision).grids
        return expand_images(ids, grids, tokens, vision.tokens_per_tile)

    def answer(self, turns: Sequence[api.ChatTurn], count: int) -> list[int]:
        """Greedy tokens of transformers for a chat."""
        with open_checkpoint(self.folder) as checkpoint:
            vision = checkpoint.config.vision
        assert vision is not None
        ids = self.ids(turns)
        with torch.no_grad():
            output = self.oracle.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                pixel_values=torch.as_tensor(prepare_images(_files(turns), vision).tiles),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return output[0, len(ids) :].tolist()

    def expected(self, text: str, paths: Sequence[Path], count: int) -> list[int]:
        """Greedy tokens of transformers for one turn with images."""
        return self.answer([user(text, *paths)], count)


def user(text: str, *paths: Path) -> api.ChatTurn:
    """A turn with images."""
    return api.ChatTurn(role="user", content=text, images=tuple(str(p) for p in paths))


def image_process(host_pid: int) -> psutil.Process:
    """The one process of an engine host that encodes images."""
    (found,) = processes_below(psutil.Process(host_pid), "engine.vision.process")
    return found


def _files(turns: Sequence[api.ChatTurn]) -> list[bytes]:
    return [Path(path).read_bytes() for turn in turns for path in turn.images]
