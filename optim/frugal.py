"""FRUGAL (2411.07837): a state-full step inside a small subspace, and a state-free step outside of it, both at once.

Every `gap` steps a new subspace P is drawn and the moments start from zero. In each step, for a matrix W:

    R = down(G)                                     the gradient's coordinates in the subspace
    W <- W - lr up(N(R))                            N: Adam, Lion or momentum SGD
    W <- W - lr free_lr_scale sign(G - up(R))       the rest: signSGD (or plain SGD, or nothing)

The rest of the model (embeddings, head, norms) is trained by AdamW, or with `plain="rule"` by N, as the published code
does it. Blocks, which the paper uses for pretraining, make whole matrices state-full or state-free by turns.

One surprise: for coordinates the residual is zero inside the subspace and G outside, so neither `up` is ever computed:
the chosen entries take their step apart, and are written back over what the free step did to the whole matrix.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.due import kept_of
from thriftlab.optim.core.guard import REMEDY
from thriftlab.optim.core.hyper import Betas, Later, Search, arguments
from thriftlab.optim.core.kinds import ALL, COLUMNS, NOTHING, ROWS, Kind, Numbers, numbers_of_adamw
from thriftlab.optim.core.split import COUNTERS, OnRefresh, SplitOptimizer, has_moments, zero_moments
from thriftlab.optim.state.blocks import Balance, BlockOrder, Blocks, BlockUnit
from thriftlab.optim.state.coordinates import Columns, CoordinateSubspace, Rows, is_countable
from thriftlab.optim.state.counters import Age, most
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.lists import batches, kept_unless, pick
from thriftlab.optim.state.rules import RULES, Rule, add_scaled, add_signs, decay
from thriftlab.optim.state.storage import StateDtype, by_entry, drop, kept_spec, make_zero, rounding_spec
from thriftlab.optim.state.subspaces import Subspace, add_up, basis_of, is_split, splits, subspace_of
from thriftlab.optim.state.torch_adamw import MOMENTS


class Frugal(SplitOptimizer, name="frugal"):
    """FRUGAL: Adam in a small subspace that moves, signSGD in the rest.

    Args:
        lr: the learning rate.
        betas: decay of the moments; the first is the momentum of lion and sgdm.
        eps: added to Adam's denominator, after bias correction.
        weight_decay: decoupled decay per step, times lr.
        subspace: what is state-full: whole matrices by turns (blocks); columns, rows or single entries of each; or the
            span of its gradient's leading singular vectors (svd; warm_svd: from the last ones) or of random directions
            (gauss, orthogonal).
        density: the state-full fraction.
        gap: steps between refreshes of the subspace.
        order: which blocks come next.
        unit: a block is one matrix, as in the published code, or all matrices of a layer, as in the paper.
        balance: what the density of blocks is a fraction of: their number, or the bytes of their state.
        rule: the state-full rule.
        plain: who steps what is not split: AdamW, or the state-full rule, as the published code does.
        free: the state-free rule.
        split_lr_scale: factor of lr for the matrices, both parts.
        free_lr_scale: further factor of lr for the state-free part.
        on_refresh: the moments start from zero, keep their numbers, or are expressed in the new subspace.
        stagger: matrices refresh by turns within a gap, not all in one step; never blocks.
        state_dtype: how the moments are kept, whatever the dtype of the parameters.
    """

    takes_applied = True

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-4, 1e-2)] = 1e-3,
        betas: Annotated[Betas, Search(choices=[(0.9, 0.999), (0.9, 0.95)])] = (0.9, 0.999),
        eps: Annotated[float, Field(ge=0)] = 1e-8,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.0,
        subspace: Annotated[
            Literal["blocks", "columns", "rows", "coordinates", "svd", "warm_svd", "gauss", "orthogonal"]
            | CoordinateSubspace
            | Subspace,
            Search(choices=["blocks", "columns", "rows", "coordinates"]),
        ] = "blocks",
        density: Annotated[float, Field(ge=0, le=1), Search(choices=[0.0, 0.125, 0.25, 0.5])] = 0.25,
        gap: Annotated[int, Field(ge=1), Search(choices=[50, 200, 500])] = 200,
        order: Annotated[BlockOrder, Field()] = "descending",
        unit: Annotated[BlockUnit, Field()] = "tensor",
        balance: Annotated[Balance, Field()] = "count",
        rule: Annotated[Literal["adam", "lion", "sgdm"], Field()] = "adam",
        plain: Annotated[Literal["adamw", "rule"], Field(), Later()] = "adamw",
        free: Annotated[Literal["sign", "sgd", "none"], Field()] = "sign",
        split_lr_scale: Annotated[float, Field(ge=0)] = 1.0,
        free_lr_scale: Annotated[float, Field(ge=0), Search(0.1, 1.0)] = 1.0,
        on_refresh: Annotated[OnRefresh, Search(choices=["reset", "keep", "project"])] = "reset",
        stagger: Annotated[bool, Field()] = False,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def update_plain(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        if (rule := plain_rule(group)) is None:
            super().update_plain(weights, grads, states, group)
            return
        for weight, state in zip(weights, states, strict=True):
            if rule.buffers[0] not in state:
                make_zero(rule.buffers, weight, state, group)
        for some in batches(weights):
            with kept_unless(group.get("applied"), [*weights[some], *kept_of(states[some])]):
                decay(weights[some], {**group, "applied": None})
                rule.descend(weights[some], grads[some], states[some], 0, group, group["lr"])

    def plain_numbers(self, group: dict[str, Any]) -> Numbers:
        return numbers_of_adamw(group)

    def plain_step(self, group: dict[str, Any]) -> Kind | None:
        return None if plain_rule(group) else super().plain_step(group)

    def matrix_kind(self, state: State, group: dict[str, Any]) -> Kind | None:
        subspace = subspace_of(group)
        if group["rule"] != "adam":
            return None
        if isinstance(subspace, Blocks):
            return Kind(ALL if has_moments(state, group) else NOTHING, numbers_of_frugal, free=group["free"])
        where = {Columns: COLUMNS, Rows: ROWS}.get(type(subspace))
        return None if where is None else Kind(where, numbers_of_frugal, free=group["free"])

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        group = {**self.defaults, **overrides}
        rule = None if splits(shape, group) else plain_rule(group)
        if rule is None:
            return super().spec(shape, dtype, **overrides)
        return {**kept_spec(rule.buffers, shape, dtype, group), **rounding_spec(group)}

    def check_kind(self, name: str, weight: Tensor, state: State, group: dict[str, Any]) -> None:
        super().check_kind(name, weight, state, group)
        if plain_rule(group) and not is_split(weight, group) and MOMENTS[1] in state:
            raise ValueError(f"{name}: plain='rule' of rule={group['rule']!r}, and the state is AdamW's; {REMEDY}")

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        rule, lr = RULES[group["rule"]], group["lr"] * group["split_lr_scale"]
        subspace, bases = subspace_of(group), [basis_of(state) for state in states]
        lists: tuple[list[Any], ...] = (weights, grads, states)
        decay(weights, group)
        if isinstance(subspace, Blocks):
            active = [i for i, state in enumerate(states) if has_moments(state, group)]
            idle = [i for i in range(len(states)) if i not in active]
            if active:
                w, g, kept = ([values[i] for i in active] for values in lists)
                rule.descend(w, g, kept, pick(age, active), group, lr)
            if idle:
                free_step([weights[i] for i in idle], [grads[i] for i in idle], group, lr)
        elif isinstance(subspace, CoordinateSubspace):
            where = subspace.where_all(grads, bases)
            chosen, slopes = ([*map(subspace.take, matrices, where)] for matrices in (weights, grads))
            rule.descend(chosen, slopes, states, age, group, lr)
            free_step(weights, grads, group, lr)
            for weight, places, small in zip(weights, where, chosen, strict=True):
                subspace.put(weight, places, small)
        else:
            smalls = [subspace.down(grad, basis) for grad, basis in zip(grads, bases, strict=True)]
            for i, direction in enumerate(rule.directions(smalls, states, age, group)):
                add_up(weights[i], direction, subspace, bases[i], -lr)
            residuals = [grad.clone() for grad in grads]
            for residual, small, basis in zip(residuals, smalls, bases, strict=True):
                add_up(residual, small, subspace, basis, -1.0)
            free_step(weights, residuals, group, lr)

    def refresh(self, name: str, grad: Tensor, state: State, group: dict[str, Any], count: int, new: State) -> None:
        subspace = subspace_of(group)
        if not isinstance(subspace, Blocks):
            super().refresh(name, grad, state, group, count, new)
        elif name not in subspace.active(group, count):
            drop(RULES[group["rule"]].buffers, state)
        elif group["on_refresh"] == "reset" or not has_moments(state, group):
            zero_moments(grad, state, group)

    def elementwise(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        subspace = subspace_of(group)
        if not splits(shape, group) or isinstance(subspace, Blocks):
            return by_entry(group)
        return by_entry(group) and group["on_refresh"] != "keep" and is_countable(subspace)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        subspace = subspace_of(group)
        if isinstance(subspace, Blocks):
            subspace.active(group, count=0)
            if group["stagger"]:
                raise ValueError("stagger=True: blocks take turns already; it is for the other subspaces")

    def idle(self, name: str, weight: Tensor, group: dict[str, Any], state: State) -> bool:
        subspace = subspace_of(group)
        if not (isinstance(subspace, Blocks) and is_split(weight, group)):
            return False
        steps = most(state["step"]) if "step" in state else 0
        return name not in subspace.active(group, max(steps - 1, 0) // group["gap"])

    def expected_spec(self, name: str, weight: Tensor, group: dict[str, Any]) -> Spec:
        if self.idle(name, weight, group, self.state.get(weight, {})):
            return {**COUNTERS, **rounding_spec(group)}
        return super().expected_spec(name, weight, group)

    def remarks(self) -> list[str]:
        return [*super().remarks(), *(idle_blocks(group) for group in self.param_groups if never_active(group))]


def numbers_of_frugal(group: dict[str, Any]) -> Numbers:
    n = numbers_of_adamw(group)
    lr = n.lr * group["split_lr_scale"]
    return n._replace(lr=lr, free_lr=lr * group["free_lr_scale"])


def plain_rule(group: dict[str, Any]) -> Rule | None:
    """The rule of what is not split; None: AdamW's own step, which that of `rule="adam"` is, too."""
    return RULES[group["rule"]] if group["plain"] == "rule" and group["rule"] != "adam" else None


def free_step(weights: list[Tensor], grads: list[Tensor], group: dict[str, Any], lr) -> None:
    """The state-free part, in place."""
    if group["free"] == "sign":
        add_signs(weights, grads, -lr * group["free_lr_scale"])
    elif group["free"] == "sgd":
        add_scaled(weights, grads, -lr * group["free_lr_scale"])


def never_active(group: dict[str, Any]) -> bool:
    """Whether the group has blocks, of which a fixed number is active, and that number is 0."""
    subspace, matrices = subspace_of(group), [p for p in group["params"] if is_split(p, group)]
    if not (isinstance(subspace, Blocks) and matrices and group["density"] > 0):
        return False
    return group["balance"] == "count" and not callable(group["order"]) and not subspace.active(group, count=0)


def idle_blocks(group: dict[str, Any]) -> str:
    """What is said of such a group."""
    matrices = sum(is_split(p, group) for p in group["params"])
    return (
        f"density {group['density']:g} of the blocks of {matrices} matrices (unit={group['unit']!r}) "
        f"rounds to none, as in the published code: no matrix has a state"
        + (", and none is trained" if group["free"] == "none" else f", all take free={group['free']!r}")
    )
