"""What a run was computed on: the machine, and with GPUs their names, driver, libraries and how products are made."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from thriftlab.optim.core.products import EXACT

DRIVER = Path("/proc/driver/nvidia/version")


def machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        **(of_gpus() if gpus else {}),
    }


def of_gpus() -> dict[str, Any]:
    return {
        "driver": driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "matmul": "fp32" if torch.get_float32_matmul_precision() == EXACT else "tf32",
    }


def driver() -> str | None:
    """The version of NVIDIA's driver, None where neither the kernel nor nvidia-smi says it."""
    said = DRIVER.read_text() if DRIVER.exists() else nvidia_smi()
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", said)
    return found[0] if found else None


def nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return model[1].strip() if model else platform.processor() or platform.machine()
