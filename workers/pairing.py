"""Pairing at the worker's end: one attempt, while somebody at this computer waits for it.

In: messages of the pairing socket, which lets in anybody that encrypts; what the person here says.
Out: answers, and the key to be trusted once both persons have said that the digits are the same.
The rules of the attempt are `engine.cluster.pairing`'s.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable
from typing import Any

import zmq

from engine.cluster.identity import fingerprint
from engine.cluster.pairing import (
    HOST_SENDS,
    MAX_PAIRING_BYTES,
    NONCE_BYTES,
    PAIRING_DOMAIN,
    PAIRING_KEYS,
    PAIRING_SECONDS,
    Pairing,
    PairMessage,
    PairRefused,
)
from engine.cluster.security import Gatekeeper
from engine.cluster.transport import Channel, Received, listen
from engine.errors import PeerRefused, WorkerLost
from workers.local_messages import PairingStage, PairingState

logger = logging.getLogger(__name__)

# The command that waits asks several times a second; without it nobody could compare digits.
UNATTENDED_SECONDS = 5.0
OFF = "pairing is off there: run `shardmix-worker pair` on that computer, then try again"
ENGAGED = "another computer is pairing with it right now; try again in a minute"


class PairingDesk:
    """The pairing socket and the attempt in hand."""

    def __init__(
        self,
        context: zmq.Context[Any],
        gatekeeper: Gatekeeper,
        endpoint: str,
        public_key: bytes,
        name: str,
        on_paired: Callable[[bytes, str], None],
    ) -> None:
        """Listen; every attempt is refused until `begin`.

        Args:
            public_key, name: of this installation.
            on_paired: takes the key and the name of a host that is to be trusted.
        Raises: ProtocolError: the port is taken.
        """
        gatekeeper.allow_any(PAIRING_DOMAIN)
        socket, self.endpoint = listen(
            context,
            zmq.ROUTER,
            PAIRING_KEYS,
            PAIRING_DOMAIN,
            endpoint,
            max_message_bytes=MAX_PAIRING_BYTES,
        )
        self.channel: Channel[PairMessage] = Channel(socket, HOST_SENDS)
        self._public_key = public_key
        self._name = name
        self._on_paired = on_paired
        self._attempt: Pairing | None = None
        self._route = b""
        self._deadline = 0.0
        self._asked_at = 0.0
        self._is_confirmed = False

    def begin(self, now: float) -> None:
        """Turn pairing mode on; an attempt in hand goes on."""
        self._asked_at = now
        if self._is_on():
            return
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._deadline = now + PAIRING_SECONDS
        self._attempt = Pairing("worker", self._public_key, self._name, nonce, self._deadline)
        self._route, self._is_confirmed = b"", False

    def end(self, reason: str) -> None:
        """Turn pairing mode off; a host in the middle of it is told why."""
        attempt = self._attempt
        if attempt is None or not self._is_on():
            return
        attempt.give_up(reason)
        self._answer(self._route, PairRefused(reason=reason))

    def judge(self, is_same: bool, now: float) -> None:
        """Hear the person here.

        Raises: PeerRefused: there are no digits to judge.
        """
        if self._attempt is None:
            raise PeerRefused("there is no code to confirm: begin with `shardmix-worker pair`")
        verdict = self._attempt.judge(is_same, now)
        self._is_confirmed = is_same
        self._answer(self._route, verdict)
        self._conclude()

    def hear(self, received: Received[PairMessage], now: float) -> None:
        """Take a message of the pairing socket."""
        attempt = self._attempt
        if attempt is None or not self._is_on():
            self._answer(received.route, PairRefused(reason=OFF))
            return
        if self._route and received.route != self._route:
            self._answer(received.route, PairRefused(reason=ENGAGED))
            return
        self._route = received.route
        try:
            answer = attempt.take(received.message, received.peer_key, now)
        except PeerRefused as error:
            logger.warning("pairing failed: %s", error)
            self._answer(received.route, PairRefused(reason=str(error)))
            return
        if answer is not None:
            self._answer(received.route, answer)
        self._conclude()

    def step(self, now: float) -> None:
        """Give up when the time is over, or nobody here waits any more."""
        if not self._is_on():
            return
        if now > self._deadline:
            self.end(f"nobody paired within {PAIRING_SECONDS:.0f} s; begin again")
        elif now - self._asked_at > UNATTENDED_SECONDS:
            self.end("the person at the other computer does not wait any more")

    def state(self, now: float) -> PairingState:
        """For the person here, who waits as long as somebody asks."""
        self._asked_at = now
        attempt = self._attempt
        if attempt is None:
            return PairingState(stage="off")
        stage: PairingStage = "waiting"
        if attempt.is_paired:
            stage = "paired"
        elif attempt.reason:
            stage = "refused"
        elif attempt.code:
            stage = "confirmed" if self._is_confirmed else "compare"
        return PairingState(
            stage=stage,
            host_name=attempt.peer_name,
            fingerprint=fingerprint(attempt.peer_key) if attempt.peer_key else "",
            code=attempt.code,
            reason=attempt.reason,
            seconds_left=max(0.0, self._deadline - now),
        )

    def close(self) -> None:
        """Close the socket."""
        self.channel.close()

    def _is_on(self) -> bool:
        attempt = self._attempt
        return attempt is not None and not attempt.is_paired and not attempt.reason

    def _conclude(self) -> None:
        attempt = self._attempt
        if attempt is not None and attempt.is_paired:
            self._on_paired(attempt.peer_key, attempt.peer_name)

    def _answer(self, route: bytes, message: PairMessage) -> None:
        if route:
            with contextlib.suppress(WorkerLost):  # It is gone; the deadline ends the attempt.
                self.channel.send(message, route=route)
