"""The core of the split methods: matrices are split into a state-full subspace and the rest, other tensors are not.

A method writes `descend`, the step of one matrix within a subspace (or `descend_all`, of several), and inherits the
rest: the refresh of the subspace every `gap` steps from the gradient of that very step, what happens to the moments
then, and AdamW for embeddings, heads and norms. A method without a subspace overrides `update_matrices` instead.

The surprise: the bias correction counts from the step at which the moments were last zero ("start"), the refreshes from
the first step; they are two counters, because `on_refresh="keep"` moves one and not the other.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from thriftlab.optim.core.due import ask, due_refresh, due_refreshes, kept_of, lame_of, next_age
from thriftlab.optim.core.fragments import Fragment, begin, on_fragment
from thriftlab.optim.core.kinds import Kind
from thriftlab.optim.core.listing import left_to_adamw
from thriftlab.optim.core.method import Method
from thriftlab.optim.state.asking import Asking, in_step
from thriftlab.optim.state.blocks import Blocks
from thriftlab.optim.state.carry import carry, overlap, residual_energy
from thriftlab.optim.state.coordinates import CoordinateSubspace, is_countable, other_density
from thriftlab.optim.state.counters import Age, begin_counting, most
from thriftlab.optim.state.dense import Svd
from thriftlab.optim.state.keys import Spec, State, keyed_generator
from thriftlab.optim.state.lists import batches, each, kept_unless
from thriftlab.optim.state.rules import RULES, Rule, adamw_spec, decay
from thriftlab.optim.state.storage import by_entry, kept_spec, key_rounding, make_zero, rounding_spec
from thriftlab.optim.state.subspaces import (
    basis_of,
    is_declared,
    is_split,
    picks_entries,
    splits,
    subspace_of,
    uses_gradient,
)
from thriftlab.optim.state.weights import dtype_of_step

OnRefresh = Literal["reset", "keep", "project"]
COUNTERS: Spec = {"step": ((), torch.int64), "start": ((), torch.int64)}
DIAGNOSTICS: Spec = {"diagnostic.residual": ((), torch.float32), "diagnostic.overlap": ((), torch.float32)}


class SplitOptimizer(Method):
    """2-D tensors of the groups with `split` (the default) go to `update_matrices`; all others to AdamW.

    A subclass writes its equation in `descend`, of one matrix, or in `descend_all`, of several. With `decay_after`
    weight decay follows that, W <- (1 - lr wd) W; else it is part of the equation.
    """

    decay_after = False
    walks = False  # whether the step of a matrix is a walk over its entries, without a product

    def __init__(self, params: Iterable[Any], **defaults: Any):
        super().__init__(params, split=True, **defaults)

    def takes(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        """Whether the method's own step, and not AdamW, is that of a tensor of this shape."""
        return splits(shape, group)

    def update(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        split = [self.takes(tuple(weight.shape), group) for weight in weights]
        for name, weight, state, yes in zip(names, weights, states, split, strict=True):
            refuse_other_kind(name, weight, state, group, yes)
        key_rounding(names, states, group)
        lists: tuple[list[Any], ...] = (names, weights, grads, states)
        matrices, plain = (
            [[value for value, yes in zip(values, split, strict=True) if yes == kind] for values in lists]
            for kind in (True, False)
        )
        known = self.asked(matrices[0], matrices[1], matrices[2], matrices[3], group)
        if known is not None:
            self.update_plain(plain[1], plain[2], plain[3], known)
            self.update_matrices(matrices[0], matrices[1], matrices[2], matrices[3], known)

    def kernel_step(self, shape: tuple[int, ...], state: State, group: dict[str, Any]) -> Kind | None:
        return self.matrix_step(state, group) if self.takes(shape, group) else self.plain_step(group)

    def asked(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The group, "asked" if the host had to read `applied`, as before a refresh; None if the step is refused.

        States get their counters."""
        if "gap" not in group:
            return group
        for weight, state in zip(weights, states, strict=True):
            begin_counting(tuple(COUNTERS), weight, state, group)
        if group.get("applied") is None:
            return group
        return ask(names, weights, states, group, grads=grads if uses_gradient(group) else ())

    def update_matrices(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        """Steps matrices: refreshes the subspaces of those for which that is due, then `descend_all`.

        A gradient that is not finite spans no subspace: the old one stays, and without one the matrix is left alone.
        """
        due = due_refreshes(names, weights, states, group)
        lame = set() if not uses_gradient(group) else lame_of(grads, due, group)
        takes = {i: count for i, count in enumerate(due) if count is not None and i not in lame}
        for some in batches([grads[i] for i in takes]):
            here = [*takes.items()][some]
            calls = [self.next_basis(names[i], grads[i], states[i], group, count) for i, count in here]
            for (i, count), new in zip(here, in_step(calls), strict=True):
                self.refresh(names[i], grads[i], states[i], group, count, new)
        moves = [i for i in range(len(due)) if i not in lame or basis_of(states[i])]
        weights, grads, states = ([values[i] for i in moves] for values in (weights, grads, states))  # type: ignore
        for some in batches(weights):
            self.step_batch(weights[some], grads[some], states[some], group)

    def step_batch(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        """Steps matrices within their subspaces; where the step is refused they and their state keep every bit."""
        age = next_age(weights, states, group)
        with kept_unless(group.get("applied"), [*weights, *kept_of(states)]):
            group = {**group, "applied": None}
            self.descend_all(weights, grads, states, group, age)
            if self.decay_after:
                decay(weights, group)

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        """`descend` of several matrices, which on a device takes fewer launches; `age` may be a tensor of one each."""
        for weight, grad, state, one in zip(weights, grads, states, each(age, len(weights)), strict=True):
            self.descend(weight, grad, state, group, one)

    def descend(self, weight: Tensor, grad: Tensor, state: State, group: dict[str, Any], age: Age) -> None:
        """The method's own step; `age` = 1, 2, ... counts the steps since the moments were zero; on a device it is a
        0-dim tensor."""
        raise NotImplementedError

    def next_basis(self, name: str, grad: Tensor, state: State, group: dict[str, Any], count: int) -> Asking:
        """The basis of a matrix's new subspace; the last one is in the state, which is empty at first."""
        subspace, old = subspace_of(group), basis_of(state)
        if isinstance(subspace, Blocks):  # whole matrices
            return {}
        goes_on = old and hasattr(subspace, "refine") and is_declared(old, subspace, grad)
        if isinstance(subspace, Svd):
            return (yield from subspace.search(grad, old if goes_on else {}))
        if goes_on:
            return subspace.refine(grad, old)
        return subspace.refresh(grad, name, count, keyed_generator(group["seed"], name, count))

    def refresh(self, name: str, grad: Tensor, state: State, group: dict[str, Any], count: int, new: State) -> None:
        """Takes up the matrix's new subspace and carries the moments over to it."""
        subspace, old = subspace_of(group), basis_of(state)
        small = subspace.down(grad, new)
        keeps = group["on_refresh"] == "keep" and has_moments(state, group)
        if keeps and small.shape != (kept := state[rule_of(group).buffers[0]]).shape:
            raise ValueError(
                f"{name}: on_refresh='keep' has moments of shape {tuple(kept.shape)} and a new basis that makes "
                f"{tuple(small.shape)} of the matrix {tuple(grad.shape)}: rank or density has changed; "
                f"use on_refresh='reset' or 'project'"
            )
        state["diagnostic.residual"] = residual_energy(subspace, new, grad)
        state["diagnostic.overlap"] = overlap(subspace, old, new, grad)
        for key in old:
            del state[f"basis.{key}"]
        state.update({f"basis.{key}": tensor for key, tensor in new.items()})
        if group["on_refresh"] == "reset" or not has_moments(state, group):
            zero_moments(small, state, group)
        else:
            self.carry_over(old, new, grad, state, group)

    def carry_over(self, old: State, new: State, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        """Takes the moments over to a new basis."""
        carry(subspace_of(group), old, new, grad, state, rule_of(group).buffers, group)

    def elementwise(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return by_entry(group) and not self.takes(shape, group)

    def in_pieces(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return not self.takes(shape, group)

    def update_fragments(
        self,
        fragments: list[Fragment],
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        group: dict[str, Any],
    ) -> None:
        begin(fragments, states)
        plain: list[int] = []
        for i, fragment in enumerate(fragments):
            if not self.takes(fragment.shape, group):
                plain.append(i)
                continue
            key_rounding([fragment.name], [states[i]], group)
            here = on_fragment(group, fragment, states[i])
            known = self.asked([fragment.name], [weights[i]], [grads[i]], [states[i]], here)
            if known is not None:
                self.update_matrices([fragment.name], [weights[i]], [grads[i]], [states[i]], known)
            for key in [key for key in states[i] if key.startswith("diagnostic.")]:
                del states[i][key]  # they are of the whole matrix
        super().update_fragments(
            [fragments[i] for i in plain],
            [weights[i] for i in plain],
            [grads[i] for i in plain],
            [states[i] for i in plain],
            group,
        )

    def work(self, weight: Tensor, group: dict[str, Any]) -> int:
        """A product with a matrix, unless its subspace picks entries."""
        products = is_split(weight, group) and not self.walks and not picks_entries(group)
        return weight.numel() * (min(weight.shape) if products else 1)

    def remarks(self) -> list[str]:
        left = left_to_adamw(self)
        if any(name not in left for group in self.param_groups for name in group["names"]):
            return []
        why = sorted({reason for reason in left.values() if reason.startswith("rank")}) or ["none was chosen by name"]
        return [f"no matrix is split, this is full AdamW alone ({'; '.join(why)})"]

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        group = {**self.defaults, **overrides}
        if not splits(shape, group):
            return adamw_spec(shape, dtype, **group)
        small, basis = self.small_spec(shape, dtype, group)
        moments = kept_spec(rule_of(group).buffers, small, dtype, group)
        kept = {**{f"basis.{key}": entry for key, entry in basis.items()}, **moments, **rounding_spec(group)}
        return {**COUNTERS, **kept, **(DIAGNOSTICS if basis else {})}

    def passing_spec(self, weight: Tensor, group: dict[str, Any]) -> Spec:
        """All but counters: there is none of it in an idle block, or before the first finite gradient."""
        if "subspace" not in group or not is_split(weight, group) or not hasattr(subspace_of(group), "spec"):
            return {}
        stays = {**COUNTERS, **rounding_spec(group)}
        spec = self.spec(tuple(weight.shape), dtype_of_step(weight, group), **group)
        return {key: entry for key, entry in spec.items() if key not in stays}

    def state_spec(self, shape: tuple[int, ...], dtype: torch.dtype, state: State, group: dict[str, Any]) -> Spec:
        if "subspace" not in group or not splits(shape, group):
            return super().state_spec(shape, dtype, state, group)
        subspace, basis = subspace_of(group), basis_of(state)
        if isinstance(subspace, Blocks):
            small, declared = shape, {}
        elif basis and hasattr(subspace, "kept_spec"):
            small, declared = subspace.kept_spec(shape, dtype, basis)
        else:  # no basis yet, or one's own, which alone knows what it makes of a matrix
            return COUNTERS
        moments = kept_spec(rule_of(group).buffers, small, dtype, group)
        return {**COUNTERS, **moments, **{f"basis.{key}": entry for key, entry in declared.items()}}

    def check_loaded(
        self, named: dict[str, Tensor], states: dict[str, State], group: dict[str, Any], own: dict[str, Any]
    ) -> None:
        subspace = subspace_of(group) if "subspace" in group else None
        if not isinstance(subspace, CoordinateSubspace) or not is_countable(subspace):
            return
        bases = {n: (tuple(p.shape), basis_of(states[n])) for n, p in named.items() if is_split(p, group) and p.numel()}
        scheduled = own.get("density") != group.get(
            "density"
        )  # one that is not is that of the constructor on both sides
        odd = other_density(subspace, {name: pair for name, pair in bases.items() if pair[1]}, scheduled)
        if odd is not None:
            raise ValueError(
                f"{odd}: the state's basis is of another shape than the weight {tuple(named[odd].shape)}, or of "
                f"another density than {subspace.density:g}; load the state of this tensor, with the density that it "
                "was drawn with in its param_groups"
            )

    def check_kind(self, name: str, weight: Tensor, state: State, group: dict[str, Any]) -> None:
        refuse_other_kind(name, weight, state, group, is_split(weight, group))

    def diagnostics(self, fresh: bool = False) -> dict[str, dict[str, Tensor]]:
        """Of each matrix with a subspace, by name, 0-dim tensors: of the last refresh `residual`, the part of the
        gradient's energy outside of the new subspace, and `overlap` of the new with the old one, 1 if it stayed; of
        the last step `limiter`, what the update was divided by, where there is one. `fresh`: only of the matrices whose
        refresh was due in the last step.
        """
        found = {}
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                state = self.state.get(p, {})
                told = {key.split(".")[1]: value for key, value in state.items() if key.startswith("diagnostic.")}
                if told and not (fresh and due_refresh(name, most(state["step"]) - 1, group) is None):
                    found[name] = told
        return found

    def small_spec(
        self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]
    ) -> tuple[tuple[int, ...], Spec]:
        """Shape of a matrix's coordinates in the subspace, and the basis; by a trial where the subspace cannot say."""
        subspace = subspace_of(group)
        if hasattr(subspace, "spec"):
            return subspace.spec(shape, dtype)
        trial = torch.zeros(shape, dtype=dtype)
        basis = subspace.refresh(trial, "trial", 0, torch.Generator())
        return tuple(subspace.down(trial, basis).shape), {key: (tuple(t.shape), t.dtype) for key, t in basis.items()}


def refuse_other_kind(name: str, weight: Tensor, state: State, group: dict[str, Any], split: bool) -> None:
    """ValueError where a matrix has become split, or is no longer, since it got its state, or has that of AdamW."""
    if "subspace" not in group or "step" not in state or ("start" in state) == split:
        return
    kind = (
        "full AdamW's (saved by another optimizer, or while the matrix was not split)" if split else "a split matrix's"
    )
    raise ValueError(
        f"{name}: with split, rank or density as they are now, the matrix {tuple(weight.shape)} is "
        f"{'split' if split else 'left to full AdamW'}, and its state is {kind}; "
        "set them back, or begin anew with optimizer.state[parameter].clear()"
    )


def rule_of(group: dict[str, Any]) -> Rule:
    """The state-full rule of a group: Adam, unless the method offers others."""
    return RULES[group.get("rule", "adam")]


def has_moments(state: State, group: dict[str, Any]) -> bool:
    return all(buffer in state for buffer in rule_of(group).buffers)


def zero_moments(small: Tensor, state: State, group: dict[str, Any]) -> None:
    """Moments like `small`, all zero, and the bias correction starts anew."""
    state["start"] = state["step"].clone()
    make_zero(rule_of(group).buffers, small, state, group)
