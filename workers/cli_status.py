"""What `shardmix-worker status` prints about the worker that runs.

In: the worker's answer. Out: lines for a person.
"""

from __future__ import annotations

import time

from workers.local_messages import Status


def status_lines(status: Status, now_s: float) -> list[str]:
    """The lines.

    Args:
        now_s: the time, seconds since the epoch.
    """
    trust = ", exchanges without encryption allowed" if status.trusted_network else ""
    holder = f"{status.holder} ({status.holder_fingerprint})" if status.holder else "nobody"
    lines = [
        f"{status.name} ({status.fingerprint}) listens on {status.endpoint}",
        f"  version {status.version}, process {status.pid}{trust}",
        f"  used by {holder}",
        "  devices:",
        *(
            f"    {info.device}: {info.label}; lends "
            + (f"{info.num_cores} cores, " if info.num_cores else "")
            + f"{info.memory_bytes / 1e9:.1f} GB"
            for info in status.devices
        ),
    ]
    if status.runners:
        lines.append("  runners:")
        lines += [f"    {runner.device}: process {runner.pid}" for runner in status.runners]
    lines.append("  paired engine hosts:" + ("" if status.hosts else " none"))
    lines += [
        f"    {host.name} ({host.fingerprint}), since {_date(host.added_s)}"
        for host in status.hosts
    ]
    if status.refusals:
        lines.append("  not let in, the latest last:")
    for refusal in status.refusals:
        key = f" ({refusal.fingerprint})" if refusal.fingerprint else ""
        ago = max(0.0, now_s - refusal.time_s)
        lines.append(f"    {ago:,.0f} s ago, {refusal.address or 'unknown'}{key}: {refusal.reason}")
    return lines


def _date(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time_s))
