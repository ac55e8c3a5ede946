"""Steps along a matrix whose rows, or columns, are brought to one length: what SCALE, RMNP and SinkGD are made of.

A torch weight is outputs x inputs, so a row is what one output takes from all inputs. SCALE and RMNP make no copy or
square of a matrix: its lengths are measured, and the weight is moved with one factor for each row.

The surprise: these methods step embedding and head by themselves, each in its way. A group says by its `role` which of
them it has; `split_groups(model, include, roles=True)` makes such groups. What has no momentum has a counter all the
same, for torch's helpers save no optimizer of which only some tensors have a state.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.core.due import kept_of
from thriftlab.optim.core.groups import check_role, role_of
from thriftlab.optim.core.kinds import Numbers, numbers_of_adamw
from thriftlab.optim.core.projected import adam_with_early_eps, norms
from thriftlab.optim.core.split import SplitOptimizer
from thriftlab.optim.state.counters import begin_counting, count_step
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.lists import batches, kept_unless
from thriftlab.optim.state.rules import adamw_spec, decay, row_chunks
from thriftlab.optim.state.storage import kept_spec, load, make_zero, store, wide

MOMENTUM = ("momentum_buffer",)
Direction = Callable[[list[Tensor], list[Tensor]], list[Tensor]]  # of gradients and momenta, which it may move
TINY = 1e-30  # least norm: what is zero stays zero


class Normalised(SplitOptimizer):
    """2-D tensors of the roles that `own_roles` has go to `descend_all`; all others to AdamW, whose lr is times
    `plain_lr_scale` and whose eps, `adam_eps`, comes before bias correction. Those for which `keeps` holds have a
    momentum."""

    roles = takes_applied = walks = True

    def __init__(self, params, **defaults: Any):
        super().__init__(params, **defaults)
        if {"momentum", "beta"} & self.defaults.keys():
            del self.defaults["betas"]  # by which schedulers that cycle the momentum would know it from SGD's

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        first = {"betas": self.param_groups[0]["betas"]} if self.param_groups else {}
        super().add_param_group({**first, **param_group})

    def check_group(self, group: dict[str, Any]) -> None:
        check_role({"split": True, **group})

    def own_roles(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The roles of which the method's own step is."""
        return ("matrix", "input", "output") if group.get("tables") == "own" else ("matrix",)

    def keeps(self, role: str) -> bool:
        """Whether there is a momentum of tensors of this role."""
        return True

    def takes(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return len(shape) == 2 and role_of(group) in self.own_roles(group)

    def plain_numbers(self, group: dict[str, Any]) -> Numbers:
        n = numbers_of_adamw({**group, "eps": group["adam_eps"]}, early_eps=True)
        return n._replace(lr=n.lr * group["plain_lr_scale"])

    def update_plain(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        decay(weights, group)
        lr = group["lr"] * group["plain_lr_scale"]
        adam_with_early_eps(weights, grads, states, {**group, "lr": lr, "eps": group["adam_eps"], "weight_decay": 0.0})

    def update_matrices(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        kept = MOMENTUM if self.keeps(role_of(group)) else ()
        for weight, state in zip(weights, states, strict=True):
            begin_counting(("step",), weight, state, group)
            if kept and kept[0] not in state:
                make_zero(kept, weight, state, group)
        for some in batches(weights):
            count_step(weights[some], states[some], group)
            with kept_unless(group.get("applied"), [*weights[some], *kept_of(states[some])]):
                self.descend_all(weights[some], grads[some], states[some], {**group, "applied": None}, 0)

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        group = {**self.defaults, **overrides}
        if not self.takes(shape, group):
            return adamw_spec(shape, dtype, **group)
        kept = MOMENTUM if self.keeps(role_of(group)) else ()
        return {"step": ((), torch.int64), **kept_spec(kept, shape, dtype, group)}

    def check_kind(self, name: str, weight: Tensor, state: State, group: dict[str, Any]) -> None:
        if self.takes(tuple(weight.shape), group) and "exp_avg" in state:
            raise ValueError(
                f"{name}: the state of the {role_of(group)} {tuple(weight.shape)} is full AdamW's (saved by another "
                "method, or in a group of another role); begin anew with optimizer.state[parameter].clear()"
            )

    def remarks(self) -> list[str]:
        said = super().remarks()
        tables = {role: [] for role in ("input", "output", "")}  # type: dict[str, list[str]]
        for group in self.param_groups:
            matrices = [n for n, p in zip(group["names"], group["params"], strict=True) if p.ndim == 2]
            tables.get(group.get("role", "" if not group["split"] else "matrix"), []).extend(matrices)
        if tables["output"] and not tables["input"]:
            said.append(f"{', '.join(tables['output'])}: output; a tied embedding is the same tensor")
        if tables[""] and any("output" in self.own_roles(group) for group in self.param_groups):
            said.append(
                f"{', '.join(tables[''][:3])}: full AdamW, for no group says whether it is input or output; "
                "make groups with split_groups(..., roles=True)"
            )
        return said


def step_rows(
    weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], lrs: list[Any],
    direction: Direction, rms: bool = False,
) -> None:  # fmt: skip
    """`descend_rows` with what `direction` makes of gradients and momenta, after decay. On a CPU some rows go all the
    way before the next ones, as they are in the cache."""
    momenta = [load(s, MOMENTUM[0]) if MOMENTUM[0] in s else g for s, g in zip(states, grads, strict=True)]
    parts: Iterable[tuple[list[Tensor], ...]] = [(weights, grads, momenta)]
    if len(weights) == 1 and weights[0].device.type == "cpu":
        parts = (tuple([part] for part in rows) for rows in row_chunks(weights[0], grads[0], momenta[0]))
    for w, g, m in parts:
        directions = direction(g, m)
        decay(w, group)
        descend_rows(w, directions, lrs, group["eps"], rms)
    for state, momentum in zip(states, momenta, strict=True):
        if MOMENTUM[0] in state:
            store(state, MOMENTUM[0], momentum)


def descend_rows(weights: list[Tensor], directions: list[Tensor], lrs: list[Any], eps: float, rms: bool) -> None:
    """W <- W - lr D / max(|d|, eps), |d| of each row: its norm, or its root mean square. One lr for each matrix."""
    lengths = [norms(direction, 1) for direction in directions]
    factors = factors_of(lengths, [direction.shape[1] for direction in directions], lrs, eps, rms)
    for weight, direction, factor in zip(weights, directions, factors, strict=True):
        weight.addcmul_(direction, factor)


def moved(grads: list[Tensor], momenta: list[Tensor], beta: float, ahead: float | None = None) -> list[Tensor]:
    """H <- beta H + (1 - beta) G, in place; or (1 - ahead) G + ahead H of these."""
    grads = [grad.to(momentum.dtype) for grad, momentum in zip(grads, momenta, strict=True)]
    torch._foreach_lerp_(momenta, grads, 1 - beta)
    return momenta if ahead is None else list(torch._foreach_lerp(grads, momenta, ahead))


def descend_columns(weights: list[Tensor], directions: list[Tensor], lrs: list[Any], eps: float, rms: bool) -> None:
    """The same with |d| of each column."""
    lengths = [column_norms(direction) for direction in directions]
    factors = factors_of(lengths, [len(direction) for direction in directions], lrs, eps, rms)
    for weight, direction, factor in zip(weights, directions, factors, strict=True):
        for w, d in row_chunks(weight, direction) if weight.device.type == "cpu" else [(weight, direction)]:
            w.addcmul_(d, factor)


def column_norms(matrix: Tensor) -> Tensor:
    """Norms of the columns, some rows at a time on a CPU, so that there are no squares of all  # [1, n]"""
    if matrix.device.type != "cpu":
        return norms(matrix, 0)
    total = torch.zeros(1, matrix.shape[1], dtype=wide(matrix.dtype))
    for (rows,) in row_chunks(matrix):
        total += rows.to(total.dtype).square().sum(0, keepdim=True)
    return total.sqrt_()


def factors_of(norms_: list[Tensor], counts: list[int], lrs: list[Any], eps: float, rms: bool) -> list[Tensor]:
    """-lr / max(length, eps), in place of the norms; `counts` are the entries that a norm is of."""
    if rms:
        torch._foreach_div_(norms_, [math.sqrt(max(count, 1)) for count in counts])
    torch._foreach_clamp_min_(norms_, eps)
    torch._foreach_reciprocal_(norms_)
    if any(isinstance(lr, Tensor) for lr in lrs):
        for norm, lr in zip(norms_, lrs, strict=True):
            norm.mul_(-lr)
    else:
        torch._foreach_mul_(norms_, [-lr for lr in lrs])
    return norms_


def sinkhorn(grads: list[Tensor], iterations: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Factors [m, 1] and [1, n] by which rows and columns of each matrix come to their norms, and scratch [m, n]."""
    lengths = [norms(grad, 1) for grad in grads]
    torch._foreach_add_(lengths, torch._foreach_add(torch._foreach_neg(torch._foreach_sign(lengths)), 1.0))  # 0 -> 1
    squares = [(grad / length).square_() for grad, length in zip(grads, lengths, strict=True)]
    heights, widths = [float(len(grad)) for grad in grads], [float(grad.shape[1]) for grad in grads]
    rows = [length.new_full((len(length),), width) for length, width in zip(lengths, widths, strict=True)]
    columns: list[Tensor] = []
    for number in range(iterations):
        if number:
            rows = quotients(widths, [torch.mv(s, b) for s, b in zip(squares, columns, strict=True)])
        columns = quotients(heights, [torch.mv(s.T, a) for s, a in zip(squares, rows, strict=True)])
    for factors in (rows, columns):
        torch._foreach_sqrt_(factors)
    rows = list(torch._foreach_div([row[:, None] for row in rows], lengths))
    return [(row, column[None], square) for row, column, square in zip(rows, columns, squares, strict=True)]


def quotients(above: list[float], below: list[Tensor]) -> list[Tensor]:
    """above / below, in its place."""
    torch._foreach_clamp_min_(below, TINY)
    torch._foreach_reciprocal_(below)
    torch._foreach_mul_(below, above)
    return below
