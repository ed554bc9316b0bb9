"""The cache on disk behaves as a dictionary that forgets what was used least recently."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cluster.slice_cache import SliceCache

LIMIT = 4096
# A few slices are more than this.
SMALL_LIMIT = 1500


def content(number: int, length: int = 0) -> bytes:
    """Bytes that only this number has."""
    block = hashlib.sha256(str(number).encode()).digest()
    length = length or 20 + number * 37 % 400
    return (block * (length // len(block) + 1))[:length]


def sum_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.pack"))


def put_all(cache: SliceCache, slices: list[bytes]) -> None:
    for data in slices:
        cache.put(sum_of(data), data)
    cache.commit()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.lists(st.integers(0, 40), min_size=1, max_size=6)),
        st.tuples(st.just("read"), st.lists(st.integers(0, 40), max_size=6)),
        st.tuples(st.just("commit"), st.none()),
        st.tuples(st.just("reopen"), st.none()),
        st.tuples(st.just("damage"), st.integers(0, 10_000)),
    ),
    max_size=60,
)


@given(operations=OPERATIONS)
@settings(max_examples=40)
def test_what_is_found_is_right_and_within_the_limit(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, object]]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    model: dict[bytes, bytes] = {}
    latest: bytes | None = None
    cache = SliceCache(folder, SMALL_LIMIT)
    for action, argument in operations:
        if action == "put":
            assert isinstance(argument, list)
            for number in argument:
                data = content(number)
                if not cache.read([sum_of(data)]):  # It may be there, and damaged.
                    cache.put(sum_of(data), data)
                model[sum_of(data)] = data
                latest = sum_of(data)
        elif action == "read":
            assert isinstance(argument, list)
            wanted = [sum_of(content(number)) for number in argument]
            found = cache.read(wanted)
            assert found.keys() <= set(wanted) & model.keys()
            assert all(bytes(found[s]) == model[s] for s in found)
        elif action == "commit":
            cache.commit()
        elif action == "reopen":
            cache.close()
            cache = SliceCache(folder, SMALL_LIMIT)
        else:
            assert isinstance(argument, int)
            packs = sorted(folder.glob("*.pack"))
            if packs and folder_bytes(folder):
                pack = packs[argument % len(packs)]
                raw = bytearray(pack.read_bytes())
                if raw:
                    raw[argument % len(raw)] ^= 0x55
                    pack.write_bytes(raw)
                latest = None
        assert cache.num_bytes <= SMALL_LIMIT
        if latest is not None:
            assert latest in cache.read([latest])
    cache.close()
    assert folder_bytes(folder) <= SMALL_LIMIT


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    slices = [content(number, 100) for number in range(30)]
    with SliceCache(tmp_path, LIMIT) as cache:
        put_all(cache, slices)
        kept = slices[:5]
        for number in range(100, 120):
            assert len(cache.read([sum_of(data) for data in kept])) == 5
            put_all(cache, [content(number, 100)])
        assert cache.num_bytes <= LIMIT
        assert len(cache.read([sum_of(data) for data in kept])) == 5
        assert len(cache.read([sum_of(data) for data in slices])) < 30
        latest = [sum_of(content(number, 100)) for number in range(110, 120)]
        assert len(cache.read(latest)) == 10


def test_a_damaged_slice_is_dropped_and_the_others_stay(tmp_path: Path) -> None:
    slices = [content(number, 200) for number in range(2)]
    with SliceCache(tmp_path, LIMIT) as cache:
        put_all(cache, slices)
    (pack,) = tmp_path.glob("*.pack")
    raw = bytearray(pack.read_bytes())
    raw[7] ^= 1
    pack.write_bytes(raw)
    sums = [sum_of(data) for data in slices]
    with SliceCache(tmp_path, LIMIT) as cache:
        assert set(cache.read(sums)) == {sums[1]}
        cache.put(sums[0], slices[0])
        cache.commit()
        assert bytes(cache.read(sums)[sums[0]]) == slices[0]


@pytest.mark.parametrize("loss", ["pack removed", "pack cut short", "index overwritten"])
def test_lost_files_are_slices_that_are_not_there(tmp_path: Path, loss: str) -> None:
    slices = [content(number, 200) for number in range(2)]
    with SliceCache(tmp_path, LIMIT) as cache:
        put_all(cache, slices)
    (pack,) = tmp_path.glob("*.pack")
    if loss == "pack removed":
        pack.unlink()
    elif loss == "pack cut short":
        os.truncate(pack, 150)
    else:
        (tmp_path / "index.sqlite").write_bytes(b"no database at all" * 100)
    sums = [sum_of(data) for data in slices]
    with SliceCache(tmp_path, LIMIT) as cache:
        assert cache.read(sums) == {}
        put_all(cache, slices)
        assert len(cache.read(sums)) == 2
    assert folder_bytes(tmp_path) <= LIMIT


def test_a_folder_that_cannot_be_used_only_turns_the_cache_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    with SliceCache(blocked, LIMIT) as cache:
        put_all(cache, [content(1)])
        assert cache.read([sum_of(content(1))]) == {}
    assert f"the weight cache in {blocked} is not used" in caplog.text


def test_a_disk_that_takes_no_more_leaves_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = content(1, 100), content(2, 100)
    with SliceCache(tmp_path, LIMIT) as cache:
        put_all(cache, [first])
        (pack,) = tmp_path.glob("*.pack")
        data = pack.read_bytes()
        pack.unlink()
        pack.mkdir()  # Nothing can be written there, whoever asks.
        put_all(cache, [second])
        pack.rmdir()
        pack.write_bytes(data)
        assert f"the weight cache in {tmp_path} takes nothing more" in caplog.text
        assert bytes(cache.read([sum_of(first)])[sum_of(first)]) == first


def test_a_limit_of_zero_keeps_nothing(tmp_path: Path) -> None:
    with SliceCache(tmp_path / "none", 0) as cache:
        put_all(cache, [content(1)])
        assert cache.read([sum_of(content(1))]) == {}
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(os.name == "nt", reason="modes are a Unix matter")
def test_only_the_user_can_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "slices"
    with SliceCache(folder, LIMIT) as cache:
        put_all(cache, [content(1)])
        paths = list(folder.iterdir())
        assert len(paths) >= 3
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


_WRITER = """
import hashlib, sys
from pathlib import Path
from engine.cluster.slice_cache import SliceCache

folder, first, count, ending = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
cache = SliceCache(folder, 1 << 20)
for number in range(first, first + count):
    data = hashlib.sha256(str(number).encode()).digest() * 30
    cache.put(hashlib.sha256(data).digest(), data)
    if number % 10 == 9:
        cache.commit()
if ending == "wait":
    print("ready", flush=True)
    sys.stdin.read()
cache.close()
"""


def start_writer(folder: Path, first: int, count: int, ending: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _WRITER, str(folder), str(first), str(count), ending]
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def written(first: int, count: int) -> list[bytes]:
    numbers = range(first, first + count)
    return [sum_of(hashlib.sha256(str(n).encode()).digest() * 30) for n in numbers]


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, 200 * n, 300, "end") for n in range(3)]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    with SliceCache(tmp_path, 1 << 20) as cache:
        assert len(cache.read(written(0, 700))) == 700


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_process_loses_at_most_its_last_batch(tmp_path: Path) -> None:
    writer = start_writer(tmp_path, 0, 55, "wait")
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=30)
    with SliceCache(tmp_path, 1 << 20) as cache:
        assert len(cache.read(written(0, 50))) == 50
        # Its half full pack is used further.
        put_all(cache, [content(1)])
    assert len(list(tmp_path.glob("*.pack"))) == 1


def test_packs_that_the_index_does_not_know_are_removed(tmp_path: Path) -> None:
    with SliceCache(tmp_path, LIMIT) as cache:
        put_all(cache, [content(1)])
    (tmp_path / "0123456789abcdef.pack").write_bytes(b"x" * 10 * LIMIT)
    with SliceCache(tmp_path, LIMIT) as cache:
        assert len(cache.read([sum_of(content(1))])) == 1
    assert folder_bytes(tmp_path) <= LIMIT


def test_an_index_locked_for_long_turns_nothing_wrong(tmp_path: Path) -> None:
    """A process that is frozen in a transaction: others read on, and keep nothing new."""
    with SliceCache(tmp_path, LIMIT) as cache:
        put_all(cache, [content(1)])
    other = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with SliceCache(tmp_path, LIMIT) as cache:
            assert len(cache.read([sum_of(content(1))])) == 1
            put_all(cache, [content(2)])
    finally:
        other.close()
    with SliceCache(tmp_path, LIMIT) as cache:
        assert set(cache.read([sum_of(content(n)) for n in (1, 2)])) == {sum_of(content(1))}
