"""A device that only exchanges, in a process of its own: `python -m … exchange_peer`.

In: one line of JSON on standard input, the endpoint and key of device 0. Out: its own, then
"ready". It hands over rows until device 0 is gone.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from engine.cluster import messages as m
from engine.errors import WorkerLost
from tests.engine.cluster.exchange_members import WIDTH, Member, plan_of_groups


def main() -> None:
    """Take part in two-device exchanges as device 1, for ever."""
    member = Member(plan_of_groups([[0, 1]] * 3, 2), 1)
    print(member.peer.exchange_endpoint, member.peer.public_key.decode(), flush=True)  # noqa: T201
    words = json.loads(sys.stdin.readline())
    other = m.Peer(
        device_index=0, exchange_endpoint=words["endpoint"], public_key=words["key"].encode()
    )
    member.allow([other])
    print("ready", flush=True)  # noqa: T201
    member.connect([other])
    values = np.ones((4, WIDTH), np.float32)
    step_id = 0
    try:
        while True:
            step_id += 1
            member.exchange.begin_step(step_id, "generated")
            member.exchange.hand_over(0, values, values, 4)
    except WorkerLost:
        pass
    finally:
        member.close()


if __name__ == "__main__":
    main()
