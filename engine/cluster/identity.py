"""Who this installation is, and whom it trusts: permanent keys on disk.

In: the folder of settings. Out: this installation's key pair, and lists of other installations'
public keys. Who is asked to be trusted, and by what right, is decided elsewhere (`pairing`,
`join_token`).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import platformdirs

from engine.cluster.private_file import locked, read_private, write_private
from engine.cluster.security import KeyPair, is_public_key, new_key_pair, public_half
from engine.errors import ConfigError

logger = logging.getLogger(__name__)

CONFIG_VARIABLE = "SHARDMIX_CONFIG"
IDENTITY_FILE = "identity.json"
# What a person compares at a glance; the whole key is compared by the programs.
FINGERPRINT_BYTES = 8


class _StoredKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    public: str
    secret: str


class TrustedPeer(msgspec.Struct, frozen=True, kw_only=True):
    """Another installation that this one trusts.

    Attributes:
        public_key: its permanent key (Z85), which is its identity.
        name: what a person calls it.
        added_s: when it was added, seconds since the epoch.
        endpoint: where it listened last; "" for one that only connects to us.
    """

    public_key: bytes
    name: str
    added_s: float
    endpoint: str = ""


class _StoredPeer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    public_key: str
    name: str
    added_s: float
    endpoint: str = ""


def config_dir() -> Path:
    """The folder of this installation's key and of its lists of trusted ones; may not exist yet."""
    chosen = os.environ.get(CONFIG_VARIABLE)
    return Path(chosen) if chosen else platformdirs.user_config_path("shardmix", appauthor=False)


def load_identity(folder: Path) -> KeyPair:
    """The permanent key pair of this installation, made on first use.

    Raises: ConfigError: its file is damaged, or cannot be read or written.
    """
    path = folder / IDENTITY_FILE
    content = read_private(path)
    if content is None:
        with locked(path):  # Two processes that start at once get the same key.
            content = read_private(path)
            if content is None:
                keys = new_key_pair()
                content = msgspec.json.encode(
                    _StoredKeys(keys.public.decode("ascii"), keys.secret.decode("ascii"))
                )
                write_private(path, content)
    try:
        stored = msgspec.json.decode(content, type=_StoredKeys)
        keys = KeyPair(stored.public.encode("ascii"), stored.secret.encode("ascii"))
        if public_half(keys.secret) != keys.public:
            raise ValueError
    except (ValueError, msgspec.DecodeError):
        raise ConfigError(
            f"{path} holds the key of this installation and is damaged. Remove it, then pair again "
            "with every other computer"
        ) from None
    return keys


def fingerprint(public_key: bytes) -> str:
    """A short form of a key for people: 8 bytes of its SHA-256, such as "7f:a2:…"."""
    return hashlib.sha256(public_key).digest()[:FINGERPRINT_BYTES].hex(":")


class TrustedPeers:
    """An allow list on disk, one entry per key, that several processes may read and change."""

    def __init__(self, path: Path) -> None:
        """Read the list; a missing file is an empty one.

        Raises: ConfigError: the file is damaged, or cannot be read.
        """
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._peers: dict[bytes, TrustedPeer] = {}
        self._read()

    def __iter__(self) -> Iterator[TrustedPeer]:
        """In the order in which they were added."""
        return iter(list(self._peers.values()))

    def get(self, public_key: bytes) -> TrustedPeer | None:
        """The entry of a key, if there is one."""
        return self._peers.get(public_key)

    def keys(self) -> tuple[bytes, ...]:
        """All keys on the list."""
        return tuple(self._peers)

    def add(self, peer: TrustedPeer) -> None:
        """Put a peer on the list, in the place of an entry with the same key.

        Raises: ConfigError: the file cannot be changed.
        """
        with locked(self._path):
            self._read()
            self._write({**self._peers, peer.public_key: peer})

    def remove(self, public_key: bytes) -> bool:
        """Take a key off the list.

        Returns: whether it was on it.
        Raises: ConfigError: the file cannot be changed.
        """
        with locked(self._path):
            self._read()
            if public_key not in self._peers:
                return False
            self._write({key: p for key, p in self._peers.items() if key != public_key})
            return True

    def reload_if_changed(self) -> bool:
        """Take over what another process changed; True if that was something.

        A list that was damaged since is not taken over: the log says so.
        """
        if self._read_stamp() == self._stamp:
            return False
        before = dict(self._peers)
        try:
            self._read()
        except ConfigError as error:
            logger.warning("%s", error)
            return False
        return self._peers != before

    def _read_stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _read(self) -> None:
        # Before the content: a change in between is then seen by the next look.
        self._stamp = self._read_stamp()
        content = read_private(self._path)
        if content is None:
            self._peers = {}
            return
        try:
            peers = [
                TrustedPeer(
                    public_key=stored.public_key.encode("ascii"),
                    name=stored.name,
                    added_s=stored.added_s,
                    endpoint=stored.endpoint,
                )
                for stored in msgspec.json.decode(content, type=list[_StoredPeer])
            ]
            if not all(is_public_key(peer.public_key) for peer in peers):
                raise ValueError
        except (ValueError, msgspec.DecodeError):
            raise ConfigError(
                f"{self._path} lists the computers that this one trusts and is damaged. Remove it, "
                "then pair again with them"
            ) from None
        self._peers = {peer.public_key: peer for peer in peers}

    def _write(self, peers: dict[bytes, TrustedPeer]) -> None:
        stored = [
            _StoredPeer(peer.public_key.decode("ascii"), peer.name, peer.added_s, peer.endpoint)
            for peer in peers.values()
        ]
        write_private(self._path, msgspec.json.format(msgspec.json.encode(stored)) + b"\n")
        self._stamp = self._read_stamp()
        self._peers = peers
