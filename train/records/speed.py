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


# Dense bf16 matrix peaks in FLOP/s, of products that are summed in fp32, with where they are printed: "sparse" is twice
# that. Names are torch's; the first pattern that one matches counts.
PEAKS = (
    (r"MIG", None),  # a slice of a GPU
    (r"\bGB300\b", 2500e12),  # data sheet GB300 NVL72: 360 PFLOP/s sparse of 72
    (r"\bGB200\b", 2500e12),  # data sheet GB200 NVL72: 360 PFLOP/s sparse of 72
    (r"\bB300\b", 2250e12),  # data sheet HGX B300: 36 PFLOP/s sparse of 8
    (r"\bB200\b", 2250e12),  # data sheet HGX B200: 36 PFLOP/s sparse of 8
    (r"\bGH200\b", 989.5e12),  # data sheet GH200: 1,979 sparse
    (r"\bH200 NVL\b", 835.5e12),  # data sheet H200: 1,671 sparse
    (r"\bH200\b", 989.5e12),  # data sheet H200: 1,979 sparse
    (r"\bH100 PCIe\b", 756.5e12),  # data sheet H100: 1,513 sparse
    (r"\bH100 NVL\b", 835.5e12),  # data sheet H100: 1,671 sparse
    (r"\bH100\b", 989.5e12),  # data sheet H100: 1,979 sparse
    (r"\bH20\b", 148e12),  # data sheet H20: 148
    (r"\bA[18]00\b", 312e12),  # data sheet A100: 312
    (r"\bA30\b", 165e12),  # data sheet A30: 165
    (r"\bL40S\b", 362e12),  # data sheet L40S: 362.05
    (r"\bL40\b", 181e12),  # data sheet L40: 181.05
    (r"\bL4\b", 121e12),  # data sheet L4: 242 sparse
    (r"\bA40\b", 149.7e12),  # data sheet A40: 149.7
    (r"\bA10G\b", 70e12),  # data sheet A10G: 70
    (r"\bA10\b", 125e12),  # data sheet A10: 125
    (r"\bRTX 6000 Ada\b", 364.2e12),  # white paper of the Ada GPUs for workstations: 728.5 sparse
    (r"\bRTX A6000\b", 154.8e12),  # data sheet RTX A6000: 309.7 sparse
    (r"\bRTX 5090$", 209.5e12),  # white paper RTX Blackwell: 419 sparse
    (r"\bRTX 5080$", 112.6e12),  # white paper RTX Blackwell: 225.1 sparse
    (r"\bRTX 4090$", 165.2e12),  # white paper Ada: 330.3 sparse
    (r"\bRTX 3090$", 71e12),  # white paper GA102: 142 sparse
    (r"\bMI355X\b", 2516.6e12),  # AMD's data sheets, as all that follow
    (r"\bMI350X\b", 2306.9e12),
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
