"""How many cores a process may use, where nobody says."""

import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use; a container's quota counts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no quota: "max"
        return cores
