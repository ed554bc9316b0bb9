"""What a worker says of itself, before it reaches plans and windows.

In: messages of a paired worker, each part of the right type. Out: the same with texts that fit one
line, or an error that names the field. A worker names its devices; plans and people read the names.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from msgspec.structs import replace

from engine.cluster import messages as m
from engine.cluster.load_check import check_endpoint, is_address
from engine.cluster.security import is_public_key
from engine.errors import ProtocolError, one_line

MAX_NODE_DEVICES = 64
MAX_PROCESSES = 256
MAX_TEXT = 200
MAX_CAUSE = 1000
_KIND = re.compile(r"cpu|cuda[0-9]{1,3}")

M = TypeVar("M", bound=m.Message)


def checked(message: M, *, is_local: bool) -> M:
    """A worker's message, fit to be kept and shown.

    Args:
        is_local: whether the worker is a child of this process, whose runners may listen on local
            sockets.
    Raises: ProtocolError: names the field.
    """
    if isinstance(message, m.NodeDescription):
        _check_devices("devices", [d.device for d in message.devices])
        if not message.devices:
            raise ProtocolError("devices is empty; a worker lends one at least")
        for device in message.devices:
            if not device.num_cores and device.kind == "cpu":
                raise ProtocolError(f"num_cores of {device.device} is 0")
        return replace(
            message,
            devices=tuple(replace(d, label=_text(d.label)) for d in message.devices),
            **{
                field: _text(getattr(message, field))
                for field in ("name", "host_name", "machine", "system", "version")
            },
        )
    if isinstance(message, m.Telemetry):
        if len(message.processes) > MAX_PROCESSES:
            raise ProtocolError(f"processes has {len(message.processes):,} entries")
        _check_devices("gpus", [gpu.device for gpu in message.gpus])
        for part in (message, *message.processes, *message.gpus):
            _check_numbers(part)
        return replace(
            message, processes=tuple(replace(p, role=_text(p.role)) for p in message.processes)
        )
    if isinstance(message, m.SpeedReport):
        _check_devices("devices", [speed.device for speed in message.devices])
        for part in (message, *message.devices):
            _check_numbers(part)
    elif isinstance(message, m.RunnerStarted):
        _check_started(message, is_local)
    elif isinstance(message, m.RunnerExited):
        return replace(message, cause=one_line(message.cause, MAX_CAUSE))
    elif isinstance(message, m.Failed):
        return replace(message, message=one_line(message.message, MAX_CAUSE))
    return message


def _check_devices(field: str, names: Iterable[str]) -> None:
    kinds = Counter(name.rpartition("/")[2] for name in names)
    if len(kinds) > MAX_NODE_DEVICES:
        raise ProtocolError(f"{field} has {len(kinds):,} entries, at most {MAX_NODE_DEVICES}")
    for kind, count in kinds.items():
        if _KIND.fullmatch(kind) is None:
            raise ProtocolError(f"{field} names {one_line(kind, 50)!r}, not cpu or cuda0, cuda1 …")
        if count > 1:
            raise ProtocolError(f"{field} names {kind} {count:,} times")


def _check_numbers(part: m.Message) -> None:
    """Every float of a struct is a number >= 0."""
    for field in part.__struct_fields__:
        number = getattr(part, field)
        # A sensor may well read below zero.
        is_cold = field.endswith("_c") and number is not None and -300 < number < 0
        if (
            isinstance(number, float)
            and not is_cold
            and not (math.isfinite(number) and number >= 0)
        ):
            raise ProtocolError(f"{field} of {type(part).__name__} is {number}")


def _check_started(message: m.RunnerStarted, is_local: bool) -> None:
    if not is_local:
        check_endpoint(message.control_endpoint, "control_endpoint of a runner")
    check_endpoint(message.exchange_endpoint, "exchange_endpoint of a runner")
    if message.rendezvous and not is_address(message.rendezvous):
        raise ProtocolError(f"rendezvous {one_line(message.rendezvous, 100)!r} is no ADDRESS:PORT")
    if not is_public_key(message.public_key):
        raise ProtocolError("public_key of a runner is not a CURVE key")


def _text(text: str) -> str:
    return one_line(text, MAX_TEXT)
