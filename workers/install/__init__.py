"""The worker as a service of this computer: started at boot, and again when it fails.

`choose_service` picks what this system has; each system is one module behind `Service`.
"""

from __future__ import annotations

from workers.install.service import Service, UnsupportedService


def choose_service(platform: str) -> Service:
    """The service manager of a system.

    Args:
        platform: as in `sys.platform`.
    """
    if platform == "linux":
        from workers.install.systemd import SystemdService

        return SystemdService()
    return UnsupportedService({"darwin": "macOS", "win32": "Windows"}.get(platform, platform))
