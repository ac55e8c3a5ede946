"""Which way a hot path runs: plain torch, a Triton kernel of this folder, or Liger's. `THRIFTLAB_KERNELS` decides:

    auto      a kernel where the tensors are on a GPU, torch elsewhere; the default
    torch     torch everywhere: the reference
    triton    a kernel, on a CPU in triton's interpreter (TRITON_INTERPRET=1); KernelError where none can run
    liger     the loss by Liger's kernel (liger_loss.py), all else as with auto; KernelError where that cannot run

What runs is told once to the logger "thriftlab.kernels", and kept for the run's record. An operation that has a kernel,
but not for what it is given now, takes torch and says why (`note`).
"""

import functools
import importlib.util
import logging
import os
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

VARIABLE = "THRIFTLAB_KERNELS"
CHOICES = ("auto", "torch", "triton", "liger")
OPERATIONS = ("fused_step", "cross_entropy_rows", "norm_rows", "branches")  # that have a kernel
DTYPES = (torch.float32, torch.bfloat16)
LIGER = ("cross_entropy_rows",)  # those that Liger has, too
OLDEST = (3, 7)  # of triton
LIGER_NEEDS = {"liger-kernel": (0, 8, 5), "nvidia-cutlass-dsl": (4, 6), "apache-tvm-ffi": (0, 1)}
ONLY_BF16 = "Liger's loss kernel takes bf16 only; set train.precision=bf16"

log = logging.getLogger("thriftlab.kernels")
ran: dict[str, list[str]] = {}  # by operation, in words: what this process took


class KernelError(RuntimeError):
    """A kernel was asked for that cannot run here: one line that says why, and what to do."""


def path(t: Tensor, op: str) -> str:
    """How `op` is to run on tensors like `t`: "torch", "triton" or "liger"; KernelError where that cannot be."""
    return taken_of(choice(), t.device.type, t.dtype, op)


@torch.compiler.assume_constant_result
def taken_of(chosen: str, device: str, dtype: torch.dtype, op: str) -> str:
    way = taken(chosen, device, op)
    if way == "liger" and dtype != torch.bfloat16:
        raise KernelError(f"{VARIABLE}=liger: {ONLY_BF16}; or set {VARIABLE}=auto")
    if way != "torch" and dtype not in DTYPES:
        note(op, f"torch: there is no kernel for {str(dtype).removeprefix('torch.')}")
        return "torch"
    return way


def choice() -> str:
    return os.environ.get(VARIABLE, "auto")


@functools.cache
def taken(chosen: str, device: str, op: str) -> str:
    if device == "meta":  # where nothing is computed
        return "torch"
    if why := impossible(chosen, device):
        raise KernelError(why)
    if chosen == "liger" and op in LIGER:
        way = "liger"
    elif (
        chosen == "torch" or op not in OPERATIONS or why_not_triton(device) or (chosen != "triton" and device == "cpu")
    ):
        way = "torch"
    else:
        way = "triton"
    note(op, way)
    return way


def note(op: str, words: str) -> None:
    """Says once how an operation runs."""
    if words not in ran.setdefault(op, []):
        ran[op].append(words)
        log.info("kernels: %s runs by %s", op, words)


def say_aloud() -> None:
    """Prints from now on what is noted, one line for each."""
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)


def impossible(chosen: str, device: str, precision: str = "bf16") -> str | None:
    """Why the choice is none for tensors of a kind of device, and products in fp32 or bf16; None: it is one."""
    if chosen not in CHOICES:
        return f"{VARIABLE}={chosen}: it is one of {', '.join(CHOICES)}"
    why = None
    if chosen == "triton":
        why = why_not_triton(device)
    elif chosen == "liger":
        why = why_not_liger(device) or (None if precision == "bf16" else ONLY_BF16)
    return why and f"{VARIABLE}={chosen}: {why}; or set {VARIABLE}=auto"


def why_not_triton(device: str) -> str | None:
    if why := too_old():
        return why
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}; use a GPU, or TRITON_INTERPRET=1 for triton's interpreter, which is slow"
    return None


@functools.cache
def too_old() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"triton {triton.__version__} is too old; install {OLDEST[0]}.{OLDEST[1]} or later"
    return None


def why_not_liger(device: str) -> str | None:
    """Its fast loss is for Hopper alone; elsewhere it is a fallback to torch that reads the host in every call."""
    if device != "cuda" or torch.version.hip or torch.cuda.get_device_capability() != (9, 0):
        return "Liger's loss kernel runs on GPUs of compute capability 9.0 (H100, H200) only; use one"
    missing = [f"'{name}>={'.'.join(map(str, least))}'" for name, least in LIGER_NEEDS.items() if found(name) < least]
    return f"Liger's loss kernel needs more; pip install {' '.join(missing)}" if missing else None


def found(package: str) -> tuple[int, ...]:
    """The version of an installed package; (): there is none."""
    try:
        return tuple(int(part) for part in version(package).split(".")[:3] if part.isdecimal())
    except PackageNotFoundError:
        return ()
