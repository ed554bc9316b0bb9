"""What the scheduler measured, in the form that clients hear it in. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from engine.cluster.coordinator import PlanLoaded
from engine.cluster.messages import LinkFigures
from engine.decode.sequence import DeviceTotals
from engine.errors import one_line
from engine.host import messages as api

# Characters that a device has to name its kernels.
MAX_KERNELS = 60


def loaded_bytes(loaded: PlanLoaded) -> tuple[api.LoadedBytes, ...]:
    """Where each device's weights came from."""
    return tuple(
        api.LoadedBytes(
            device=device,
            received=message.received_bytes,
            cached=message.cached_bytes,
            local=message.local_bytes,
        )
        for device, message in loaded.devices.items()
    )


def kernels(loaded: PlanLoaded) -> tuple[api.DeviceKernels, ...]:
    """What computes on each device, as it says."""
    return tuple(
        api.DeviceKernels(device=device, kernels=one_line(message.kernels, MAX_KERNELS))
        for device, message in loaded.devices.items()
    )


def links(measured: Mapping[tuple[str, str], LinkFigures]) -> tuple[api.Link, ...]:
    """The links of a plan."""
    return tuple(
        api.Link(
            from_device=first,
            to_device=second,
            round_trip_seconds=figures.round_trip_seconds,
            bytes_per_second=figures.bytes_per_second,
        )
        for (first, second), figures in measured.items()
    )


def device_usage(totals: dict[str, DeviceTotals]) -> tuple[api.DeviceUsage, ...]:
    """Counters as the window shows them."""
    return tuple(
        api.DeviceUsage(
            device=device,
            compute_s=t.compute_ns / 1e9,
            wait_s=t.wait_ns / 1e9,
            network_s=t.serialise_ns / 1e9,
            network_bytes=t.sent_bytes + t.received_bytes,
            cache_bytes=t.cache_bytes,
        )
        for device, t in totals.items()
    )
