"""torch's fused kernels: AdamW, so that every tensor, and every fragment of one, is stepped to its bits; and SGD.

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

from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.lists import by_dtype, fused_sgd, kept_unless, refused
from thriftlab.optim.state.storage import load_piece, store_piece, wide

MOMENTS = ("exp_avg", "exp_avg_sq")
LINE = 16  # entries of a cache line; a multiple of the widest vector
PIECE = 2**17  # entries that are stepped at once where that needs temporaries; a multiple of storage.BLOCK
DEVICE_PIECE = 2**26  # the same on a device, where nothing is in a cache and a launch is dear


def step_adamw(weights, grads, states, steps, hyper: dict[str, Any], applied: Tensor | None = None) -> None:
    """torch's AdamW: fused for tensors that are alike, a loop for other layouts, in pieces for mixed dtypes, and for
    other layouts on a device."""
    moments = ([state[name] for state in states] for name in MOMENTS)
    rows = list(zip(weights, grads, *moments, steps, strict=True))
    for i, state in enumerate(states):
        if (body := vector_body(state, weights[i])) < weights[i].numel():
            step_in_pieces(weights[i], grads[i], state, steps[i].clone(), hyper, applied, body)
            rows[i] = (*(t[:body] for t in rows[i][:4]), steps[i])
    alike = [one_layout(*row[:4]) for row in rows]
    mixed = [
        len({t.dtype for t in row[:4]}) > 1
        or row[2].dtype != wide(row[2].dtype)
        or not (same or (here and applied is None))
        for row, same, here in zip(rows, alike, map(reads_steps, weights), strict=True)
    ]
    for fused in (True, False):
        chosen = [row for row, no, same in zip(rows, mixed, alike, strict=True) if not no and same == fused]
        if chosen:
            call_torch(map(list, zip(*chosen, strict=True)), fused, hyper, applied)
    for i, (weight, grad, _, _, step) in enumerate(rows):
        if mixed[i]:
            step_in_pieces(weight, grad, states[i], step, hyper, applied)


def step_in_pieces(
    weight: Tensor, grad: Tensor, state: State, step: Tensor, hyper: dict[str, Any], applied: Tensor | None = None,
    begin: int = 0,
) -> None:  # fmt: skip
    """One AdamW step of fp32 copies of weight, gradient and moments from entry `begin` on; `step` counts on."""
    kept = [weight, *(state[key] for name in MOMENTS for key in (name, f"{name}.scale") if key in state)]
    with kept_unless(applied, kept):
        flat_weight, flat_grad = weight.reshape(-1), grad.reshape(-1)  # copies, where there are gaps or a transpose
        for start in range(begin, weight.numel(), piece_of(weight)):
            stop = min(start + piece_of(weight), weight.numel())
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
        if not weight.is_contiguous():
            weight.copy_(flat_weight.view(weight.shape))
    step += 1 if applied is None else applied


def piece_of(weight: Tensor) -> int:
    return PIECE if reads_steps(weight) else DEVICE_PIECE


def reads_steps(weight: Tensor) -> bool:
    """Whether nothing waits when the host reads a number where the weight is."""
    return weight.device.type in ("cpu", "meta")


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


def call_torch(
    lists: Iterable[list[Tensor]], fused: bool, hyper: dict[str, Any], applied: Tensor | None = None
) -> None:
    """torch's AdamW on lists of weights, gradients, first and second moments and steps; counts the steps on. Nothing
    changes where `applied` is 0, which only the fused one knows."""
    weights, grads, firsts, seconds, steps = lists
    options: dict[str, Any] = dict(fused=fused, foreach=False, amsgrad=False, maximize=False)
    if applied is not None:
        options["found_inf"] = refused(applied)
    torch_adamw(weights, grads, firsts, seconds, [], steps, **options, **hyper)


def subtract(weights: list[Tensor], directions: list[Tensor], lr: float | Tensor, applied: Tensor, no: Tensor) -> None:
    """weights -= lr directions, in place, by torch's fused SGD; every bit stays where `applied` is 0, and `no` is 1."""
    alike = [i for i, weight in enumerate(weights) if one_layout(weight, directions[i])]
    for places in by_dtype(weights, alike):
        w, d = [weights[i] for i in places], [directions[i] for i in places]
        fused_sgd(w, d, [], lr=lr, momentum=0.0, found_inf=no)
    others = [i for i in range(len(weights)) if i not in alike]
    with kept_unless(applied, [weights[i] for i in others]):
        for i in others:
            weights[i].sub_(directions[i] * lr)


def hyper_of(lr, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    return dict(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)


def steps_before(age: Age, like: list[Tensor]) -> list[Tensor]:
    """What torch counts on by one, for each tensor."""
    if isinstance(age, Tensor):
        return list((age - 1).float().unbind())
    return [torch.full((), age - 1.0, dtype=torch.float32, device=tensor.device) for tensor in like]


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
