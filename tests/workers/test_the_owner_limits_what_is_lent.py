"""--devices, --memory-limit, --threads, --leave-cores: what engine hosts hear of this computer."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.cluster.messages import DeviceInfo
from engine.errors import ConfigError
from workers.cli import app
from workers.limits import Limits, parse_devices, parse_size
from workers.slice_cache_settings import DEFAULT_LIMIT_BYTES, choose_cache

CPU = DeviceInfo(device="n/cpu", kind="cpu", label="8 cores", num_cores=8, memory_bytes=64 * 10**9)
GPU = DeviceInfo(device="n/cuda0", kind="cuda", label="GPU", num_cores=0, memory_bytes=24 * 10**9)


@pytest.mark.parametrize(
    ("limits", "devices", "cores", "memory"),
    [
        (Limits(), ["n/cpu", "n/cuda0"], 8, 64 * 10**9),
        (Limits(devices=("cpu",)), ["n/cpu"], 8, 64 * 10**9),
        (Limits(devices=("cuda0",)), ["n/cuda0"], None, None),
        (Limits(threads=3), ["n/cpu", "n/cuda0"], 3, 64 * 10**9),
        (Limits(leave_cores=3), ["n/cpu", "n/cuda0"], 5, 64 * 10**9),
        (Limits(leave_cores=0), ["n/cpu", "n/cuda0"], 8, 64 * 10**9),
        (Limits(memory="75%"), ["n/cpu", "n/cuda0"], 8, 48 * 10**9),
        (Limits(memory="8GB"), ["n/cpu", "n/cuda0"], 8, 8 * 10**9),
        (Limits(memory="1.5 gib"), ["n/cpu", "n/cuda0"], 8, 3 * 2**29),
    ],
)
def test_a_limit_lowers_what_is_told(
    limits: Limits, devices: list[str], cores: int | None, memory: int | None
) -> None:
    lent = {info.device: info for info in limits.apply([CPU, GPU])}
    assert list(lent) == devices
    if "n/cpu" in lent:
        assert (lent["n/cpu"].num_cores, lent["n/cpu"].memory_bytes) == (cores, memory)
    assert lent.get("n/cuda0", GPU) == GPU


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(devices=("cuda1",)), "this computer has no 'cuda1', it has cpu, cuda0"),
        (Limits(threads=0), "this computer has 8 cores; give 1 to 8"),
        (Limits(threads=9), "this computer has 8 cores; give 1 to 8"),
        (Limits(leave_cores=8), "give 0 to 7"),
        (Limits(leave_cores=-1), "give 0 to 7"),
        (Limits(threads=1, leave_cores=1), "give one of them"),
        (Limits(memory="65GB"), "this computer has 64.0 GB"),
        (Limits(memory="0"), "this computer has 64.0 GB"),
        (Limits(memory="101%"), "this computer has 64.0 GB"),
        (Limits(memory="0%"), "this computer has 64.0 GB"),
        (Limits(memory="-1GB"), "is no size"),
        (Limits(memory="8"), "is no size"),
        (Limits(memory="nan%"), "is no size"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_an_error(limits: Limits, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        limits.apply([CPU, GPU])


def test_sizes_and_lists_are_read_as_people_write_them() -> None:
    assert parse_size("20GB", "--cache-limit") == 20 * 10**9
    assert parse_size("512 MiB", "--cache-limit") == 512 * 2**20
    assert parse_size("0", "--cache-limit") == 0
    with pytest.raises(ConfigError, match="--cache-limit 'much' is no size"):
        parse_size("much", "--cache-limit")
    assert parse_devices(None) == ()
    assert parse_devices("cpu, cuda0") == ("cpu", "cuda0")
    with pytest.raises(ConfigError, match="empty name"):
        parse_devices("cpu,,")


def test_the_cache_takes_a_tenth_of_the_free_disk_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setenv("SHARDMIX_CACHE", str(tmp_path / "own"))
    chosen = choose_cache()
    free = shutil.disk_usage(tmp_path).free
    assert chosen.folder == str(tmp_path / "own" / "slices")
    assert 0 < chosen.limit_bytes <= min(DEFAULT_LIMIT_BYTES, free // 9)
    assert choose_cache(str(tmp_path / "x"), 5) == (str(tmp_path / "x"), 5)
    assert choose_cache(None, 0) == ("", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Choose a folder that can be written"):
        choose_cache(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("flags", "exit_code", "words"),
    [
        (["--devices=cuda99"], 1, "--devices cuda99: this computer has no 'cuda99'"),
        (["--memory-limit=much"], 1, "--memory-limit 'much' is no size"),
        (["--threads=100000"], 1, "--threads 100000"),
        (["--cache-limit=x"], 1, "--cache-limit 'x' is no size"),
        (["--name=this"], 1, "--name 'this' cannot be used"),
        (["--name=a b"], 1, "--name 'a b' cannot be used"),
        (["--host=0.0.0.0"], 1, "no address that another computer can connect to"),
        (["--host=203.0.113.9"], 1, "cannot listen on tcp://203.0.113.9:47500"),
        (["--port=80"], 2, "--port"),
        (["--threads=many"], 2, "--threads"),
    ],
)
def test_wrong_flags_are_told_in_one_line(
    flags: list[str], exit_code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDMIX_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, ["run", *flags])
    assert result.exit_code == exit_code
    assert words in result.stderr
    assert result.stdout == ""
    if exit_code == 1:
        assert result.stderr.startswith("shardmix-worker: ")
        assert result.stderr.count("\n") == 1
