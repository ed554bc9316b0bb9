"""Pairing at the worker's end: one attempt, while somebody at this computer waits for it.

In: messages of the pairing socket, which lets in anybody that encrypts, and which is there only
while pairing mode is on; what the person here says. Out: answers, and the key to be trusted once
both persons have said that the digits are the same. The rules of the attempt are
`engine.cluster.pairing`'s.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

import psutil
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
from engine.errors import EngineError, PeerRefused, ProtocolError, WorkerLost
from workers.listener_watch import ListenerWatch
from workers.local_messages import PairingStage, PairingState

logger = logging.getLogger(__name__)

# The command that waits asks several times a second; without it nobody could compare digits.
UNATTENDED_SECONDS = 5.0
# Of one round of the loop, which has others to hear.
MAX_MESSAGES = 20
# An attempt is four messages; more than these wait in the network.
MAX_WAITING_MESSAGES = 4
# libzmq limits frames, and neither their number nor that of connections: what strangers make this
# process hold is bounded by a look at its memory, which otherwise hardly grows.
MAX_GROWTH_BYTES = 64 << 20
# The socket before this one may still be on its way out of the port.
BIND_SECONDS = 1.0
# The last answer still has to leave.
LINGER_MS = 500
ENGAGED = "another computer is pairing with it right now; try again in a minute"
FLOODED = "somebody on the network flooded the pairing socket; begin again, or use a join token"
NOT_STORED = "that computer cannot write down whom it trusts; it shows why. Then pair again"


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
        """Nothing listens until `begin`.

        Args:
            endpoint: to listen on.
            public_key, name: of this installation.
            on_paired: takes the key and the name of a host that is to be trusted; may raise
                EngineError, and then nobody is paired.
        """
        self._context = context
        self._gatekeeper = gatekeeper
        self.endpoint = endpoint
        self._channel: Channel[PairMessage] | None = None
        self._watch: ListenerWatch | None = None
        self._memory_before = 0
        self._public_key = public_key
        self._name = name
        self._on_paired = on_paired
        self._attempt: Pairing | None = None
        self._route = b""
        self._deadline = 0.0
        self._asked_at = 0.0
        self._is_confirmed = False
        self._failure = ""

    def begin(self, now: float) -> None:
        """Turn pairing mode on; an attempt in hand goes on.

        Raises: ProtocolError: the port is taken.
        """
        self._asked_at = now
        if self._is_on():
            return
        self._listen_no_more()
        self._listen()
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._deadline = now + PAIRING_SECONDS
        self._attempt = Pairing("worker", self._public_key, self._name, nonce, self._deadline)
        self._route, self._is_confirmed, self._failure = b"", False, ""

    def end(self, reason: str) -> None:
        """Turn pairing mode off; a host in the middle of it is told why."""
        attempt = self._attempt
        if attempt is None or not self._is_on():
            return
        attempt.give_up(reason)
        self._answer(self._route, PairRefused(reason=reason))
        self._listen_no_more()

    def judge(self, is_same: bool, now: float) -> None:
        """Hear the person here.

        Raises:
            PeerRefused: there are no digits to judge.
            EngineError: the other computer cannot be written down as trusted.
        """
        attempt = self._attempt
        if attempt is None:
            raise PeerRefused("there is no code to confirm: begin with `shardmix-worker pair`")
        verdict = attempt.judge(is_same, now)
        self._is_confirmed = is_same
        self._trust_if_paired()
        self._answer(self._route, verdict)
        if not self._is_on():
            self._listen_no_more()

    def step(self, now: float) -> None:
        """Hear the pairing socket; give up when time is over, or nobody here waits any more."""
        if not self._is_on():
            self._listen_no_more()
        if self._channel is None or self._watch is None:
            return
        if psutil.Process().memory_info().rss - self._memory_before > MAX_GROWTH_BYTES:
            logger.warning("pairing failed: %s", FLOODED)
            self.end(FLOODED)
            return
        for knock in self._watch.take_all():
            self._gatekeeper.refuse(knock.address, PAIRING_DOMAIN, b"", knock.reason)
        for _ in range(MAX_MESSAGES):
            try:
                received = self._channel.receive(0)
            except EngineError as error:
                logger.warning("pairing: %s", error)
                continue
            if received is None:
                break
            self._hear(received, now)
            if not self._is_on():
                self._listen_no_more()
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
        reason = self._failure or attempt.reason
        if reason:
            stage = "refused"
        elif attempt.is_paired:
            stage = "paired"
        elif attempt.code:
            stage = "confirmed" if self._is_confirmed else "compare"
        return PairingState(
            stage=stage,
            host_name=attempt.peer_name,
            fingerprint=fingerprint(attempt.peer_key) if attempt.peer_key else "",
            code=attempt.code,
            reason=reason,
            seconds_left=max(0.0, self._deadline - now),
        )

    def close(self) -> None:
        """End the attempt in hand and close the socket."""
        self.end("the worker was ended")
        self._listen_no_more()

    def _listen(self) -> None:
        """Open the socket.

        Raises: ProtocolError: the port is taken.
        """
        deadline = time.monotonic() + BIND_SECONDS
        while True:
            try:
                socket, _ = listen(
                    self._context,
                    zmq.ROUTER,
                    PAIRING_KEYS,
                    PAIRING_DOMAIN,
                    self.endpoint,
                    max_message_bytes=MAX_PAIRING_BYTES,
                    max_waiting=MAX_WAITING_MESSAGES,
                )
                break
            except ProtocolError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._memory_before = psutil.Process().memory_info().rss
        self._gatekeeper.allow_any(PAIRING_DOMAIN)
        self._channel = Channel(socket, HOST_SENDS)
        self._watch = ListenerWatch(socket)

    def _listen_no_more(self) -> None:
        if self._channel is None or self._watch is None:
            return
        self._gatekeeper.allow(PAIRING_DOMAIN)
        self._watch.close()
        self._channel.socket.close(linger=LINGER_MS)
        self._channel = self._watch = None

    def _hear(self, received: Received[PairMessage], now: float) -> None:
        attempt = self._attempt
        assert attempt is not None
        if self._route and received.route != self._route:
            self._answer(received.route, PairRefused(reason=ENGAGED))
            return
        self._route = received.route
        try:
            answer = attempt.take(received.message, received.peer_key, now)
            self._trust_if_paired()
        except PeerRefused as error:
            logger.warning("pairing failed: %s", error)
            self._answer(received.route, PairRefused(reason=str(error)))
        except EngineError:
            pass  # Told, here and there.
        else:
            if answer is not None:
                self._answer(received.route, answer)

    def _is_on(self) -> bool:
        attempt = self._attempt
        return attempt is not None and not attempt.is_paired and not attempt.reason

    def _trust_if_paired(self) -> None:
        """Hand over the key of an attempt that has succeeded.

        Raises: EngineError: whoever takes it cannot; it is logged, and the host told.
        """
        attempt = self._attempt
        if attempt is None or not attempt.is_paired:
            return
        try:
            self._on_paired(attempt.peer_key, attempt.peer_name)
        except EngineError as error:
            self._failure = str(error)
            logger.error("pairing failed: %s", error)
            self._answer(self._route, PairRefused(reason=NOT_STORED))
            self._listen_no_more()
            raise

    def _answer(self, route: bytes, message: PairMessage) -> None:
        if route and self._channel is not None:
            with contextlib.suppress(WorkerLost):  # It is gone; the deadline ends the attempt.
                self._channel.send(message, route=route)
