"""The desk of a worker that people and other computers come to: commands, join tokens, pairing.

In: messages of this installation's own commands, of guests with a join token, of the pairing
socket. Out: answers, and a changed list of trusted engine hosts. It computes nothing and knows
nothing of plans. Workers that an engine host starts itself have none.
"""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

import zmq

from engine.cluster import messages as m
from engine.cluster.identity import TrustedPeer, TrustedPeers, fingerprint
from engine.cluster.join_token import TOKEN_SECONDS, JoinToken
from engine.cluster.pairing import pairing_endpoint
from engine.cluster.security import Gatekeeper, KeyPair, is_public_key, new_key_pair
from engine.errors import ConfigError, PeerRefused
from workers import local_messages as local
from workers.access import Access, printable
from workers.pairing import PairingDesk

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
# Refusals that `shardmix-worker status` shows.
SHOWN_REFUSALS = 10


class Activity(NamedTuple):
    """What the worker does right now, for its status; `holder_key` is b"" when nobody has it."""

    holder: str
    holder_key: bytes
    runners: dict[str, int]


class Reception:
    """Everything but computing; used by the worker's loop alone."""

    def __init__(
        self,
        context: zmq.Context[Any],
        gatekeeper: Gatekeeper,
        description: m.NodeDescription,
        keys: KeyPair,
        endpoint: str,
        trusted: TrustedPeers,
        access: Access,
    ) -> None:
        """Args: endpoint: of the control socket; pairing has the port after it."""
        self._gatekeeper = gatekeeper
        self._description = description
        self._keys = keys
        self._endpoint = endpoint
        self._trusted = trusted
        self._access = access
        self._refresh_at = 0.0
        self._desk = PairingDesk(
            context,
            gatekeeper,
            pairing_endpoint(endpoint),
            keys.public,
            description.name,
            self._trust,
        )

    def step(self, now: float) -> None:
        """Hear the pairing socket, and see to everything that has a deadline.

        To be called several times a second: nobody is woken by what comes to the pairing socket.
        """
        self._desk.step(now)
        if now >= self._refresh_at:
            self._refresh_at = now + REFRESH_SECONDS
            self._access.refresh(now)

    def enroll(self, message: m.Enroll, guest_key: bytes) -> m.Enrolled:
        """Trust the engine host that came with a join token.

        Raises:
            PeerRefused: the token is used up, or the key is none.
            ConfigError: the list of the trusted cannot be written.
        """
        if not is_public_key(message.public_key):
            raise PeerRefused("the key to be let in is not one; install the same version on both")
        is_trusted = self._access.standing(message.public_key) in ("owner", "host")
        used_for = self._access.used_for(guest_key)
        if used_for is None:
            if not is_trusted:
                self._trust(message.public_key, printable(message.host_name))
            self._access.use_up(guest_key, message.public_key)
        elif used_for != message.public_key or not is_trusted:
            raise PeerRefused(
                "this join token was used already; make a new one there with "
                "`shardmix-worker token`"
            )
        return m.Enrolled()

    def make_token(self, now: float) -> local.Token:
        """A fresh join token; the ones before it stay valid."""
        guest = new_key_pair()
        self._access.invite(guest.public, now + TOKEN_SECONDS)
        token = JoinToken(
            self._description.name,
            self._endpoint,
            self._keys.public,
            guest,
            time.time() + TOKEN_SECONDS,
        )
        return local.Token(token=token.encode(), seconds=TOKEN_SECONDS)

    def answer(self, request: local.LocalRequest, activity: Activity, now: float) -> m.Message:
        """Serve a command of this computer.

        Raises: EngineError: it cannot be done; one line for the person.
        """
        if isinstance(request, local.AskStatus):
            return self._status(activity)
        if isinstance(request, local.MakeToken):
            return self.make_token(now)
        if isinstance(request, local.Unpair):
            return self._unpair(request.who)
        if isinstance(request, local.BeginPairing):
            self._desk.begin(now)
        elif isinstance(request, local.JudgePairing):
            self._desk.judge(request.is_same, now)
        elif isinstance(request, local.EndPairing):
            self._desk.end("the person at the other computer gave up")
        return self._desk.state(now)

    def close(self) -> None:
        """Close the sockets."""
        self._desk.close()

    def _trust(self, key: bytes, name: str) -> None:
        self._trusted.add(TrustedPeer(public_key=key, name=name, added_s=time.time()))
        self._access.trust_changed()
        logger.info("paired with %s (%s)", name, fingerprint(key))

    def _unpair(self, who: str) -> local.Unpaired:
        meant = [p for p in self._trusted if who in (p.name, fingerprint(p.public_key))]
        if len(meant) != 1:
            known = ", ".join(f"{p.name} ({fingerprint(p.public_key)})" for p in self._trusted)
            found = f"{len(meant)} paired computers are" if meant else "no paired computer is"
            advice = f"give a fingerprint of: {known}" if known else "there is none to unpair"
            raise ConfigError(f"{found} called {who!r}; {advice}")
        peer = meant[0]
        self._trusted.remove(peer.public_key)
        self._access.trust_changed()
        logger.info("no longer paired with %s (%s)", peer.name, fingerprint(peer.public_key))
        return local.Unpaired(name=peer.name, fingerprint=fingerprint(peer.public_key))

    def _status(self, activity: Activity) -> local.Status:
        it = self._description
        return local.Status(
            name=it.name,
            fingerprint=fingerprint(self._keys.public),
            endpoint=self._endpoint,
            version=it.version,
            pid=it.pid,
            trusted_network=it.trusted_network,
            devices=it.devices,
            holder=activity.holder,
            holder_fingerprint=fingerprint(activity.holder_key) if activity.holder_key else "",
            runners=tuple(
                local.RunnerStatus(device=device, pid=pid)
                for device, pid in activity.runners.items()
            ),
            hosts=tuple(
                local.PairedHost(
                    name=p.name, fingerprint=fingerprint(p.public_key), added_s=p.added_s
                )
                for p in self._trusted
            ),
            refusals=tuple(
                local.RefusalStatus(
                    time_s=refusal.time_s,
                    address=refusal.address,
                    fingerprint=fingerprint(refusal.key) if refusal.key else "",
                    reason=refusal.reason,
                )
                for refusal in self._gatekeeper.refusals()[-SHOWN_REFUSALS:]
            ),
        )
