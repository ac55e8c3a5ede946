"""Where a rank computes: `backend.device` as a torch.device. A GPU that is asked for and not there is refused."""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator

from thriftlab.data.errors import BackendError


def is_device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text, re.ASCII):
        raise ValueError("it takes auto, cpu, cuda, or one GPU by its number, as cuda:1")
    return text


Device = Annotated[str, AfterValidator(is_device)]


def choose_device(asked: str) -> torch.device:
    """The device of a process that is alone. auto: a GPU where torch sees one."""
    if asked == "cpu" or asked == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BackendError(f"backend.device = {asked}: {why_no_gpu()}; or take backend.device=cpu")
    if asked == "auto":
        return torch.device("cuda")
    device, count = torch.device(asked), torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise BackendError(f"backend.device = {asked}: torch sees {count} GPU(s), cuda:0 to cuda:{count - 1}")
    return device


def choose_own_device(asked: str, local_rank: int | None) -> torch.device:
    """The device of one of several ranks: each has a GPU of its own, the one of its number on its machine."""
    device = choose_device(asked)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise BackendError(f"backend.device = {asked} is one GPU, and each rank needs its own; use backend.device=cuda")
    if local_rank is None:
        raise BackendError(
            "LOCAL_RANK is missing in the environment, so a rank does not know its GPU; start the ranks with torchrun, "
            "or take backend.device=cpu"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise BackendError(
            f"rank {local_rank} of this machine has no GPU of its own: torch sees {count}; start {count} process(es) "
            f"on it (torchrun --nproc_per_node {count}), or take backend.device=cpu"
        )
    return torch.device("cuda", local_rank)


def generators(device: torch.device) -> list[torch.Generator]:
    """Those that a module draws from which computes on this device: the CPU's, and the device's own."""
    if device.type == "cpu":
        return [torch.default_generator]
    number = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, *torch.cuda.default_generators[number : number + 1]]


@contextmanager
def same_draws_again(device: torch.device) -> Iterator[None]:
    """What is drawn within will be drawn once more after it."""
    held = [(generator, generator.get_state()) for generator in generators(device)]
    try:
        yield
    finally:
        for generator, state in held:
            generator.set_state(state)


def best_precision(device: torch.device) -> str:
    """What `train.precision=auto` is on a device."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def why_no_gpu() -> str:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA; install another, as make run does on a machine with a "
            f"GPU"
        )
    return f"torch {torch.__version__} sees no GPU; `nvidia-smi` says whether its driver works"


def has_nvidia() -> bool:
    """Whether this machine has an NVIDIA GPU, whatever torch is."""
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia").exists()


def warn_of_idle_gpu(asked: str) -> None:
    """Says that a run takes the CPU beside a GPU, where nobody chose so."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if asked == "auto" and has_nvidia() and not hidden and not torch.cuda.is_available():
        warnings.warn(
            f"this machine has an NVIDIA GPU, but the CPU is used: {why_no_gpu()}; backend.device=cpu is for the CPU "
            f"without this warning",
            RuntimeWarning,
            stacklevel=2,
        )
