"""What a model's folder says about the preparation of its images.

In: the folder and the configuration of the encoder. Out: the most tiles of an image, or one line
for whatever would be prepared otherwise than `engine.vision.tiles` does.
"""

from __future__ import annotations

from pathlib import Path

from engine.model.config import VisionConfig
from engine.weights.json_settings import Settings, read_json_object, refuse_own_code

FILE_NAME = "preprocessor_config.json"
DEFAULT_MAX_TILES = 16
MAX_TILES = 64
_BILINEAR = 2  # Pillow's number
_PROCESSOR = "Llama4ImageProcessor"
_RESCALE_TOLERANCE = 1e-9  # 1 / 255 as written by float32 and float64
# Values that change nothing of what we compute; the defaults of transformers are among them.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_center_crop": (False,),
    "do_pad": (False,),
    "resample": (_BILINEAR, "bilinear"),
    "resize_to_max_canvas": (False,),
}


def read_max_tiles(model: Path, config: VisionConfig) -> int:
    """The most tiles that an image is cut into, the whole image not counted.

    Args:
        model: file or folder; a file, and a folder without the settings, has the defaults.
        config: validated.
    Raises: ConfigError: the settings ask for another preparation than ours.
        CheckpointError: they cannot be read.
    Source: transformers models/llama4.
    """
    path = model / FILE_NAME
    if not path.exists():
        return DEFAULT_MAX_TILES
    settings = Settings(path, read_json_object(path))
    refuse_own_code(path, settings.values)
    for key in ("image_processor_type", "feature_extractor_type"):
        if key in settings and not str(settings.values[key]).startswith(_PROCESSOR):
            raise settings.fail(
                key, f"{settings.shown(key)} is not supported; use a model with {_PROCESSOR}"
            )
    settings.refuse_unsupported(_NEUTRAL)
    for key in ("image_mean", "image_std"):
        _check_halves(settings, key, config.num_channels)
    factor = settings.number("rescale_factor", 1 / 255)
    if not abs(factor - 1 / 255) <= _RESCALE_TOLERANCE:
        raise settings.fail(
            "rescale_factor", f"{factor} is not supported, only 1/255; use a model with that"
        )
    size = settings.section("size")
    for key in ("height", "width") if size is not None else ():
        assert size is not None
        if (edge := size.integer(key)) != config.image_size:
            raise size.fail(
                key,
                f"{edge} differs from the image_size {config.image_size} of config.json; use the "
                "settings that belong to the model",
            )
    return settings.between("max_patches", 1, MAX_TILES, DEFAULT_MAX_TILES)


def _check_halves(settings: Settings, key: str, num_channels: int) -> None:
    if key in settings and settings.values[key] not in (0.5, [0.5] * num_channels):
        raise settings.fail(
            key,
            f"{settings.shown(key)} is not supported, only 0.5 for each of the {num_channels} "
            "channels; use a model with that",
        )
