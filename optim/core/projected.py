"""What GaLore, Fira and APOLLO have in common: Adam on a gradient of low rank, with two conventions of its own.

Their Adam (that of Hugging Face) adds eps before bias correction, and weight decay comes after the step, for plain
tensors as for matrices:

    N = sqrt(1 - b2^k) / (1 - b1^k)  M / (sqrt(V) + eps)        W <- W - lr N        W <- (1 - lr wd) W

The surprise: that is torch's Adam with eps / sqrt(1 - b2^k) in place of eps, so torch's fused kernel takes the step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thriftlab.kernels.dispatch import note, path
from thriftlab.optim.core.kinds import Numbers, numbers_of_adamw
from thriftlab.optim.core.products import model_products
from thriftlab.optim.core.split import SplitOptimizer, splits
from thriftlab.optim.state.counters import Age, capturing, count_together, counts_on_host
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.lists import each
from thriftlab.optim.state.rules import Adam, decay
from thriftlab.optim.state.storage import make_zero, wide
from thriftlab.optim.state.subspaces import add_up, basis_of
from thriftlab.optim.state.torch_adamw import hyper_of, step_adamw

ADAM = Adam()
TINY = 1e-8  # keeps quotients of norms finite, as in the published code


class Projected(SplitOptimizer):
    """A split method with these conventions."""

    decay_after = takes_applied = True

    def limiter_spec(self, shape: tuple[int, ...], dtype: torch.dtype, overrides: dict[str, Any]) -> Spec:
        """The state of `growth_limit`, which split matrices have."""
        split = splits(shape, {**self.defaults, **overrides})
        return dict.fromkeys(("limiter", "diagnostic.limiter"), ((), wide(dtype))) if split else {}

    def plain_numbers(self, group: dict[str, Any]) -> Numbers:
        n = numbers_of_adamw(group, early_eps=True)
        return n._replace(lr=n.lr * n.keep)  # decay comes after the step

    def update_plain(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        adam_with_early_eps(weights, grads, states, group)


def adam_with_early_eps(weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    """The step of plain tensors; creates the state of new ones."""
    for weight, grad, state in zip(weights, grads, states, strict=True):
        if "step" not in state:
            state["step"] = torch.tensor(0.0, device="cpu" if counts_on_host(weight, group) else weight.device)
            make_zero(ADAM.buffers, weight, state, group)
        if counts_on_host(weight, group):
            state["step"] += 1
            age = int(state["step"])
            ADAM.descend([weight], [grad], [state], age, with_early_eps(group, age), group["lr"])
            decay([weight], group)
    if weights and not counts_on_host(weights[0], group):
        step_plain(weights, grads, states, group)


def step_plain(weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    """The same step on a device: what follows from its counters is in the learning rate of each tensor."""
    applied = group.get("applied")
    for weight, state in zip(weights, states, strict=True):
        state["step"] = state["step"].to(weight.device)
    steps = [state["step"] for state in states]
    count_together(steps, applied)
    lrs = group["lr"] * correction(torch.stack(steps).double(), group)  # [tensors]
    old = torch.full((), torch.inf, device=weights[0].device)
    for weight, grad, state, lr in zip(weights, grads, states, lrs.float().unbind(), strict=True):
        hyper = hyper_of(lr, group["betas"], group["eps"], weight_decay=0.0)
        step_adamw([weight], [grad], [state], [old], hyper, applied)
    decay(weights, group)


def directions(smalls: list[Tensor], states: list[State], age: Age, group: dict[str, Any]) -> list[Tensor]:
    """Adam's N of the gradient's coordinates, bias-corrected."""
    if adam_by_kernel(smalls, states, by_row := [1] * len(smalls)):
        return adam_small(smalls, states, age, group, by_row, directions=True, sizes=False)[0]
    if not isinstance(age, Tensor):
        return ADAM.directions(smalls, states, age, with_early_eps(group, age))
    normalized = ADAM.directions(smalls, states, never_young(age), group)
    for n, factor in zip(normalized, each(correction(age, group).to(wide(smalls[0].dtype)), len(smalls)), strict=True):
        n.mul_(factor)
    return normalized


def never_young(age: Tensor) -> Tensor:
    """An age at which nothing is left to correct; so eps, which torch adds after the correction, is as it is."""
    return torch.full_like(age, torch.inf)


def with_early_eps(group: dict[str, Any], age: int) -> dict[str, Any]:
    """The group with the eps that does after bias correction what its eps does before it."""
    return {**group, "eps": group["eps"] / (1 - group["betas"][1] ** age) ** 0.5}


def correction(age: Age, group: dict[str, Any]) -> Any:
    """sqrt(1 - b2^k) / (1 - b1^k)"""
    b1, b2 = group["betas"]
    return (1 - b2**age) ** 0.5 / (1 - b1**age)


def by_kernel(matrices: list[Tensor], dims: Sequence[int | None]) -> bool:
    """Whether kernels/norm_rows.py walks over these: fp32, without gaps, a norm or a factor for each channel."""
    if None in dims or path(matrices[0], "norm_rows") != "triton" or capturing():
        return False  # a CUDA graph would keep the addresses of this step
    fit = all(matrix.dtype == torch.float32 and matrix.is_contiguous() for matrix in matrices)
    if not fit:
        note("norm_rows", "torch where matrices or moments are not fp32, or have gaps")
    return fit


def rows_of(dims: Sequence[int | None]) -> list[bool]:
    """Whether the channels, along which norms are taken, are rows."""
    return [dim == 1 for dim in dims]


def coordinates(grads: list[Tensor], states: list[State], subspace: Any) -> list[Tensor]:
    """R = down(G)"""
    with model_products():
        return [subspace.down(grad, basis_of(state)) for grad, state in zip(grads, states, strict=True)]


def add_back(weights: list[Tensor], smalls: list[Tensor], states: list[State], subspace: Any, scale: Any) -> None:
    """W += scale up(N)"""
    with model_products():
        for weight, small, state in zip(weights, smalls, states, strict=True):
            add_up(weight, small, subspace, basis_of(state), scale)


def adam_of_channels(
    smalls: list[Tensor], states: list[State], age: Age, group: dict[str, Any], dims: Sequence[int | None],
    directions_too: bool = True,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """(N, |N|, |R|) of the gradient's coordinates R; N may be left out."""
    if adam_by_kernel(smalls, states, dims):
        return adam_small(smalls, states, age, group, dims, directions_too, sizes=True)
    normalized = directions(smalls, states, age, group)
    return normalized, all_norms(normalized, dims), all_norms(smalls, dims)


def adam_by_kernel(smalls: list[Tensor], states: list[State], dims: Sequence[int | None]) -> bool:
    moments = [state[name] for name in ADAM.buffers for state in states]
    fit = all(moment.shape == small.shape for moment, small in zip(moments, [*smalls, *smalls], strict=True))
    return fit and by_kernel([*smalls, *moments], dims)


def adam_small(
    smalls: list[Tensor], states: list[State], age: Age, group: dict[str, Any], dims: Sequence[int | None],
    directions: bool, sizes: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    from thriftlab.kernels import norm_rows

    firsts, seconds = ([state[name] for state in states] for name in ADAM.buffers)
    factors = correction(age, group) * torch.ones(len(smalls), device=smalls[0].device, dtype=torch.float64)
    betas, eps, rows = group["betas"], group["eps"], rows_of(dims)
    return norm_rows.adam_small(smalls, firsts, seconds, factors.float(), betas, eps, rows, directions, sizes)


def scale_add(matrices: list[Tensor], others: list[Tensor], factors: list[Tensor], dims: Sequence[int | None]) -> None:
    """W += f G, with a factor for each channel."""
    if by_kernel([*matrices, *others], dims):
        from thriftlab.kernels import norm_rows

        return norm_rows.scale_add(matrices, others, factors, rows_of(dims))
    for matrix, other, factor in zip(matrices, others, factors, strict=True):
        matrix.addcmul_(other, factor)


def norms(matrix: Tensor, dim: int | None) -> Tensor:
    """Norms along `dim`, or the one of all, in fp32 at least  # [m, 1], [1, n] or []"""
    if (
        dim == 0 and matrix.device.type == "cpu"
    ):  # where torch's vector_norm walks down each column, eight times as slow
        return matrix.to(wide(matrix.dtype)).square().sum(0, keepdim=True).sqrt_()
    return torch.linalg.vector_norm(matrix, dim=dim, keepdim=dim is not None, dtype=wide(matrix.dtype))


def all_norms(matrices: list[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
    if by_kernel(matrices, dims):
        from thriftlab.kernels import norm_rows

        return norm_rows.norms(matrices, rows_of(dims))
    return [norms(matrix, dim) for matrix, dim in zip(matrices, dims, strict=True)]


def quotients(above: list[Tensor], below: list[Tensor]) -> list[Tensor]:
    """Of norms."""
    return list(torch._foreach_div(above, torch._foreach_add(below, TINY)))


def without(factor: float | Tensor, sizes: Tensor) -> Tensor:
    return sizes / (factor.to(sizes.dtype) if isinstance(factor, Tensor) else factor)


def lengths(phis: list[Tensor], sizes: list[Tensor]) -> Tensor:
    """Of each matrix the norm of phi * norm over its channels, and 0 for a channel where phi is: its norm may be beyond
    the largest number  # [matrices]"""
    phi, size = (torch.cat([channels.reshape(-1) for channels in several]) for several in (phis, sizes))
    scaled = torch.where(phi == 0, phi, phi * size)
    return torch.stack(torch._foreach_norm(scaled.split([channels.numel() for channels in phis])))


def growth_limit(norm: Tensor, state: State, gamma: float) -> Tensor:
    """L >= 1, such that norm / L is at most gamma times its value at the step before (Fira, 2410.01623).

    A norm of zero leaves no trace: the next one is held against the last that was not zero. Nor does one beyond the
    largest number, by which the step is divided away.
    """
    last = state["limiter"].to(norm.device) if "limiter" in state else torch.full_like(norm, torch.inf)
    ratio = torch.where(norm == last, 1.0, norm / (last + TINY))  # both infinite: nothing to hold it against
    state["diagnostic.limiter"] = factor = ratio.clamp_(min=gamma) / gamma
    state["limiter"] = torch.where((norm > 0) & norm.isfinite(), norm / factor, last)
    return factor


def growth_limits(sizes: Tensor, states: list[State], gamma: float) -> list[Tensor]:
    """The same of several matrices  # sizes: [matrices]"""
    for state in states:
        for key in ("limiter", "diagnostic.limiter"):
            if key not in state:
                state[key] = torch.full_like(sizes[0], torch.inf)
    together = {"limiter": torch.stack([state["limiter"].to(sizes.device) for state in states])}
    factors = growth_limit(sizes, together, gamma)
    for key, values in together.items():
        torch._foreach_copy_([state[key] for state in states], list(values.unbind()))
    return list(factors.unbind())
