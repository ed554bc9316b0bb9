"""`shardmix nodes`: list, pair by the digits of the other screen, forget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cluster.identity import fingerprint
from tests.engine.host.elsewhere import Elsewhere, Person, remembered

pytestmark = pytest.mark.network


def shardmix(*arguments: str) -> Person:
    """Somebody at this computer runs a command."""
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.cli", "nodes", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Person(process)


def test_a_computer_is_paired_listed_and_forgotten(tmp_path: Path) -> None:
    with Elsewhere(tmp_path / "attic") as attic:
        with attic.wait_for_pairing() as there:
            there.read_until("Waiting")
            with shardmix("pair", f"127.0.0.1:{attic.port}") as here:
                code = there.code()
                here.answer(code)  # What a script can do: type what the other screen shows.
                there.answer("y")
                status, output, _ = here.ended()
                assert (status, output) == (0, "attic is paired and ready: attic/cpu\n")
            assert there.ended()[0] == 0

        with shardmix("--json") as here:
            status, output, _ = here.ended()
        assert status == 0
        nodes = {node["name"]: node for node in json.loads(output)}
        assert nodes.keys() == {"this", "attic"}
        assert nodes["attic"]["state"] == "ready"
        assert nodes["attic"]["fingerprint"] == fingerprint(attic.key.encode())
        assert nodes["attic"]["address"] == f"127.0.0.1:{attic.port}"

        with shardmix("forget", "attic") as here:
            assert here.ended()[:2] == (0, "attic is forgotten.\n")
        assert remembered() == []


def test_the_wrong_digits_pair_nothing(tmp_path: Path) -> None:
    with Elsewhere(tmp_path / "attic") as attic, attic.wait_for_pairing() as there:
        there.read_until("Waiting")
        with shardmix("pair", f"127.0.0.1:{attic.port}") as here:
            code = there.code()
            here.answer(f"{(int(code) + 1) % 10**6:06d}")
            status, output, errors = here.ended()
        assert (status, output) == (1, "")
        assert errors.splitlines()[-1] == (
            "shardmix: the codes were not the same, says the person at this computer"
        )
        assert there.ended()[0] == 1
        assert remembered() == []


def test_a_name_that_nobody_has_is_one_line() -> None:
    with shardmix("pair", "cellar") as here:
        status, _, errors = here.ended()
    assert status == 1
    assert "no node called 'cellar' was found, only this" in errors
    assert len(errors.splitlines()) == 1
