"""Permanent keys and allow lists on disk: private, whole, and shared by processes."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cluster.identity import (
    TrustedPeer,
    TrustedPeers,
    config_dir,
    fingerprint,
    load_identity,
)
from engine.cluster.security import new_key_pair
from engine.errors import ConfigError

private_files = pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")


def peer(name: str) -> TrustedPeer:
    """Somebody new."""
    return TrustedPeer(public_key=new_key_pair().public, name=name, added_s=1.0)


def test_the_key_stays_the_same(tmp_path: Path) -> None:
    first = load_identity(tmp_path / "new" / "folder")
    assert load_identity(tmp_path / "new" / "folder") == first
    assert load_identity(tmp_path / "other") != first


def test_the_folder_is_the_one_that_was_chosen(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config_dir() == own_settings
    monkeypatch.delenv("SHARDMIX_CONFIG")
    assert config_dir().name == "shardmix"


@private_files
def test_only_its_owner_can_read_the_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = load_identity(tmp_path)
    path = tmp_path / "identity.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert load_identity(tmp_path) == keys
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "could be used by others (mode 644)" in caplog.text


def test_processes_that_start_at_once_get_the_same_key(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from engine.cluster.identity import load_identity; "
        "sys.stdin.readline(); print(load_identity(pathlib.Path(sys.argv[1])).public.decode())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    keys = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert keys == {load_identity(tmp_path).public.decode()}


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"public": "x", "secret": "y"}'])
def test_a_damaged_key_is_an_error_that_names_its_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"identity\.json.*is damaged\. Remove it"):
        load_identity(tmp_path)
    assert path.read_bytes() == content


def test_halves_that_do_not_belong_together_are_damage(tmp_path: Path) -> None:
    load_identity(tmp_path)
    path = tmp_path / "identity.json"
    other = new_key_pair().public.decode()
    text = path.read_text()
    start = text.index(":") + 2
    path.write_text(text[:start] + other.replace('"', "") + text[start + 40 :])
    with pytest.raises(ConfigError, match="damaged"):
        load_identity(tmp_path)


def test_a_fingerprint_is_short_and_tells_keys_apart() -> None:
    one, two = new_key_pair().public, new_key_pair().public
    assert fingerprint(one) == fingerprint(one) != fingerprint(two)
    assert len(fingerprint(one)) == 23


def test_a_list_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "trusted.json"
    peers = TrustedPeers(path)
    attic, cellar = peer("attic"), peer("cellar")
    peers.add(attic)
    peers.add(cellar)
    assert list(TrustedPeers(path)) == [attic, cellar]
    assert TrustedPeers(path).keys() == (attic.public_key, cellar.public_key)
    assert peers.remove(attic.public_key)
    assert not peers.remove(attic.public_key)
    assert list(TrustedPeers(path)) == [cellar]
    if os.name != "nt":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_same_key_is_there_once(tmp_path: Path) -> None:
    peers = TrustedPeers(tmp_path / "trusted.json")
    attic = peer("attic")
    peers.add(attic)
    moved = TrustedPeer(
        public_key=attic.public_key, name="attic", added_s=2.0, endpoint="tcp://10.0.0.9:47500"
    )
    peers.add(moved)
    assert list(peers) == [moved]


def test_two_programs_do_not_lose_each_others_entries(tmp_path: Path) -> None:
    one, two = TrustedPeers(tmp_path / "t.json"), TrustedPeers(tmp_path / "t.json")
    attic, cellar = peer("attic"), peer("cellar")
    one.add(attic)
    two.add(cellar)
    assert list(two) == [attic, cellar]
    assert list(one) == [attic]
    assert one.reload_if_changed()
    assert list(one) == [attic, cellar]
    assert not one.reload_if_changed()


def test_a_damaged_list_is_an_error_and_changes_nobodys_mind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.json"
    peers = TrustedPeers(path)
    attic = peer("attic")
    peers.add(attic)
    path.write_bytes(b"[{]")
    assert not peers.reload_if_changed()
    assert "is damaged" in caplog.text
    assert peers.keys() == (attic.public_key,)
    with pytest.raises(ConfigError, match=r"t\.json.*is damaged\. Remove it"):
        TrustedPeers(path)
