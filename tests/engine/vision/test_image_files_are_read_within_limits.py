"""Paths that a person named: files are read, in number and size that are stated; nothing else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from engine.errors import PromptError
from engine.vision.files import (
    MAX_FILE_BYTES,
    MAX_IMAGES,
    MAX_REQUEST_BYTES,
    read_image_file,
    read_image_files,
)


def refusal(*paths: Path | str) -> str:
    with pytest.raises(PromptError) as caught:
        read_image_files([str(path) for path in paths])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_without_a_writer_is_refused_at_once(tmp_path: Path) -> None:
    """Opening it waited for a writer, and with it everybody's prompts."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert refusal(pipe) == (
        f"image 1 cannot be read from {pipe}: it is a pipe or a device, only files are read. "
        "Give the path of an image file"
    )


def test_folders_and_devices_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"image 1 cannot be read from {tmp_path}: ")
    if sys.platform != "win32":
        assert "it is a folder" in refusal(tmp_path)
        assert "it is a pipe or a device" in refusal("/dev/zero")


def test_paths_that_no_system_can_open_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").startswith("image 1 cannot be read from")
    assert "null byte" in refusal("a\0b")


def test_a_path_given_often_is_read_once(tmp_path: Path) -> None:
    file, other = tmp_path / "one", tmp_path / "other"
    file.write_bytes(os.urandom(MAX_FILE_BYTES))
    other.write_bytes(b"\r\n\x1a")
    paths = [str(file)] * (MAX_IMAGES - 1) + [str(other)]
    found = read_image_files(paths)
    assert found[0] == file.read_bytes()
    assert all(data is found[0] for data in found[:-1])
    assert found[-1] == b"\r\n\x1a"


def test_too_many_images_are_refused_before_one_is_read(tmp_path: Path) -> None:
    message = refusal(*[tmp_path / "absent"] * (MAX_IMAGES + 1))
    assert message.startswith(f"{MAX_IMAGES + 1} images in one request, at most {MAX_IMAGES}")


def test_too_many_bytes_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / str(n) for n in range(MAX_REQUEST_BYTES // MAX_FILE_BYTES + 1)]
    for path in paths:
        with path.open("wb") as stream:
            stream.truncate(MAX_FILE_BYTES)
    assert len(read_image_files([str(path) for path in paths[:-1]])) == len(paths) - 1
    assert refusal(*paths) == (
        f"with image {len(paths)} the images of the request have more than 128 MiB, the most that "
        "is read. Give fewer or smaller files"
    )
    with paths[0].open("r+b") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    assert refusal(paths[0]) == "image 1 is larger than 32 MiB. Give a smaller file"
    with pytest.raises(PromptError, match="image 7 is larger than 32 MiB"):
        read_image_file(str(paths[0]), 7)
