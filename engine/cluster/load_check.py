"""Whether a Load says something that can be computed, before anything is built from it.

In: a message whose parts are each of the right type. Out: nothing, or the error that names the
field. Parts that are right alone may not fit together: a plan of more layers than the
configuration has, a tensor of another shape. It opens nothing and allocates nothing large.
"""

from __future__ import annotations

import re

from engine.cluster import messages as m
from engine.cluster.security import is_public_key
from engine.errors import PlanError, ProtocolError, one_line
from engine.model.config import ModelConfig
from engine.plan.plan import PlanShape
from engine.weights.formats import FORMATS
from engine.weights.names import expected_shapes

MAX_KV_WINDOW = 1 << 30
MAX_FILES = 4096
_PORT = r"([1-9][0-9]{0,4})"
_HOST = r"([A-Za-z0-9][A-Za-z0-9_.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9_.-]{1,15})?\])"


def check_load(load: m.Load) -> None:
    """Refuse what does not fit together.

    Raises: ProtocolError, ConfigError, PlanError: names the field and the rule.
    """
    load.config.validate()
    load.plan.validate()
    _check_shape(load)
    _check_peers(load)
    if not 1 <= load.kv_window <= MAX_KV_WINDOW:
        raise ProtocolError(
            f"kv_window is {load.kv_window:,} positions, it must be 1 to {MAX_KV_WINDOW:,}"
        )
    if load.num_threads < 1:
        raise ProtocolError(f"num_threads is {load.num_threads}, it must be at least 1")
    if len(load.files) > MAX_FILES:
        raise ProtocolError(f"{len(load.files):,} files, at most {MAX_FILES:,} make a checkpoint")
    if load.rendezvous and not is_address(load.rendezvous):
        raise ProtocolError(f"rendezvous {one_line(load.rendezvous, 100)!r} is no ADDRESS:PORT")
    _check_tensors(load)


def check_endpoint(endpoint: str, what: str) -> str:
    """Return an endpoint on a network that may be connected to.

    A peer that could name any endpoint could reach local sockets of this computer.

    Raises: ProtocolError: it is none; names `what`.
    """
    if not endpoint.startswith("tcp://") or not is_address(endpoint.removeprefix("tcp://")):
        raise ProtocolError(f"{what} is {one_line(endpoint, 100)!r}, it must be tcp://ADDRESS:PORT")
    return endpoint


def is_address(text: str) -> bool:
    """Whether a text is ADDRESS:PORT, an IPv6 address in brackets."""
    found = re.fullmatch(f"{_HOST}:{_PORT}", text)
    return found is not None and int(found[3]) <= 65535


def is_host(text: str) -> bool:
    """Whether a text is an address or a name of a computer, without a port."""
    return re.fullmatch(_HOST, text) is not None


def _check_shape(load: m.Load) -> None:
    """The plan must be one of this model; only its quanta are its own."""
    shape, own = load.plan.shape, PlanShape.from_config(load.config)
    for field in ("num_layers", "num_heads", "num_kv_heads", "vocab_size"):
        planned, there = getattr(shape, field), getattr(own, field)
        if planned != there:
            raise PlanError(f"plan shape: {field} is {planned}, the model has {there}")
    for row in range(1, shape.head_row, 2):
        if shape.units(row) != own.units(row):
            raise PlanError(
                f"plan shape: {shape.row_name(row)} has {shape.units(row):,} columns, the model "
                f"{own.units(row):,}"
            )


def _check_peers(load: m.Load) -> None:
    used = load.plan.used_devices()
    if load.device_index not in used:
        raise ProtocolError(f"device {load.device_index} has no share in the plan")
    named = sorted(peer.device_index for peer in load.peers)
    needed = [index for index in used if index != load.device_index]
    if named != needed:
        raise ProtocolError(
            f"peers are devices {named[:8]}, the plan needs each of {needed[:8]} once"
        )
    for peer in load.peers:
        name = f"peer {peer.device_index}"
        check_endpoint(peer.exchange_endpoint, f"exchange_endpoint of {name}")
        if not is_public_key(peer.public_key):
            raise ProtocolError(f"public_key of {name} is not a CURVE key")


def _check_tensors(load: m.Load) -> None:
    """Shapes follow from the configuration; a part of a tensor is allocated by its shape."""
    config, count = load.config, len(load.tensors)
    # Each expert has three tensors: this many names are not made up for a configuration alone.
    least = _least_tensors(config)
    if count < least:
        raise ProtocolError(f"tensors has {count:,} entries, the model needs {least:,} at least")
    found = {info.name: info for info in load.tensors}
    if len(found) != count:
        raise ProtocolError("tensors names one of them twice")
    for name, shape in expected_shapes(config):
        info = found.get(name)
        if info is None:
            continue  # Of the output head and the vision part, say; who needs it will miss it.
        if info.shape != shape:
            raise ProtocolError(
                f"tensor {name} says {list(info.shape)[:8]}, the model needs {list(shape)}"
            )
        stored = FORMATS.get(info.format)
        if stored is None or not stored.is_weight or shape[-1] % stored.block_size:
            raise ProtocolError(
                f"tensor {name} {list(shape)} cannot be in format {one_line(info.format, 50)!r}"
            )


def _least_tensors(config: ModelConfig) -> int:
    return sum(3 * config.num_experts(layer) for layer in range(config.num_layers))
