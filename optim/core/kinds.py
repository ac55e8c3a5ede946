"""Which tensors a kernel steps, and how: what a method says of one, and whether its state is such that it can be.

What has no kind, begins or refreshes is stepped by plain torch. Which way a tensor goes is a function of its state and
of the step alone, so a resumed run takes the same ways and gives the same bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thriftlab.optim.core.due import steps_to_refresh
from thriftlab.optim.core.fragments import Fragment
from thriftlab.optim.core.guard import name_of
from thriftlab.optim.state.counters import begin_counting, capturing
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.torch_adamw import MOMENTS
from thriftlab.optim.state.weights import STEP, few_bits, low_spec

KEPT = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # how moments and gradients are kept
ALL, ROWS, COLUMNS, NOTHING = range(4)  # which entries of a tensor have moments


class Numbers(NamedTuple):
    """What a step multiplies with."""

    lr: float
    keep: float  # what decay leaves of a weight: 1 - lr wd
    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0
    free_lr: float = 0.0  # of entries without moments
    early_eps: bool = False  # eps is added before the bias is corrected


class Kind(NamedTuple):
    """How a tensor is stepped."""

    where: int  # which entries have moments
    numbers: Callable[[dict[str, Any]], Numbers]  # of a group
    plain: bool = False  # counted in fp32, as torch's AdamW counts
    free: str = "none"  # the rule of entries without moments
    still: bool = False  # nothing moves but counters


def numbers_of_adamw(group: dict[str, Any], **changes: Any) -> Numbers:
    lr = float(group["lr"])
    betas = tuple(map(float, group["betas"]))
    return Numbers(lr, 1 - lr * group["weight_decay"], betas, group["eps"])._replace(**changes)  # type: ignore[arg-type]


WORDS = {  # what a class says of its step counts for that step, and not for what a subclass makes of it
    "kernel_step": ("update",),
    "plain_numbers": ("update_plain",),
    "matrix_kind": ("update_matrices", "step_batch", "descend_all", "descend"),
}


def speaks_for(kind: Any, word: str) -> bool:
    """Whether the class that says `word` is the one that defines what it is about, or one below."""
    return found_to_speak(kind, word)


@functools.cache
def found_to_speak(kind: Any, word: str) -> bool:
    depth = {name: i for i, base in reversed([*enumerate(kind.__mro__)]) for name in vars(base)}
    return all(depth[word] <= depth.get(verb, depth[word]) for verb in WORDS[word])


def may_launch(method: Any, weight: Tensor, group: dict[str, Any]) -> bool:
    """Whether the tensors of a call can be any for kernels. A CUDA graph repeats numbers, and so takes plain torch."""
    if "update" in vars(method) or not speaks_for(type(method), "kernel_step") or capturing():
        return False
    if any([isinstance(x, Tensor) and x.is_cuda for x in (group["lr"], *group.get("betas", ()))]):
        return False
    return not weight.is_cuda or weight.device.index in (None, torch.cuda.current_device())


def kind_of(
    method: Any, part: str | Fragment, weight: Tensor, grad: Tensor, state: State, group: dict[str, Any]
) -> tuple[Kind | None, bool]:
    """How kernels step a tensor, None if they do not; and whether they can do so now."""
    shape = part.shape if isinstance(part, Fragment) else tuple(weight.shape)
    kind = method.kernel_step(shape, state, group)
    few = few_bits(weight, group)
    known = (few or weight.dtype == torch.float32) and grad.dtype in (torch.float32, torch.bfloat16)
    if kind is None or not known or (isinstance(part, Fragment) and kind.where in (ROWS, COLUMNS)):
        return None, False
    moments = [] if kind.where == NOTHING else [*MOMENTS]
    counters = [] if kind.plain or "gap" not in group else ["step", "start"]
    needed = [*moments, *counters, *(["step"] if kind.plain else [])]
    needed += low_spec(tuple(weight.shape), weight.dtype, group)
    if not weight.numel() or any(key not in state for key in needed):
        return kind, False
    if any(state[key].dtype not in KEPT for key in moments):
        return None, False
    if not all(t.is_contiguous() for t in (weight, grad, *(state[key] for key in moments))):
        return kind, False
    begin_counting((*counters, *([STEP] if STEP in needed else [])), weight, state, group)
    if kind.plain:
        state["step"] = state["step"].to(weight.device)
    return kind, not counters or steps_to_refresh(name_of(part), state, group) > 0
