"""A network of computers, where the system allows one, that fails a test which leaves something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.network import Network, why_impossible

_skipped_for: list[str] = []


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """A switch without computers yet; skips where there can be none, and says why."""
    yield from _network(tmp_path)


@pytest.fixture(scope="module")
def shared_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """The same for all tests of a file."""
    yield from _network(tmp_path_factory.mktemp("shared"))


def _network(folder: Path) -> Iterator[Network]:
    reason = why_impossible()
    if reason:
        _skipped_for.append(reason)
        pytest.skip(reason)
    made = Network(folder / "computers")
    try:
        yield made
    finally:
        left = made.close()
    if left:
        pytest.fail(f"left on the computers of the bench: {'; '.join(left)}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it where nobody asked for reasons of skips: these tests are missing from the run."""
    if _skipped_for:
        terminalreporter.write_line(
            f"{len(_skipped_for)} tests need computers on a network of their own and did not run: "
            f"{_skipped_for[0]}"
        )
