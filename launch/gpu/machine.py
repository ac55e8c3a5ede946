"""Checks of the machine and of what is installed."""

import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from thriftlab.launch.gpu.setting import Finding, Setting
from thriftlab.train.backends.device import why_no_gpu
from thriftlab.train.records.record import provenance
from thriftlab.train.records.speed import peak_flops


def machine(setting: Setting) -> Iterator[Finding]:
    """Versions, device, its peak, a product, and what torch.compile needs."""
    found = provenance()
    numbers: dict[str, Any] = {**found, "python": platform.python_version(), "cuda": torch.version.cuda}
    numbers |= {"nvidia_smi": driver(), "c_compiler": compiler(), "python_headers": headers()}
    missing = [name for name in ("c_compiler", "python_headers") if not numbers[name]]
    wrong = [f"torch.compile needs {name.replace('_', ' ')}, which are not here" for name in missing]
    says = f"torch {torch.__version__}, CUDA {torch.version.cuda}, driver {numbers['nvidia_smi'] or 'none'}"
    if not setting.on_gpu or not torch.cuda.is_available():
        yield Finding(f"{says}; no GPU is used: {why_no_gpu() if setting.on_gpu else 'device=cpu'}", numbers, wrong)
        return
    name, capability = torch.cuda.get_device_name(setting.device), torch.cuda.get_device_capability(setting.device)
    total = torch.cuda.get_device_properties(setting.device).total_memory
    numbers |= {
        "device": name, "capability": capability, "memory_bytes": total, "peak_flops": peak_flops(name),
        "built_for": torch.cuda.get_arch_list(), "cudnn": torch.backends.cudnn.version(), "nccl": nccl(),
    }  # fmt: skip
    says = f"{name}, {total / 1e9:.0f} GB, {says}"
    yield Finding(says, numbers, wrong)
    if not numbers["peak_flops"]:
        wrong.append(f"the peak of {name!r} is not known, so there is no MFU; tell its data sheet")
    error = product_error(setting.device)
    numbers["product_error"] = error
    if not error < 1e-4:
        wrong.append(f"a product of matrices is wrong by {error:.1e}")
    yield Finding(says, numbers, wrong)


def product_error(device: torch.device) -> float:
    """Of an fp32 product on the device, beside the CPU's in float64, relative."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    right = a.double() @ b.double()
    return ((a.to(device) @ b.to(device)).cpu().double() - right).norm().item() / right.norm().item()


def driver() -> str | None:
    """The version of NVIDIA's driver; None where nvidia-smi is not there or does not work."""
    if not (smi := shutil.which("nvidia-smi")):
        return None
    words = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def headers() -> bool:
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def nccl() -> str | None:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
