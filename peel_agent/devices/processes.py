"""The processes of this agent, as far as NVML's process numbers can be compared with them."""

from __future__ import annotations

from pathlib import Path

import psutil

INITIAL_NAMESPACE = "pid:[4026531836]"
"""The host's process namespace (the kernel's PROC_PID_INIT_INO); in a container it is another."""


def own_processes(namespace: Path = Path("/proc/self/ns/pid")) -> frozenset[int] | None:
    """The numbers of this process and of all that it started; None in a container, where NVML tells the host's."""
    try:
        if str(namespace.readlink()) != INITIAL_NAMESPACE:
            return None
        this = psutil.Process()
        return frozenset({this.pid, *(child.pid for child in this.children(recursive=True))})
    except (OSError, psutil.Error):
        return None
