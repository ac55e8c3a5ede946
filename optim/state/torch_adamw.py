"""torch's AdamW, called so that every tensor, and every fragment of one, is stepped to the bits of its fused kernel.

The fused kernel walks raw memory and checks nothing, so it is used only where weight, gradient and moments are alike in
dtype and lie alike in memory. Where dtypes are mixed it steps fp32 copies, a piece at a time, so that bf16 weights or
8-bit moments never have a whole fp32 tensor beside them.

The surprise: on a CPU it rounds the last partial cache line of a tensor in another way than all other entries. So of a
fragment the entries of that line are framed as they lie in the whole tensor (`vector_body`, `frame`).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim.adamw import adamw as torch_adamw

from thriftlab.optim.state.keys import State
from thriftlab.optim.state.storage import load_piece, store_piece, wide

MOMENTS = ("exp_avg", "exp_avg_sq")
LINE = 16  # entries of a cache line; a multiple of the widest vector
PIECE = 2**17  # entries that are stepped at once where that needs temporaries; a multiple of storage.BLOCK


def step_adamw(weights, grads, states, steps, hyper: dict[str, Any]) -> None:
    """torch's AdamW: fused for tensors that are alike, a loop for other layouts, in pieces for mixed dtypes."""
    moments = ([state[name] for state in states] for name in MOMENTS)
    rows = list(zip(weights, grads, *moments, steps, strict=True))
    for i, state in enumerate(states):
        if (body := vector_body(state, weights[i])) < weights[i].numel():
            step_in_pieces(weights[i], grads[i], state, steps[i].clone(), hyper, body)
            rows[i] = (*(t[:body] for t in rows[i][:4]), steps[i])
    mixed = [len({t.dtype for t in row[:4]}) > 1 or row[2].dtype != wide(row[2].dtype) for row in rows]
    for fused in (True, False):
        alike = [row for row, no in zip(rows, mixed, strict=True) if not no and one_layout(*row[:4]) == fused]
        if alike:
            call_torch(map(list, zip(*alike, strict=True)), fused, hyper)
    for i, (weight, grad, _, _, step) in enumerate(rows):
        if mixed[i]:
            step_in_pieces(weight, grad, states[i], step, hyper)


def step_in_pieces(
    weight: Tensor, grad: Tensor, state: State, step: Tensor, hyper: dict[str, Any], begin: int = 0
) -> None:
    """One AdamW step of fp32 copies of weight, gradient and moments from entry `begin` on; `step` counts on."""
    flat_weight, flat_grad = weight.reshape(-1), grad.reshape(-1)  # copies, where there are gaps or a transpose
    for start in range(begin, weight.numel(), PIECE):
        stop = min(start + PIECE, weight.numel())
        m, v = moments = [load_piece(state, name, start, stop) for name in MOMENTS]
        w, g = (flat[start:stop].to(m.dtype, copy=True) for flat in (flat_weight, flat_grad))
        before, behind = frame(state, start, stop)
        framed = [pad(t, (before, behind)) if before or behind else t for t in (w, g, m, v)]
        call_torch((*([t] for t in framed), [step.clone()]), True, hyper)
        if before or behind:
            for t, padded in zip((w, g, m, v), framed, strict=True):
                t.copy_(padded[before : before + stop - start])
        flat_weight[start:stop].copy_(w)
        for name, moment in zip(MOMENTS, moments, strict=True):
            store_piece(state, name, moment, start, stop)
    step += 1
    if not weight.is_contiguous():
        weight.copy_(flat_weight.view(weight.shape))


def vector_body(state: State, weight: Tensor) -> int:
    """How many entries the fused kernel may step in place: of a fragment on a CPU those before its last cache line.

    There the last entries of a tensor are summed in another order than the others. So the entries that a fragment has
    of the whole tensor's last line must be at the end of what is stepped, and no others.
    """
    if "whole.first" not in state or weight.device.type != "cpu":
        return weight.numel()
    last_line = int(state["whole.size"]) // LINE * LINE
    return max(min(weight.numel(), last_line - int(state["whole.first"])), 0) // LINE * LINE


def frame(state: State, start: int, stop: int) -> tuple[int, int]:
    """Entries that are missing before and behind some of a fragment, up to whole cache lines of the whole tensor."""
    if "whole.first" not in state:
        return 0, 0
    first, size = int(state["whole.first"]), int(state["whole.size"])
    return (first + start) % LINE, min(-(-(first + stop) // LINE) * LINE, size) - first - stop


def call_torch(lists: Iterable[list[Tensor]], fused: bool, hyper: dict[str, Any]) -> None:
    """torch's AdamW on lists of weights, gradients, first and second moments and steps; counts the steps on."""
    weights, grads, firsts, seconds, steps = lists
    options: dict[str, Any] = dict(fused=fused, foreach=False, amsgrad=False, maximize=False)
    torch_adamw(weights, grads, firsts, seconds, [], steps, **options, **hyper)


def hyper_of(lr, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    return dict(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)


def steps_before(age: int, like: Tensor) -> Tensor:
    return torch.full((), age - 1.0, dtype=torch.float32, device=like.device)


def one_layout(weight: Tensor, *others: Tensor) -> bool:
    """Whether all lie alike in memory, and without gaps."""
    return is_dense(weight) and all(other.stride() == weight.stride() for other in others)


def is_dense(tensor: Tensor) -> bool:
    """Whether a walk over the memory meets every entry once: no gaps, no entries on each other."""
    if tensor.is_contiguous():
        return True
    size = 1
    for stride, length in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride != size:
            return False
        size *= length
    return True
