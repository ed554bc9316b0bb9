"""A process that freezes while a long message is on its way to it is noticed like any other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from engine.cluster.security import new_key_pair
from engine.cluster.transport import connect_watched

pytestmark = pytest.mark.network

LISTENER = """
import zmq
from engine.cluster.security import Gatekeeper, new_key_pair
from engine.cluster.transport import listen

context = zmq.Context()
gatekeeper = Gatekeeper(context)
gatekeeper.allow_any("test")
keys = new_key_pair()
socket, endpoint = listen(context, zmq.ROUTER, keys, "test", "tcp://127.0.0.1:*")
print(endpoint, keys.public.decode(), flush=True)
while True:
    socket.recv_multipart()
"""
# More than the buffers of a connection hold.
FRAME_BYTES = 64 << 20
# Promised for a frozen peer; a heartbeat takes 3 s to fail.
FROZEN_SECONDS = 5.0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to stop a process with")
def test_a_peer_that_freezes_within_a_message_is_noticed() -> None:
    """Bug: libzmq asks for no sign of life while a frame waits to be written."""
    command = [sys.executable, "-c", LISTENER]
    with (
        zmq.Context[zmq.Socket[bytes]]() as context,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener,
    ):
        assert listener.stdout is not None
        endpoint, key = listener.stdout.readline().split()
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        socket, monitor = connect_watched(
            context, zmq.DEALER, new_key_pair(), key.encode(), endpoint, events
        )
        try:
            assert monitor.poll(20_000)
            assert recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            socket.send(bytes(FRAME_BYTES), copy=False)
            listener.send_signal(signal.SIGSTOP)
            started = time.monotonic()
            assert monitor.poll(20_000), "nobody noticed"
            assert recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
            assert time.monotonic() - started <= FROZEN_SECONDS
        finally:
            listener.kill()
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)
