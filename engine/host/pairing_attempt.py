"""The line on which an engine host pairs with one worker.

In: where the worker pairs, what comes from there, what the person here says. Out: messages; the
rules are those of `engine.cluster.pairing`.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Any

import zmq

from engine.cluster.connection_watch import Connection
from engine.cluster.pairing import (
    MAX_PAIRING_BYTES,
    NONCE_BYTES,
    PAIRING_KEYS,
    PAIRING_SECONDS,
    WORKER_SENDS,
    Pairing,
    PairRefused,
    pairing_endpoint,
)
from engine.cluster.security import KeyPair
from engine.cluster.transport import Channel, connect_once
from engine.errors import EngineError, PeerRefused, ProtocolError, WorkerLost, one_line

# A verdict, or a refusal, still has to leave.
LINGER_MS = 500
# A network that swallows everything says nothing.
ANSWER_SECONDS = 5.0


class PairingAttempt:
    """See the module.

    Attributes:
        pairing: how far it has come.
    """

    def __init__(
        self, context: zmq.Context[Any], keys: KeyPair, host_name: str, endpoint: str, now_s: float
    ) -> None:
        """Connect and introduce ourselves.

        Args:
            keys: permanent ones of this installation.
            endpoint: the worker's control socket.
        Raises: ProtocolError: the endpoint is not one.
        """
        self.pairing = Pairing(
            "host",
            keys.public,
            host_name,
            secrets.token_bytes(NONCE_BYTES),
            now_s + PAIRING_SECONDS,
        )
        self._answer_by = now_s + ANSWER_SECONDS
        self._where = endpoint.removeprefix("tcp://")
        socket, self._watch = connect_once(
            context,
            keys,
            PAIRING_KEYS.public,
            pairing_endpoint(endpoint),
            max_message_bytes=MAX_PAIRING_BYTES,
        )
        self._channel: Channel[Any] = Channel(socket, WORKER_SENDS)
        self._channel.send(self.pairing.open())

    def sockets(self) -> list[zmq.Socket[Any]]:
        """To poll."""
        return [self._channel.socket, self._watch.socket]

    def hear(self, now_s: float) -> None:
        """Take what the worker said.

        Raises: PeerRefused: the attempt is over, and did not succeed.
        """
        # Asked before the messages are taken: what came ahead of a cut is then heard ahead of it.
        connection = self._watch.connection()
        try:
            while (received := self._channel.receive(0)) is not None:
                answer = self.pairing.take(received.message, b"", now_s)
                if answer is not None:
                    self._channel.send(answer)
        except ProtocolError as error:
            reason = one_line(f"{self._where} breaks the rules of pairing: {error}", 500)
            self._give_up(reason)
        except WorkerLost:
            pass  # The watch knows more.
        if self.pairing.is_paired:
            return
        if connection not in ("connecting", "open"):
            self._give_up(self._reason(connection))
        if not self.pairing.peer_key and now_s > self._answer_by:
            self._give_up(f"nothing at {self._where} answered within {ANSWER_SECONDS:.0f} s")
        self.pairing.check_deadline(now_s)

    def judge(self, is_same: bool, now_s: float) -> None:
        """Hear the person here.

        Raises: PeerRefused: there is no code to judge (any more).
        """
        verdict = self.pairing.judge(is_same, now_s)
        with contextlib.suppress(WorkerLost):  # `hear` tells.
            self._channel.send(verdict)

    def close(self) -> None:
        """Tell the worker, if the attempt failed, and hang up."""
        if not self.pairing.is_paired:
            reason = self.pairing.reason or "the other computer gave up"
            with contextlib.suppress(EngineError):
                self._channel.send(PairRefused(reason=reason[:500]))
        self._watch.close()
        self._channel.socket.close(linger=LINGER_MS)

    def _give_up(self, reason: str) -> None:
        self.pairing.give_up(reason)
        raise PeerRefused(reason)

    def _reason(self, connection: Connection) -> str:
        if connection == "cut":
            return "the connection was cut while pairing; begin again"
        if connection == "nobody":
            return (
                f"no worker waits for pairing at {self._where}. Run `shardmix-worker pair` there, "
                "then try again"
            )
        return f"what listens at {self._where} is no worker that can be paired with"
