"""How much memory a process took at most, and how near a device came to its peak."""

import re
import resource
import sys
from pathlib import Path

import torch


def peak_bytes() -> int:
    """Highest memory of this process so far: allocated on the GPU where one is used, else resident on the host."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024  # ru_maxrss would start at what the parent process had
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Dense bf16 matrix peaks in FLOP/s, from the makers' data sheets (where NVIDIA prints only the number with sparsity,
# half of it). The first pattern that the device's name matches counts.
PEAKS = (
    (r"MIG", None),  # a slice of a GPU
    (r"\bB200\b", 2250e12),
    (r"\bH200 NVL\b", 835.5e12),
    (r"\bH200\b", 989.5e12),
    (r"\bH100 PCIe\b", 756.5e12),
    (r"\bH100 NVL\b", 835.5e12),
    (r"\bH100\b", 989.5e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bA10\b", 125e12),
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bRTX 4090$", 165.2e12),
    (r"\bRTX 3090$", 71e12),
    (r"\bMI325X\b", 1307.4e12),
    (r"\bMI300X\b", 1307.4e12),
    (r"\bMI250X\b", 383e12),
)


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak of a device by the name that torch gives it, FLOP/s; None where it is not known."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, name)), None)


def mfu(tokens_per_second: float, flops_per_token: float, device: torch.device | str, devices: int = 1) -> float | None:
    """Model FLOPs utilisation (PaLM, arXiv 2204.02311) against the dense bf16 peak; None where no peak is known.

    Args:
        tokens_per_second: Of all devices together.
        flops_per_token: Of the model, forward and backward, without recomputation.
    """
    device = torch.device(device)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return tokens_per_second * flops_per_token / (peak * devices) if peak else None
