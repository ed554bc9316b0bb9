"""Who is on the network: workers say that they are there, engine hosts listen (mDNS).

In: where a worker listens and its key; what others say. Out: proposals. Anybody on the network can
forge them: they are for a person to look at, and for finding a key that is trusted already at its
new address. Without multicast nothing is found and everything else works.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NamedTuple

import zeroconf

from engine.cluster.identity import fingerprint
from engine.cluster.join_token import NODE_NAME
from engine.cluster.messages import PROTOCOL_VERSION
from engine.cluster.security import is_public_key

logger = logging.getLogger(__name__)

# "off", or the addresses of the interfaces to use, separated by commas; all of them by default.
DISCOVERY_VARIABLE = "SHARDMIX_DISCOVERY"
SERVICE_TYPE = "_shardmix._tcp.local."
QUESTION_MS = 3000
# Interfaces come and go: a laptop wakes, a cable is plugged in.
INTERFACES_SECONDS = 5.0
# What a flood of forged announcements may fill.
MAX_FOUND = 256
_CLOSE_SECONDS = 3.0


class Found(NamedTuple):
    """A worker that somebody announced.

    Attributes:
        public_key: Z85.
        endpoint: "tcp://ADDRESS:PORT" of its control socket.
        version: of its program.
        protocol: of its messages.
    """

    name: str
    public_key: bytes
    endpoint: str
    version: str
    protocol: int


class Advertiser:
    """Announces one worker until it is closed; a log line where that is not possible."""

    def __init__(self, name: str, public_key: bytes, endpoint: str) -> None:
        """Begin, in a thread: asking whether the name is free takes a moment.

        Args:
            endpoint: "tcp://ADDRESS:PORT"; also the interface to announce on.
        """
        address, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        address = address.strip("[]")
        mark = fingerprint(public_key).replace(":", "")
        self._info = zeroconf.ServiceInfo(
            SERVICE_TYPE,
            f"{name[:40]}-{mark}.{SERVICE_TYPE}",  # Unique by the key, readable by the name.
            port=int(port),
            parsed_addresses=[address],
            server=f"shardmix-{mark}.local.",
            properties={
                "protocol": str(PROTOCOL_VERSION),
                "key": public_key.decode("ascii"),
                "version": metadata.version("shardmix"),
                "name": name,
            },
        )
        self._zeroconf: zeroconf.Zeroconf | None = None
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None
        interfaces = _interfaces()
        if interfaces is None:
            return
        if interfaces == []:
            interfaces = [address]
        self._thread = threading.Thread(
            target=self._run, args=(interfaces,), name="advertiser", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Say that the worker is gone."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def _run(self, interfaces: Sequence[str]) -> None:
        _persist(
            lambda: self._announce(interfaces),
            self._is_closed,
            "this worker cannot be announced on the network (%s): add it by its address",
        )

    def _announce(self, interfaces: Sequence[str]) -> None:
        with zeroconf.Zeroconf(interfaces=list(interfaces)) as zero:
            zero.register_service(self._info)
            self._is_closed.wait()
            zero.unregister_service(self._info)


class Browser:
    """Listens for workers until it is closed; a log line where that is not possible."""

    def __init__(self, on_found: Callable[[Found], None], on_gone: Callable[[bytes], None]) -> None:
        """Begin.

        Args:
            on_found: a worker is announced, or announced anew at another address.
            on_gone: the worker with this key has said goodbye, or has not been heard of for long.
                Both are called from a thread of their own and must return soon.
        """
        self._on_found = on_found
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._keys: dict[str, bytes] = {}
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None
        interfaces = _interfaces()
        if interfaces is None:
            return
        self._thread = threading.Thread(
            target=self._run, args=(interfaces,), name="browser", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Listen no longer."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    # ---- the interface that zeroconf calls, from its own thread --------------------------------

    def add_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        """A service has appeared."""
        self._ask(zc, type_, name)

    def update_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        """A service has changed."""
        self._ask(zc, type_, name)

    def remove_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        """A service is gone."""
        del zc, type_
        with self._lock:
            key = self._keys.pop(name, None)
            is_elsewhere = key in self._keys.values()
        if key is not None and not is_elsewhere and not self._is_closed.is_set():
            self._on_gone(key)

    def _ask(self, zero: zeroconf.Zeroconf, kind: str, name: str) -> None:
        info = zero.get_service_info(kind, name, QUESTION_MS)
        found = read_announcement(info) if info is not None else None
        if found is None or self._is_closed.is_set():
            return
        with self._lock:
            if name not in self._keys and len(self._keys) >= MAX_FOUND:
                return
            self._keys[name] = found.public_key
        self._on_found(found)

    def _run(self, interfaces: Sequence[str]) -> None:
        _persist(
            lambda: self._listen(interfaces),
            self._is_closed,
            "nodes on the network are not found by themselves (%s): add them by address",
        )

    def _listen(self, interfaces: Sequence[str]) -> None:
        chosen = list(interfaces) or zeroconf.InterfaceChoice.All
        with zeroconf.Zeroconf(interfaces=chosen) as zero:
            zero.add_service_listener(SERVICE_TYPE, self)  # type: ignore[arg-type]
            while not self._is_closed.wait(INTERFACES_SECONDS):
                if not interfaces:
                    zero.update_interfaces()


def _persist(work: Callable[[], None], is_closed: threading.Event, complaint: str) -> None:
    """Do what needs a network until it is no longer wanted; a service may start before there is one."""
    is_told = False
    while not is_closed.is_set():
        try:
            work()
        except (OSError, zeroconf.Error) as error:
            if not is_told:
                logger.warning(complaint, str(error) or type(error).__name__)
            is_told = True
            is_closed.wait(INTERFACES_SECONDS)


def read_announcement(info: zeroconf.ServiceInfo) -> Found | None:
    """What an announcement says, or None for one that is damaged, forged badly, or of another make."""
    properties = info.decoded_properties
    name, key = properties.get("name") or "", (properties.get("key") or "").encode()
    protocol = properties.get("protocol") or ""
    version = (properties.get("version") or "")[:32]
    if not NODE_NAME.fullmatch(name) or not is_public_key(key) or not version.isprintable():
        return None
    if not (protocol.isascii() and protocol.isdecimal() and len(protocol) < 6):
        return None
    if info.port is None or not 0 < info.port < 65536 - 1:
        return None
    for text in info.parsed_addresses():
        address = ipaddress.ip_address(text)
        if not address.is_multicast and not address.is_unspecified:
            shown = f"[{text}]" if address.version == 6 else text
            return Found(name, key, f"tcp://{shown}:{info.port}", version, int(protocol))
    return None


def _interfaces() -> list[str] | None:
    """Addresses of the interfaces to use; empty for all, None for no discovery."""
    setting = os.environ.get(DISCOVERY_VARIABLE, "").strip()
    if setting == "off":
        return None
    return [address.strip() for address in setting.split(",") if address.strip()]
