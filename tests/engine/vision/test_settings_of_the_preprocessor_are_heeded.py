"""preprocessor_config.json says how many tiles there may be, and may not ask for what we do not."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError, ConfigError
from engine.vision.encoder import ImageEncoder
from engine.vision.preprocessor import DEFAULT_MAX_TILES, read_max_tiles
from engine.weights.checkpoint import open_checkpoint
from tests.engine.vision.tiny_vision import Vision, picture


def settings_of(edge: int, **changes: Any) -> dict[str, Any]:
    """As Llama 4 Scout's folder has them, for tiles of another edge."""
    return {
        "crop_size": None,
        "data_format": "channels_first",
        "default_to_square": True,
        "device": None,
        "do_center_crop": None,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Llama4ImageProcessorFast",
        "image_std": [0.5, 0.5, 0.5],
        "input_data_format": None,
        "max_patches": 16,
        "processor_class": "Llama4Processor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "resize_to_max_canvas": False,
        "return_tensors": None,
        "size": {"height": edge, "width": edge},
        **changes,
    }


@pytest.fixture
def folder(vision: Vision, tmp_path: Path) -> Path:
    return Path(shutil.copytree(vision.folder, tmp_path / "model"))


def max_tiles_of(folder: Path, **changes: Any) -> int:
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config.vision
    assert config is not None
    text = json.dumps(settings_of(config.image_size, **changes))
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    return read_max_tiles(folder, config)


def test_the_number_of_tiles_is_read_or_the_default(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config.vision
    assert config is not None
    assert read_max_tiles(folder, config) == DEFAULT_MAX_TILES
    assert max_tiles_of(folder) == 16
    assert max_tiles_of(folder, max_patches=5) == 5
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    assert read_max_tiles(folder, config) == DEFAULT_MAX_TILES


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("image_mean", [0.48, 0.46, 0.41], r"\[0.48, 0.46, 0.41\] is not supported, only 0.5"),
        ("image_std", [0.5, 0.5], "only 0.5 for each of the 3 channels"),
        ("do_resize", False, "False is not supported"),
        ("do_normalize", False, "False is not supported"),
        ("do_center_crop", True, "True is not supported"),
        ("resample", 3, "3 is not supported"),
        ("resize_to_max_canvas", True, "True is not supported"),
        ("rescale_factor", 1.0, "only 1/255"),
        ("rescale_factor", float("nan"), "only 1/255"),
        ("image_processor_type", "SiglipImageProcessor", "a model with Llama4ImageProcessor"),
        ("max_patches", 0, "0 is not between 1 and 64"),
        ("max_patches", "16", "is not a whole number"),
        ("size", {"height": 336, "width": 336}, "336 differs from the image_size"),
        ("size", {"shortest_edge": 20}, "height is missing"),
        ("size", 20, "is not an object"),
        ("auto_map", {"AutoImageProcessor": "own.Code"}, "to run its own code"),
    ],
)
def test_another_preparation_is_refused_in_one_line(
    folder: Path, key: str, value: Any, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        max_tiles_of(folder, **{key: value})
    assert "\n" not in str(caught.value)
    assert f"preprocessor_config.json: {key}" in str(caught.value)


def test_settings_that_are_no_json_are_refused(folder: Path) -> None:
    max_tiles_of(folder)
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config.vision
    assert config is not None
    (folder / "preprocessor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_max_tiles(folder, config)


def test_the_process_cuts_as_the_settings_say_and_tells_why_not(folder: Path) -> None:
    file = picture(300, 40, 1)
    max_tiles_of(folder, max_patches=3)
    with closing(ImageEncoder(folder)) as encoder:
        (image,) = encoder.encode([file], lambda: False)
        assert (image.grid.rows, image.grid.columns) == (1, 3)
        with pytest.raises(ConfigError):
            max_tiles_of(folder, do_resize=False)
        with pytest.raises(ConfigError, match="do_resize False is not supported"):
            encoder.encode([picture(301, 40, 1)], lambda: False)
