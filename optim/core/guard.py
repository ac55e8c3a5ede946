"""What every call of `update` and `update_fragments` is held to, whoever makes it: tensors that fit each other.

The fused kernel walks raw memory, and torch's own operators broadcast; so a gradient or a state of another shape is a
ValueError with the tensor's name and both shapes. `Method.__init_subclass__` puts the guard around every method.

Shapes and devices are compared at every call. The rest is looked at when one of them has changed: a mark of what was
found fit is kept by the tensor's name, which costs a few microseconds a tensor and never waits for a device.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.core.fragments import Fragment
from thriftlab.optim.core.products import exact_products
from thriftlab.optim.state.keys import Spec, State, has_data
from thriftlab.optim.state.storage import BLOCK, convert
from thriftlab.optim.state.torch_adamw import MOMENTS, is_dense
from thriftlab.optim.state.weights import dtype_of_step

MOMENT_NAMES = (*MOMENTS, "momentum_buffer", "exp_avg_sq_row", "row_sq", "column_sq")
REMEDY = "load the state of this tensor, or begin anew with optimizer.state[parameter].clear()"


def guarded(update: Callable[..., None]) -> Callable[..., None]:
    """`update` or `update_fragments` that checks first; `parts` are names of tensors or fragments of them."""

    order = [*inspect.signature(update).parameters][1:]

    @functools.wraps(update)
    def call(method, *given, **named) -> None:
        parts, weights, grads, states, group = (*given, *(named[key] for key in order[len(given) :]))
        check(method, parts, weights, grads, states, group)
        with exact_products():
            update(method, parts, weights, grads, states, with_numbers(group))

    return call


def with_numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The group with numbers in place of betas that are tensors."""
    betas = group.get("betas", ())
    if any(isinstance(beta, Tensor) for beta in betas):
        return {**group, "betas": tuple(map(float, betas))}
    return group


@torch.compiler.disable  # a trace would break at each tensor
def check(
    method: Any,
    parts: Sequence[str | Fragment],
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    group: dict[str, Any],
) -> None:
    """ValueError or TypeError where a tensor's arguments do not fit each other."""
    fit, strided = method.fit, torch.strided
    for part, weight, grad, state in zip(parts, weights, grads, states, strict=True):
        shape, device = weight.shape, weight.device
        if grad.shape != shape or grad.device != device or grad.layout is not strided:
            refuse_gradient(name_of(part), weight, grad)
        mark = [id(state) if state else None, shape, weight.dtype, device]
        for value in state.values():
            if isinstance(value, Tensor):
                mark += (value.shape, value.device)
        if fit.get(part) != mark:
            last = fit.get(part)
            if isinstance(part, Fragment):
                check_fragment(part, weight, state)
            else:
                check_tensor(method, part, weight, state, group, last if last and last[0] == mark[0] else mark)
            fit[part] = mark


def name_of(part: str | Fragment) -> str:
    return part.name if isinstance(part, Fragment) else part


def check_tensor(method: Any, name: str, weight: Tensor, state: State, group: dict[str, Any], last: list) -> None:
    """The thorough look at one tensor, and at what its state was made for: `last` is the mark of the same state."""
    if last[1] != weight.shape and any(key.startswith("basis.") for key in state):
        raise ValueError(
            f"{name}: the weight has the shape {tuple(weight.shape)}, and its state is that of a weight "
            f"{tuple(last[1])}; {REMEDY}"
        )
    refuse_kind(name, weight)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim:
            refuse_place(name, key, weight, value)
    settle(state, fitting_spec(method, name, weight, state, group), casts=last[2] != weight.dtype)


def fitting_spec(method: Any, name: str, weight: Tensor, state: State, group: dict[str, Any]) -> Spec:
    """What the state of a tensor must be; ValueError unless it is, dtypes apart."""
    if "max_exp_avg_sq" in state:
        raise ValueError(f"{name}: the state is one of amsgrad=True, which no method here has; save one without it")
    method.check_kind(name, weight, state, group)
    try:
        spec = method.state_spec(tuple(weight.shape), dtype_of_step(weight, group), state, group)
    except NotImplementedError:  # a method of one's own that declares nothing
        return {}
    except ValueError as error:
        raise ValueError(f"{name}: {error}; {REMEDY}") from None
    check_state(name, weight, state, spec)
    return spec


def check_fragment(fragment: Fragment, weight: Tensor, state: State) -> None:
    """Moments of a fragment are flat, as many as the entries that are here of what the basis chooses, or all."""
    entries = fragment.stop - fragment.start
    if weight.shape != (entries,):
        raise ValueError(
            f"{fragment.name}: entries {fragment.start} to {fragment.stop} of a tensor {fragment.shape} are a flat "
            f"({entries},), and the weight is {tuple(weight.shape)}"
        )
    refuse_kind(fragment.name, weight)
    if "basis.first" in state:
        entries = int(state["basis.stop"]) - int(state["basis.first"])
    present: Spec = {key: ((entries,), state[key].dtype) for key in MOMENT_NAMES if key in state}
    check_state(fragment.name, weight, state, present)


def check_state(name: str, weight: Tensor, state: State, spec: Spec) -> None:
    """ValueError unless the state has the shapes of `spec`, and moments of this kind."""
    kept = [key for key in MOMENT_NAMES if key in state]
    wanted = [key for key in MOMENT_NAMES if key in spec]
    lacks = [key for key in wanted if key not in kept]
    if lacks and (kept or ("step" in state and "start" not in state)):  # an idle block has counters alone
        raise ValueError(
            f"{name}: the state has {sorted(state)}, and this method keeps {wanted} of the tensor "
            f"{tuple(weight.shape)}: it is the state of another method or of another kind of tensor; {REMEDY}"
        )
    for key, (shape, _) in spec.items():
        if isinstance(state.get(key), Tensor) and tuple(state[key].shape) != tuple(shape):
            raise ValueError(
                f"{name}: the state {key!r} has the shape {tuple(state[key].shape)}, and a weight "
                f"{tuple(weight.shape)} has {tuple(shape)}; {REMEDY}"
            )
    for key in kept:
        if state[key].dtype == torch.uint8:
            blocks, scale = -(-state[key].numel() // BLOCK), state.get(f"{key}.scale")
            if scale is None or tuple(scale.shape) != (blocks,):
                found = "missing" if scale is None else f"of shape {tuple(scale.shape)}"
                raise ValueError(
                    f"{name}: the state '{key}.scale' is {found}, and {blocks} blocks of a weight "
                    f"{tuple(weight.shape)} have ({blocks},); {REMEDY}"
                )


def settle(state: State, spec: Spec, casts: bool) -> None:
    """Numbers of old torch files become tensors; where weights have another dtype now, state is kept as `spec` says."""
    if isinstance(state.get("step"), int | float):
        state["step"] = torch.tensor(state["step"], dtype=spec.get("step", ((), torch.float32))[1], device="cpu")
    for key, (shape, dtype) in spec.items():
        if casts and shape and key in state:
            convert(state, key, dtype)


def refuse_kind(name: str, weight: Tensor) -> None:
    """ValueError for a tensor that no method can step: complex, or with entries that share memory."""
    if weight.is_complex():
        raise ValueError(
            f"{name} is complex ({weight.dtype}), which no method here can step: keep the parameter as real numbers, "
            "torch.view_as_real, and make it complex in the model with torch.view_as_complex"
        )
    if overlaps(weight):
        raise ValueError(f"{name}: entries of the weight {tuple(weight.shape)} share memory (expand); use a clone")


def refuse_place(name: str, key: str, weight: Tensor, value: Tensor) -> None:
    """ValueError for state elsewhere than its weight, or in its weight's memory, or with entries that share memory."""
    if value.device != weight.device:
        raise ValueError(
            f"{name}: the state {key!r} {tuple(value.shape)} is on {value.device}, and the weight "
            f"{tuple(weight.shape)} is on {weight.device}; load the state once more after you move the model"
        )
    if overlaps(value) or (has_data(value) and value.data_ptr() == weight.data_ptr()):
        raise ValueError(f"{name}: the state {key!r} {tuple(value.shape)} shares memory; use a clone")


def refuse_gradient(name: str, weight: Tensor, grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise TypeError(
            f"{name}: gradients of layout {grad.layout} are not supported; make an embedding with sparse=False"
        )
    raise ValueError(
        f"{name}: the weight is {tuple(weight.shape)} on {weight.device}, and its gradient {tuple(grad.shape)} on "
        f"{grad.device}; call zero_grad() after you replace or move a weight"
    )


def overlaps(tensor: Tensor) -> bool:
    """Whether entries lie on each other, as those of `expand` do."""
    return not is_dense(tensor) and any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
