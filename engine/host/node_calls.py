"""What a client asks about nodes on other computers: add, pair, confirm, forget.

In: calls (`engine.host.messages`). Out: their ends, and the code to compare. Belongs to the host's
main thread and waits for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from engine.cluster.join_token import decode_token
from engine.cluster.messages import Message
from engine.cluster.security import KeyPair
from engine.errors import Cancelled, EngineError, PeerRefused, PlanError
from engine.host import messages as api
from engine.host.messages import NodeStateName
from engine.host.node import Node
from engine.host.nodes import Nodes
from engine.host.pairing_attempt import PairingAttempt


@dataclass(slots=True)
class _Attempt:
    """A node that is being paired with, and what it was before."""

    request_id: int
    node: Node
    line: PairingAttempt
    state_before: NodeStateName


class NodeCalls:
    """See the module."""

    def __init__(
        self,
        context: zmq.Context[Any],
        keys: KeyPair,
        nodes: Nodes,
        send: Callable[[int, Message], None],
        end: Callable[[int, Message], None],
        fail: Callable[[int, EngineError], None],
    ) -> None:
        """Args: keys: permanent ones. send, end, fail: tell a call's owner; the last two end it."""
        self._context = context
        self._keys = keys
        self._nodes = nodes
        self._send = send
        self._end = end
        self._fail = fail
        self._attempts: dict[str, _Attempt] = {}

    def serve(self, call: Message, devices_in_use: set[str]) -> bool:
        """Begin with a call; True if it is one of these.

        Args:
            devices_in_use: with a share in the plan in force.
        Raises: EngineError: it cannot be served; the call is over.
        """
        if isinstance(call, api.AddNode):
            self._add_node(call)
            return True
        if isinstance(call, api.PairNode):
            self._pair(call)
            return True
        if isinstance(call, api.AddAddress):
            self._nodes.neighbours.add_address(call.endpoint)
        elif isinstance(call, api.ConfirmPairing):
            self._confirm(call)
        elif isinstance(call, api.ForgetNode):
            self._forget(call, devices_in_use)
        else:
            return False
        self._done(call.request_id)
        return True

    def sockets(self) -> list[zmq.Socket[Any]]:
        """To poll."""
        return [s for attempt in self._attempts.values() for s in attempt.line.sockets()]

    def hear(self) -> bool:
        """Go on with pairing; True if something changed for the window."""
        changed = False
        for attempt in list(self._attempts.values()):
            code = attempt.line.pairing.code
            try:
                attempt.line.hear(time.monotonic())
                self._check_key(attempt)
            except EngineError as error:
                self._give_up(attempt, error)
                changed = True
                continue
            pairing = attempt.line.pairing
            if pairing.code != code:
                self._show_code(attempt)
                changed = True
            if pairing.is_paired:
                self._paired(attempt)
                changed = True
        return changed

    def cancel(self, request_id: int) -> None:
        """Give a pairing up."""
        for attempt in list(self._attempts.values()):
            if attempt.request_id == request_id:
                attempt.line.pairing.give_up("the person at the other computer gave up")
                self._give_up(attempt, Cancelled("pairing was cancelled"))

    def close(self) -> None:
        """Hang up."""
        for attempt in self._attempts.values():
            attempt.line.close()
        self._attempts.clear()

    # ---- inside ------------------------------------------------------------------------------

    def _done(self, request_id: int) -> None:
        self._end(request_id, api.Done(request_id=request_id))

    def _add_node(self, call: api.AddNode) -> None:
        def joined(error: EngineError | None) -> None:
            if error is None:
                self._done(call.request_id)
            else:
                self._fail(call.request_id, error)

        self._nodes.neighbours.join(decode_token(call.token), joined)

    def _pair(self, call: api.PairNode) -> None:
        node = self._nodes.find(call.name)
        if node.state == "pairing" or node.name in self._attempts:
            raise PeerRefused(
                f"{node.name} is being paired with already; finish or cancel that, then try again"
            )
        if node.kind != "remote" or node.state not in ("discovered", "lost"):
            raise PeerRefused(
                f"{node.name} is {node.state}; only a node that was discovered, or one that no "
                "longer lets this computer in, can be paired with"
            )
        line = PairingAttempt(
            self._context,
            self._keys,
            self._nodes.host_name,
            node.announced or node.endpoint,
            time.monotonic(),
        )
        self._attempts[node.name] = _Attempt(call.request_id, node, line, node.state)
        node.disconnect()
        node.state, node.code = "pairing", ""
        node.reason = "asking the other computer, where `shardmix-worker pair` must run"

    def _confirm(self, call: api.ConfirmPairing) -> None:
        attempt = self._attempts.get(call.name)
        if attempt is None:
            raise PeerRefused(f"{call.name} is not being paired with; begin to pair first")
        try:
            attempt.line.judge(call.is_same, time.monotonic())
        except PeerRefused as error:
            if attempt.line.pairing.reason:
                self._give_up(attempt, error)
            raise
        if call.is_same:
            attempt.node.reason = "waiting for the person at the other computer"
        else:
            self._give_up(attempt, PeerRefused(attempt.line.pairing.reason))

    def _show_code(self, attempt: _Attempt) -> None:
        node, code = attempt.node, attempt.line.pairing.code
        node.code = code
        node.reason = "compare the six digits on both computers"
        event = api.PairingCode(request_id=attempt.request_id, name=node.name, code=code)
        self._send(attempt.request_id, event)

    @staticmethod
    def _check_key(attempt: _Attempt) -> None:
        """A node is its key: another one at its address is another node."""
        expected, shown = attempt.node.public_key, attempt.line.pairing.peer_key
        if expected and shown and expected != shown:
            reason = (
                f"what answers at the address of {attempt.node.name} has another key. Forget "
                f"{attempt.node.name}, then pair with what is discovered"
            )
            attempt.line.pairing.give_up(reason)
            raise PeerRefused(reason)

    def _paired(self, attempt: _Attempt) -> None:
        del self._attempts[attempt.node.name]
        attempt.line.close()
        pairing = attempt.line.pairing
        try:
            self._nodes.neighbours.trust(attempt.node, pairing.peer_key, pairing.peer_name)
        except EngineError as error:
            self._put_back(attempt, error)
        else:
            self._done(attempt.request_id)

    def _give_up(self, attempt: _Attempt, error: EngineError) -> None:
        del self._attempts[attempt.node.name]
        attempt.line.close()
        self._put_back(attempt, error)

    def _put_back(self, attempt: _Attempt, error: EngineError) -> None:
        """The node is what it was before."""
        node = attempt.node
        node.state, node.code = attempt.state_before, ""
        node.reason = str(error)
        self._fail(attempt.request_id, error)

    def _forget(self, call: api.ForgetNode, devices_in_use: set[str]) -> None:
        node = self._nodes.find(call.name)
        if node.kind != "remote":
            raise PlanError(
                f"{node.name} is on this computer; only other computers can be forgotten"
            )
        own = {node.own_name(device) for device in node.devices()}
        if own & devices_in_use:
            raise PlanError(
                f"{node.name} has a share in the plan in force; apply a plan without it first"
            )
        attempt = self._attempts.get(node.name)
        if attempt is not None:
            attempt.line.pairing.give_up("the person at the other computer gave up")
            self._give_up(attempt, Cancelled("pairing was cancelled: the node was forgotten"))
        self._nodes.neighbours.forget(node)
