"""The core of the split methods: matrices are split into a state-full subspace and the rest, other tensors are not.

A method writes `descend`, the step of one matrix within a subspace, and inherits the rest: the refresh of the subspace
every `gap` steps from the gradient of that very step, what happens to the moments then, and AdamW for embeddings, heads
and norms. A method without a subspace overrides `update_matrix` instead.

The surprise: the bias correction counts from the step at which the moments were last zero ("start"), the refreshes from
the first step; they are two counters, because `on_refresh="keep"` moves one and not the other.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from thriftlab.optim.core.fragments import Fragment, begin, on_fragment
from thriftlab.optim.core.groups import by_reason
from thriftlab.optim.core.method import Method
from thriftlab.optim.state.blocks import Blocks
from thriftlab.optim.state.carry import carry, overlap, residual_energy
from thriftlab.optim.state.coordinates import CoordinateSubspace, is_countable, other_density
from thriftlab.optim.state.keys import Spec, State, keyed_generator, keyed_seed
from thriftlab.optim.state.rules import RULES, Rule, adamw, adamw_spec, decay
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

OnRefresh = Literal["reset", "keep", "project"]
COUNTERS: Spec = {"step": ((), torch.int64), "start": ((), torch.int64)}
DIAGNOSTICS: Spec = {"diagnostic.residual": ((), torch.float32), "diagnostic.overlap": ((), torch.float32)}


class SplitOptimizer(Method):
    """2-D tensors of the groups with `split` (the default) go to `update_matrix`, one by one; all others to AdamW.

    A subclass writes its equation in `descend`. With `decay_after` weight decay follows that, W <- (1 - lr wd) W; else
    it is part of the equation.
    """

    decay_after = False

    def __init__(self, params: Iterable[Any], **defaults: Any):
        super().__init__(params, split=True, **defaults)

    def update(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        split = [is_split(weight, group) for weight in weights]
        for name, weight, state, yes in zip(names, weights, states, split, strict=True):
            refuse_other_kind(name, weight, state, group, yes)
        key_rounding(names, states, group)
        plain = [i for i, yes in enumerate(split) if not yes]
        self.update_plain([weights[i] for i in plain], [grads[i] for i in plain], [states[i] for i in plain], group)
        for name, weight, grad, state, yes in zip(names, weights, grads, states, split, strict=True):
            if yes:
                self.update_matrix(name, weight, grad, state, group)

    def update_plain(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        """Steps the tensors that are not split."""
        adamw(weights, grads, states, **group)

    def update_matrix(self, name: str, weight: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        """Steps one matrix: refreshes its subspace if that is due, then `descend`.

        A gradient that is not finite spans no subspace: the old one stays, and without one the matrix is left alone.
        """
        for counter in COUNTERS:
            if counter not in state:
                state[counter] = torch.tensor(0, device="cpu")
        step = int(state["step"])
        count = due_refresh(name, step, group)
        if count is not None:
            if not uses_gradient(group) or is_finite(grad):
                self.refresh(name, grad, state, group, count)
            elif not basis_of(state):
                return
        state["step"] += 1
        self.descend(weight, grad, state, group, age=step + 1 - int(state["start"]))
        if self.decay_after:
            decay(weight, group)

    def descend(self, weight: Tensor, grad: Tensor, state: State, group: dict[str, Any], age: int) -> None:
        """The method's own step; `age` = 1, 2, ... counts the steps since the moments were zero."""
        raise NotImplementedError

    def refresh(self, name: str, grad: Tensor, state: State, group: dict[str, Any], count: int) -> None:
        """Draws the matrix's new subspace and carries the moments over to it."""
        subspace, old = subspace_of(group), basis_of(state)
        if old and hasattr(subspace, "refine") and is_declared(old, subspace, grad):
            new = subspace.refine(grad, old)
        else:
            new = subspace.refresh(grad, name, count, keyed_generator(group["seed"], name, count))
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
            carry(subspace, old, new, grad, state, rule_of(group).buffers, group)

    def elementwise(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return by_entry(group) and not splits(shape, group)

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
            if not splits(fragment.shape, group):
                plain.append(i)
                continue
            key_rounding([fragment.name], [states[i]], group)
            here = on_fragment(group, fragment, states[i])
            self.update_matrix(fragment.name, weights[i], grads[i], states[i], here)
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
        products = is_split(weight, group) and not picks_entries(group)
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
        spec = self.spec(tuple(weight.shape), weight.dtype, **group)
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
                if told and not (fresh and due_refresh(name, int(state["step"]) - 1, group) is None):
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


def due_refresh(name: str, step: int, group: dict[str, Any]) -> int | None:
    """The number of the refresh that is due at this step, or None.

    With `stagger` all matrices refresh at step 0, then each at an offset of its own within the gap.
    """
    if step == 0:
        return 0
    early = keyed_seed(group["seed"], name, 0) % group["gap"] if group.get("stagger") else 0
    count, since = divmod(step + early, group["gap"])
    return count if since == 0 else None


def is_finite(grad: Tensor) -> bool:
    """Reads the gradient on the host; one without data (meta, fake) is finite."""
    return grad.is_meta or isinstance(grad, FakeTensor) or bool(grad.isfinite().all())


def has_moments(state: State, group: dict[str, Any]) -> bool:
    return all(buffer in state for buffer in rule_of(group).buffers)


def zero_moments(small: Tensor, state: State, group: dict[str, Any]) -> None:
    """Moments like `small`, all zero, and the bias correction starts anew."""
    state["start"] = state["step"].clone()
    make_zero(rule_of(group).buffers, small, state, group)


def left_to_adamw(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Name -> reason, for every parameter of a split method that full AdamW trains; empty for other optimizers."""
    if not isinstance(optimizer, SplitOptimizer):
        return {}
    found = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            if p.ndim != 2:
                found[name] = f"{p.ndim}-D"
            elif not group["split"]:
                found[name] = "not chosen by name"
            elif not is_split(p, group):
                rank = group.get("rank") or subspace_of(group).size(p.shape)  # type: ignore[union-attr]
                found[name] = f"rank {rank} >= smaller side {min(p.shape)}"
    return found


def listing(optimizer: Method) -> str:
    """What is left to AdamW, by reason, in one line, and `remarks`, a line each; or nothing."""
    return "\n".join(line for line in (left_line(optimizer), *optimizer.remarks()) if line)


def left_line(optimizer: torch.optim.Optimizer) -> str:
    left = left_to_adamw(optimizer)
    if not left:
        return ""
    groups = optimizer.param_groups
    sizes = {name: p.numel() for g in groups for name, p in zip(g["names"], g["params"], strict=True)}
    share = sum(sizes[name] for name in left) / max(sum(sizes.values()), 1)
    return f"full AdamW for {len(left)} of {len(sizes)} tensors ({share:.0%} of the parameters): {by_reason(left)}"
