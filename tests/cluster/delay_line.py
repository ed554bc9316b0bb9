"""Adds delay to a cable: carries frames between two network interfaces, each after a fixed time.

`python delay_line.py FIRST SECOND SECONDS`, until its standard input closes. There is no netem on
the machines that test this. It works on whole Ethernet frames, so that every port, and multicast,
is delayed, and nobody needs to know another address. Frames past the queue are dropped.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import sys
import time
from collections import deque

# Not in Python's socket module; names of linux/if_packet.h.
SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
ETH_P_ALL = 3
# A frame of segmentation offload, its Ethernet header and its virtio header.
MAX_FRAME_BYTES = 70_000
MAX_QUEUED_BYTES = 64 << 20
# A cut cable is no error here: it carries nothing.
CABLE_IS_CUT = (errno.ENETDOWN, errno.ENETUNREACH, errno.ENXIO)


def open_interface(name: str) -> socket.socket:
    """A socket that reads and writes an interface's frames."""
    frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    # The header keeps unfinished checksums and segmentation of frames that never left the kernel.
    frames.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    frames.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    frames.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
    frames.setblocking(False)
    frames.bind((name, ETH_P_ALL))
    return frames


def carry(ends: tuple[socket.socket, socket.socket], delay_seconds: float) -> None:
    """Pass frames on in both directions until standard input closes."""
    queues: tuple[deque[tuple[float, bytes]], ...] = (deque(), deque())
    queued_bytes = [0, 0]
    while True:
        now = time.monotonic()
        for side, queue in enumerate(queues):
            while queue and queue[0][0] <= now:
                frame = queue.popleft()[1]
                queued_bytes[side] -= len(frame)
                with _cut_cable_tolerated():
                    ends[1 - side].send(frame)
        next_due = min((queue[0][0] for queue in queues if queue), default=None)
        timeout = None if next_due is None else max(0.0, next_due - time.monotonic())
        readable, _, _ = select.select([*ends, sys.stdin], [], [], timeout)
        if sys.stdin in readable and not sys.stdin.read(1):
            return
        for side, end in enumerate(ends):
            if end not in readable:
                continue
            with _cut_cable_tolerated():
                frame = end.recv(MAX_FRAME_BYTES)
                if queued_bytes[side] + len(frame) <= MAX_QUEUED_BYTES:
                    queued_bytes[side] += len(frame)
                    queues[side].append((time.monotonic() + delay_seconds, frame))


@contextlib.contextmanager
def _cut_cable_tolerated():
    try:
        yield
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno not in CABLE_IS_CUT:
            raise


def main() -> None:
    """Carry until told to end."""
    first, second, seconds = sys.argv[1:]
    ends = (open_interface(first), open_interface(second))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        carry(ends, float(seconds))
    for end in ends:
        end.close()


if __name__ == "__main__":
    main()
