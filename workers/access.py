"""Who may talk to a worker, and as what.

In: the list of paired engine hosts on disk, the installation's own key, keys of join tokens. Out:
the gatekeeper's allow list, and each key's standing. A connection that stands when its key is taken
off the list is not cut, so the worker asks for the standing at every message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.cluster.identity import TrustedPeers
from engine.cluster.security import Gatekeeper

DOMAIN = "worker"
Standing = Literal["owner", "host", "guest", "stranger"]


@dataclass(slots=True)
class _Guest:
    """A join token's key; `used_for` is the permanent key that came with it."""

    expires_at: float
    used_for: bytes | None = None


class Access:
    """The allow list of a worker's control socket."""

    def __init__(
        self, gatekeeper: Gatekeeper, owner: bytes, trusted: TrustedPeers | None = None
    ) -> None:
        """Let in `owner` and the trusted.

        Args:
            owner: public key of whoever started this worker: the engine host of this computer, or
                this installation itself.
        """
        self._gatekeeper = gatekeeper
        self._owner = owner
        self._trusted = trusted
        self._guests: dict[bytes, _Guest] = {}
        self._apply()

    def standing(self, key: bytes) -> Standing:
        """What a key may do: "owner" everything, "host" compute, "guest" enrol once."""
        if key == self._owner:
            return "owner"
        if self._trusted is not None and self._trusted.get(key) is not None:
            return "host"
        return "guest" if key in self._guests else "stranger"

    def invite(self, guest_key: bytes, expires_at: float) -> None:
        """Let a join token's key in until `expires_at`, seconds of the monotonic clock."""
        self._guests[guest_key] = _Guest(expires_at)
        self._apply()

    def used_for(self, guest_key: bytes) -> bytes | None:
        """The key that a join token let in; None while it is good for one."""
        return self._guests[guest_key].used_for

    def use_up(self, guest_key: bytes, host_key: bytes) -> None:
        """A join token has let `host_key` in, which is trusted from now on."""
        self._guests[guest_key].used_for = host_key
        self._apply()

    def refresh(self, now: float) -> None:
        """Drop tokens that expired, and take over what other processes changed on disk."""
        expired = [key for key, guest in self._guests.items() if now >= guest.expires_at]
        for key in expired:
            del self._guests[key]
        has_changed = self._trusted is not None and self._trusted.reload_if_changed()
        if expired or has_changed:
            self._apply()

    def trust_changed(self) -> None:
        """The list of the trusted was changed by this process."""
        self._apply()

    def _apply(self) -> None:
        trusted = self._trusted.keys() if self._trusted is not None else ()
        # Whoever is trusted no longer must not come back by the token that let it in.
        known = {None, self._owner, *trusted}
        self._guests = {key: g for key, g in self._guests.items() if g.used_for in known}
        unused = [key for key, guest in self._guests.items() if guest.used_for is None]
        self._gatekeeper.allow(DOMAIN, self._owner, *trusted, *unused)


def printable(name: str, limit: int = 64) -> str:
    """A peer's name for itself, fit for a log, a list and an answer."""
    shown = "".join(c if c.isprintable() else " " for c in name[: limit * 4])
    return " ".join(shown.split())[:limit] or "a nameless computer"
