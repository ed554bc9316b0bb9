"""The conversation of `shardmix-worker pair`: wait for an engine host, compare six digits.

In: a connection to the running worker, and what the person types. Out: what happens, on the
terminal. What the digits prove is not decided here.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time

from engine.errors import PeerRefused
from workers.local_messages import (
    AskPairing,
    BeginPairing,
    EndPairing,
    JudgePairing,
    PairingStage,
    PairingState,
)
from workers.presence import LocalConnection

ASK_SECONDS = 0.2
YES = ("y", "yes")


def pair(connection: LocalConnection, expected_code: str | None) -> None:
    """Pair with one engine host.

    Where another command waits already, this one joins it: so a script starts one, learns the digits
    from the other computer, and starts a second one that expects them.

    Args:
        expected_code: confirm these digits and no others, without asking; None asks.
    Raises: PeerRefused: there is no pairing; says why.
    """
    state = connection.ask(BeginPairing(), PairingState)
    try:
        _tell(
            f"Waiting {state.seconds_left:.0f} s for an engine host: choose this computer in its "
            "list of nodes, and Pair."
        )
        state = _wait_while(connection, "waiting")
        if state.stage == "compare":
            _tell(f"{state.host_name} ({state.fingerprint}) wants to use this computer.")
            _tell(f"Its code must be: {state.code[:3]} {state.code[3:]}")
            is_same = _judge(state.code, expected_code, connection)
            if is_same is not None:
                connection.ask(JudgePairing(is_same=is_same), PairingState)
            if is_same:
                _tell("Waiting for the other computer to confirm.")
            state = _wait_while(connection, "confirmed")
    finally:
        connection.ask(EndPairing(), PairingState)
    if state.stage != "paired":
        raise PeerRefused(f"not paired: {state.reason or 'pairing was turned off'}")
    print(f"Paired with {state.host_name} ({state.fingerprint}).")


def _wait_while(connection: LocalConnection, stage: PairingStage) -> PairingState:
    """Ask until the stage is another; the worker ends every stage in time."""
    while True:
        state = connection.ask(AskPairing(), PairingState)
        if state.stage != stage:
            return state
        time.sleep(ASK_SECONDS)


def _judge(code: str, expected_code: str | None, connection: LocalConnection) -> bool | None:
    """Whether the digits are the same; None when the attempt ended before anybody said so."""
    if expected_code is not None:
        return expected_code.replace(" ", "") == code
    _tell("Does the other computer show the same code? [y/N]")
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    # Reading blocks, and nobody pairs without a command that keeps asking. Not through sys.stdin,
    # whose lock the thread would hold when the interpreter ends.
    threading.Thread(
        target=lambda: lines.put(os.read(0, 1024).decode("utf-8", "replace")),
        name="answer",
        daemon=True,
    ).start()
    while connection.ask(AskPairing(), PairingState).stage == "compare":
        with contextlib.suppress(queue.Empty):
            answer = lines.get(timeout=ASK_SECONDS)
            if answer:  # The end of the input is no answer: another command may give one.
                return answer.strip().lower() in (*YES, code)
    return None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
