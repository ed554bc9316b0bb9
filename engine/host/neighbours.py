"""Workers on other computers: seen, trusted, connected, lost, and there again.

In: what discovery proposes, tokens, what connections say, the list of trusted nodes on disk. Out:
nodes in their states. A trusted node that is not there is tried again for as long as it is on the
list; one that is only seen is never talked to before a person pairs with it. Belongs to the host's
main thread.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import zmq

from engine.cluster import messages as m
from engine.cluster.discovery import Browser, Found
from engine.cluster.identity import TrustedPeer, TrustedPeers
from engine.cluster.join_token import NODE_NAME, JoinToken
from engine.cluster.messages import PROTOCOL_VERSION
from engine.cluster.security import KeyPair
from engine.errors import (
    ConfigError,
    EngineError,
    PeerRefused,
    ProtocolError,
    WorkerLost,
    one_line,
)
from engine.host.node import Node
from engine.host.node_words import numbered, parse_address, shown_address, why_no_line
from engine.host.worker_words import MAX_CAUSE

logger = logging.getLogger(__name__)

HELLO_SECONDS = 1.0
# A worker's telemetry comes at least every second.
STALE_SECONDS = 3.0
LOST_SECONDS = 10.0
# An attempt ends by itself where the network swallows it.
ATTEMPT_SECONDS = 4.0
RETRY_SECONDS = 2.0
# A node that is expected, because a host has just started or a person has just let it in.
PATIENCE_SECONDS = 5.0
IMPATIENT_RETRY_SECONDS = 0.5
SHUTDOWN_LINGER_MS = 200
# Nodes that are only proposed, which anybody on the network can do.
MAX_DISCOVERED = 64


class Neighbours:
    """See the module."""

    def __init__(
        self,
        context: zmq.Context[Any],
        keys: KeyPair,
        trusted: TrustedPeers,
        hello: m.Hello,
        nodes: dict[str, Node],
        lose: Callable[[Node, str], None],
        on_change: Callable[[], None],
    ) -> None:
        """Know nobody yet.

        Args:
            keys: the permanent ones of this installation.
            nodes: all nodes by name; shared with the owner, who adds those of this computer.
            lose: put a node in state "lost", or give it another reason to be, and end its runners.
            on_change: something a plan waits for may have happened.
        """
        self._context = context
        self._keys = keys
        self._trusted = trusted
        self._hello = hello
        self._nodes = nodes
        self._lose = lose
        self._on_change = on_change
        self._browser: Browser | None = None
        self._found: dict[bytes, Found] = {}
        self._joining: dict[bytes, list[Callable[[EngineError | None], None]]] = {}
        self._hello_at = 0.0

    def start(self, call_soon: Callable[[Callable[[], None]], None]) -> None:
        """Expect the trusted nodes, and look for others on the network.

        Args:
            call_soon: runs a function in the main thread.
        """
        for peer in self._trusted:
            self._expect(self._remember_node(peer))
        self._browser = Browser(
            lambda found: call_soon(lambda: self.found(found)),
            lambda key: call_soon(lambda: self.gone(key)),
        )

    def let_go(self) -> None:
        """Tell all workers that this host is done with them."""
        for node in self._remote():
            self._let_go(node)

    def close(self) -> None:
        """Look for nodes no longer."""
        if self._browser is not None:
            self._browser.close()

    # ---- what others say ---------------------------------------------------------------------

    def found(self, found: Found) -> None:
        """Discovery proposes a worker, or another address for one."""
        if found.public_key == self._keys.public:
            return  # This computer's own service.
        self._found[found.public_key] = found
        node = self._by_key(found.public_key)
        if node is not None and node.is_trusted:
            node.announced = found.endpoint
            # At once, but no faster than impatiently: anybody can announce anything.
            if node.channel is None or node.attempt_until is not None:
                if found.endpoint != node.dialled:
                    node.disconnect()
                soonest = node.attempted_at + IMPATIENT_RETRY_SECONDS
                node.next_attempt_at = min(node.next_attempt_at, soonest)
        else:
            self._propose(found)
        self._on_change()

    def gone(self, public_key: bytes) -> None:
        """Discovery takes a proposal back."""
        self._found.pop(public_key, None)
        node = self._by_key(public_key)
        if node is not None and node.is_trusted:
            node.announced = ""
        elif node is not None and node.state == "discovered" and not node.is_named_here:
            del self._nodes[node.name]
        self._on_change()

    def add_address(self, text: str) -> Node:
        """List the worker at an address that a person gave.

        Args:
            text: "HOST", "HOST:PORT" or "tcp://HOST:PORT".
        Raises: ConfigError: it is no address.
        """
        endpoint = parse_address(text)
        for node in self._remote():
            if endpoint in (node.endpoint, node.announced):
                return node
        host = endpoint.removeprefix("tcp://").rpartition(":")[0]
        node = Node(
            self._free_name(host if NODE_NAME.fullmatch(host) else "node"), "remote", self._keys
        )
        node.endpoint = endpoint
        node.state = "discovered"
        node.is_named_here = True
        self._nodes[node.name] = node
        self._on_change()
        return node

    def join(self, token: JoinToken, done: Callable[[EngineError | None], None]) -> Node:
        """Connect to the worker that made a token, and trust it.

        Args:
            done: hears None once the worker has let this computer in, or the reason why not.
        Raises: PeerRefused: it is being paired with.
        """
        node = self._by_key(token.public_key)
        if node is not None and node.state == "pairing":
            raise PeerRefused(
                f"{node.name} is being paired with already; finish or cancel that, then try again"
            )
        if node is not None and node.is_trusted and node.state in ("ready", "stale"):
            done(None)
            return node
        if node is None:
            node = Node(self._free_name(token.name), "remote", self._keys)
            node.public_key = token.public_key
            self._nodes[node.name] = node
        node.announced = token.endpoint
        node.token = token
        # One that let us in before needs no second token.
        node.is_enrolling = not node.is_trusted
        if not node.endpoint or node.is_enrolling:
            node.endpoint = token.endpoint
        self._joining.setdefault(node.public_key, []).append(done)
        self._expect(node)
        return node

    def trust(self, node: Node, public_key: bytes, name: str) -> Node:
        """A person has paired with a node.

        Args:
            name: what it calls itself.
        Returns: the node; another one where its key was trusted already at another address.
        Raises: ConfigError: it cannot be written down.
        """
        known = self._by_key(public_key)
        if self._nodes.get(node.name) is node:
            del self._nodes[node.name]
        if known is not None and known is not node:
            known.announced = node.endpoint
            node = known
        elif not node.is_trusted:
            wanted = name if node.is_named_here and NODE_NAME.fullmatch(name) else node.name
            node.name = self._free_name(wanted)
        self._nodes[node.name] = node
        node.public_key = public_key
        node.is_named_here = False
        self._remember(node)
        self._expect(node)
        return node

    def forget(self, node: Node) -> None:
        """Trust and list a node no longer; discovery may propose it again.

        Raises: ConfigError: it cannot be taken off the list on disk.
        """
        self._trusted.remove(node.public_key)
        self._drop(node)

    # ---- as time goes by ---------------------------------------------------------------------

    def tick(self) -> None:
        """Look after every line; call several times a second."""
        now = time.monotonic()
        is_time_for_hello = now - self._hello_at > HELLO_SECONDS
        if is_time_for_hello:
            self._hello_at = now
            if self._trusted.reload_if_changed():
                self._take_over_list()
        for node in self._remote():
            if node.channel is not None:
                self._look_at_line(node, now)
            if node.channel is None:
                # What a pairing comes to, its own line tells.
                is_wanted = (node.is_trusted or node.is_enrolling) and node.state != "pairing"
                if is_wanted and now >= node.next_attempt_at:
                    self._attempt(node, now)
            elif is_time_for_hello and node.attempt_until is None:
                self._tell(node, self._hello)
                self._tell(node, node.next_probe(time.monotonic()))

    def take(self, node: Node, message: m.Message) -> bool:
        """Hear what a worker says of its trust; True if that is what the message was about.

        Raises: ProtocolError: it is not its turn to say so.
        """
        if isinstance(message, m.NodeDescription):
            if node.is_enrolling:
                raise ProtocolError("it introduces itself before it has let this computer in")
            node.attempt_until = None
            if node.endpoint != node.dialled:
                node.endpoint = node.dialled
                self._remember_or_log(node)
            node.token = None
            node.state, node.reason = "ready", ""
            self._settle(node, None)
            return False  # What it is made of is for others.
        if isinstance(message, m.Enrolled) and node.is_enrolling:
            node.is_enrolling = False
            node.token = None
            self._remember_or_log(node)
            self._expect(node)
        elif isinstance(message, m.Busy):
            self._settle(node, None)
            self._lose(node, f"busy with {message.holder}")
        elif isinstance(message, m.Failed):
            self.failed(node, message.message)
        elif isinstance(message, m.ProbeAnswer):
            node.take_probe_answer(message, time.monotonic())
        else:
            return False
        return True

    def failed(self, node: Node, reason: str) -> None:
        """A worker broke the rules, or said that it does not serve us."""
        self._failed(node, one_line(reason, MAX_CAUSE), time.monotonic(), is_final=True)

    # ---- inside: lines -----------------------------------------------------------------------

    def _expect(self, node: Node) -> None:
        """Connect with the next tick; for a while a failed attempt is no lost node."""
        now = time.monotonic()
        node.disconnect()
        node.state, node.reason, node.code = "starting", "", ""
        node.patience_until = now + PATIENCE_SECONDS
        node.next_attempt_at = now
        self._on_change()

    def _attempt(self, node: Node, now: float) -> None:
        # Announcements can be forged, and addresses change: one attempt here, the next one there.
        endpoint = node.endpoint
        if node.announced and node.dialled != node.announced:
            endpoint = node.announced
        node.attempted_at = now
        keys = self._keys
        first: m.Message = self._hello
        if node.is_enrolling and node.token is not None:
            keys = node.token.guest
            first = m.Enroll(public_key=self._keys.public, host_name=self._hello.host_name)
        try:
            node.connect(self._context, keys, endpoint)
        except EngineError as error:
            self._failed(node, str(error), now)
            return
        node.attempt_until = now + ATTEMPT_SECONDS
        self._tell(node, first)

    def _look_at_line(self, node: Node, now: float) -> None:
        connection = node.connection()
        silence = now - node.heard_at
        if connection not in ("connecting", "open"):
            if node.has_news():  # Often why it hangs up.
                return
            if connection == "refused" and node.token is not None and not node.is_enrolling:
                node.disconnect()
                node.is_enrolling = True
                node.next_attempt_at = now
                return
            reason = why_no_line(node.name, node.dialled, connection, node.is_enrolling)
            is_final = connection == "refused" and node.is_enrolling
            self._failed(node, reason, now, is_final=is_final)
        elif node.attempt_until is not None:
            if now > node.attempt_until:
                self._failed(
                    node, f"{node.name} does not answer at {shown_address(node.dialled)}", now
                )
        elif silence > LOST_SECONDS:
            self._lose(
                node, f"no word from its worker for {LOST_SECONDS:.0f} s; is it frozen or cut off?"
            )
        elif silence > STALE_SECONDS and node.state == "ready":
            node.state, node.reason = "stale", f"no word for {STALE_SECONDS:.0f} s"
        elif silence <= STALE_SECONDS and node.state == "stale":
            node.state, node.reason = "ready", ""

    def _failed(self, node: Node, reason: str, now: float, *, is_final: bool = False) -> None:
        """The line is gone, or was never there."""
        node.disconnect()
        if node.state == "starting" and now < node.patience_until and not is_final:
            node.reason = reason
            node.next_attempt_at = now + IMPATIENT_RETRY_SECONDS
            return
        self._lose(node, reason)
        node.token, node.is_enrolling = None, False
        self._settle(node, PeerRefused(reason))

    def _settle(self, node: Node, error: EngineError | None) -> None:
        """Tell whoever wanted a node to join."""
        waiting = self._joining.pop(node.public_key, [])
        if error is not None and not node.is_trusted:
            self._drop(node)
        for done in waiting:
            done(error)

    def _tell(self, node: Node, message: m.Message) -> None:
        """Say something; the line's own look finds out why it cannot be said."""
        if node.channel is not None:
            with contextlib.suppress(WorkerLost):
                node.channel.send(message)

    def _let_go(self, node: Node) -> None:
        if node.channel is not None and node.attempt_until is None:
            self._tell(node, m.Shutdown())
        node.disconnect(SHUTDOWN_LINGER_MS)

    # ---- inside: lists -----------------------------------------------------------------------

    def _remote(self) -> list[Node]:
        return [node for node in self._nodes.values() if node.kind == "remote"]

    def _by_key(self, public_key: bytes) -> Node | None:
        return next((node for node in self._remote() if node.public_key == public_key), None)

    def _free_name(self, wanted: str) -> str:
        taken = {*self._nodes, *(peer.name for peer in self._trusted)}
        return next(name for name in numbered(wanted) if name not in taken)

    def _propose(self, found: Found) -> None:
        node = self._by_key(found.public_key)
        if node is None:
            node = next(
                (n for n in self._remote() if self._is_nameless_at(n, found.endpoint)), None
            )
        if node is None:
            if sum(not n.is_trusted for n in self._remote()) >= MAX_DISCOVERED:
                return
            node = Node(self._free_name(found.name), "remote", self._keys)
            node.state = "discovered"
            self._nodes[node.name] = node
        if node.state != "discovered":
            return
        node.public_key = found.public_key
        node.endpoint = found.endpoint
        node.version = found.version
        node.reason = ""
        if found.protocol != PROTOCOL_VERSION:
            node.reason = (
                f"it speaks protocol version {found.protocol}, this computer {PROTOCOL_VERSION}: "
                "install the same version of shardmix on both"
            )

    @staticmethod
    def _is_nameless_at(node: Node, endpoint: str) -> bool:
        return not node.public_key and node.state == "discovered" and node.endpoint == endpoint

    def _remember_or_log(self, node: Node) -> None:
        """What a worker says ends no host: a node that cannot be written down is ours until then."""
        try:
            self._remember(node)
        except ConfigError as error:
            logger.warning("%s is known only as long as this program runs: %s", node.name, error)
            node.is_trusted = True
            node.is_unlisted = self._trusted.get(node.public_key) is None

    def _remember(self, node: Node) -> None:
        """Write a trusted node down.

        Raises: ConfigError: the list on disk cannot be changed.
        """
        known = self._trusted.get(node.public_key)
        self._trusted.add(
            TrustedPeer(
                public_key=node.public_key,
                name=node.name,
                added_s=known.added_s if known is not None else time.time(),
                endpoint=node.endpoint,
            )
        )
        node.is_trusted, node.is_unlisted = True, False

    def _remember_node(self, peer: TrustedPeer) -> Node:
        is_usable = NODE_NAME.fullmatch(peer.name) and peer.name not in self._nodes
        node = Node(peer.name if is_usable else self._free_name("node"), "remote", self._keys)
        node.public_key, node.endpoint, node.is_trusted = peer.public_key, peer.endpoint, True
        self._nodes[node.name] = node
        return node

    def _take_over_list(self) -> None:
        """Another program of this installation has paired, moved or forgotten nodes."""
        for peer in self._trusted:
            node = self._by_key(peer.public_key)
            if node is not None and node.is_trusted:
                if peer.endpoint != node.endpoint and node.channel is None:
                    node.endpoint = peer.endpoint
                continue
            if node is not None:
                node.disconnect()
                del self._nodes[node.name]
            if peer.name in self._nodes:  # Only seen so far; it gives the name way.
                self._drop(self._nodes[peer.name])
            self._expect(self._remember_node(peer))
        trusted = self._trusted.keys()
        for node in self._remote():
            if node.is_trusted and not node.is_unlisted and node.public_key not in trusted:
                self._drop(node)

    def _drop(self, node: Node) -> None:
        waiting = self._joining.pop(node.public_key, [])
        self._let_go(node)
        if node.state not in ("discovered", "pairing"):
            self._lose(node, "it was forgotten")
        del self._nodes[node.name]
        node.is_trusted = False
        found = self._found.get(node.public_key)
        if found is not None:
            self._propose(found)
        for done in waiting:
            done(PeerRefused(f"{node.name} was forgotten before it had let this computer in"))
        self._on_change()
