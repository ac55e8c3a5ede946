"""The core of the split methods: matrices are split into a state-full subspace and the rest, other tensors are not.

A method writes `descend`, the step of one matrix within a subspace, and inherits the rest: the refresh of the subspace
every `gap` steps from the gradient of that very step, what happens to the moments then, and AdamW for embeddings, heads
and norms. A method without a subspace overrides `update_matrix` instead.

The surprise: the bias correction counts from the step at which the moments were last zero ("start"), the refreshes from
the first step; they are two counters, because `on_refresh="keep"` moves one and not the other.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from thriftlab.optim.core.method import Method, Spec, State, keyed_generator, keyed_seed
from thriftlab.optim.state.carry import AnySubspace, carry, overlap, residual_energy
from thriftlab.optim.state.coordinates import SUBSPACES
from thriftlab.optim.state.dense import BASES
from thriftlab.optim.state.rules import RULES, Rule, adamw, adamw_spec
from thriftlab.optim.state.storage import by_entry, kept_spec, key_rounding, make_zero, rounding_spec

OnRefresh = Literal["reset", "keep", "project"]
COUNTERS: Spec = {"step": ((), torch.int64), "start": ((), torch.int64)}
DIAGNOSTICS: Spec = {"diagnostic.residual": ((), torch.float32), "diagnostic.overlap": ((), torch.float32)}


class SplitOptimizer(Method):
    """2-D tensors of the groups with `split` (the default) go to `update_matrix`, one by one; all others to AdamW."""

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

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        group = {**self.defaults, **overrides}
        if not splits(shape, group):
            return adamw_spec(shape, dtype, **group)
        small, basis = self.small_spec(shape, dtype, group)
        moments = kept_spec(rule_of(group).buffers, small, dtype, group)
        kept = {**{f"basis.{key}": entry for key, entry in basis.items()}, **moments, **rounding_spec(group)}
        return {**COUNTERS, **kept, **(DIAGNOSTICS if basis else {})}

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


def is_split(weight: Tensor, group: dict[str, Any]) -> bool:
    """Whether a tensor of the group is one of the matrices that the method splits."""
    return splits(tuple(weight.shape), group)


def splits(shape: tuple[int, ...], group: dict[str, Any]) -> bool:
    """Whether a tensor of this shape would be. A dense subspace that fills the whole matrix leaves nothing to split."""
    if not group["split"] or len(shape) != 2:
        return False
    named = isinstance(group.get("subspace"), str) and group["subspace"] in BASES  # one's own object knows its own size
    return not named or subspace_of(group).size(shape) < min(shape)  # type: ignore[union-attr]


def refuse_other_kind(name: str, weight: Tensor, state: State, group: dict[str, Any], split: bool) -> None:
    """ValueError where a matrix has become split, or is no longer, since it got its state."""
    if "subspace" in group and "step" in state and ("start" in state) != split:
        raise ValueError(
            f"{name}: with rank or density as they are now, the matrix {tuple(weight.shape)} is "
            f"{'split' if split else 'left to full AdamW'}, and its state is of the other kind; "
            f"set them back, or begin anew with optimizer.state[parameter].clear()"
        )


def is_declared(basis: State, subspace: AnySubspace, grad: Tensor) -> bool:
    """Whether the basis still has the shapes that the subspace declares, if it does."""
    if not hasattr(subspace, "spec"):
        return True
    declared = subspace.spec(tuple(grad.shape), grad.dtype)[1]
    return {key: tuple(tensor.shape) for key, tensor in basis.items()} == {key: s for key, (s, _) in declared.items()}


def subspace_of(group: dict[str, Any]) -> AnySubspace:
    """The group's own subspace object, or the one that it names."""
    subspace = group["subspace"]
    if not isinstance(subspace, str):
        return subspace
    if subspace in BASES:
        return BASES[subspace](group.get("rank"), group.get("density"))
    return SUBSPACES[subspace](group["density"])


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


def uses_gradient(group: dict[str, Any]) -> bool:
    """Whether a subspace is made of the gradient; one's own is thought to be, unless its `uses_gradient` is False."""
    subspace = group["subspace"]
    return subspace != "blocks" and getattr(subspace_of(group), "uses_gradient", True)


def is_finite(grad: Tensor) -> bool:
    """Reads the gradient on the host; one without data (meta, fake) is finite."""
    return grad.is_meta or isinstance(grad, FakeTensor) or bool(grad.isfinite().all())


def basis_of(state: State) -> State:
    """The basis that the last refresh left in the state."""
    return {key.removeprefix("basis."): tensor for key, tensor in state.items() if key.startswith("basis.")}


def has_moments(state: State, group: dict[str, Any]) -> bool:
    return all(buffer in state for buffer in rule_of(group).buffers)


def zero_moments(small: Tensor, state: State, group: dict[str, Any]) -> None:
    """Moments like `small`, all zero, and the bias correction starts anew."""
    state["start"] = state["step"].clone()
    make_zero(rule_of(group).buffers, small, state, group)


def split_groups(model: Any, include: Sequence[str], exclude: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Parameter groups by name: `[{"params", "names", "split"}, ...]`, every parameter that takes gradients in one.

    The matrices with a name that a pattern of `include` is found in, and none of `exclude`, are split. A tied parameter
    appears once, under its first name; a pattern may match any of its names. A pattern that matches none of the model's
    parameters is a ValueError.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
        tensors[id(p)] = p
    every = [name for tied in names.values() for name in tied]
    for pattern in (*include, *exclude):
        if not any(re.search(pattern, name) for name in every):
            raise ValueError(f"pattern {pattern!r} matches no parameter; near: {', '.join(near(pattern, every))}")

    def wanted(key: int) -> bool:
        found = [any(re.search(p, name) for p in patterns for name in names[key]) for patterns in (include, exclude)]
        return tensors[key].ndim == 2 and found == [True, False]

    return [
        {"params": [tensors[key] for key in keys], "names": [names[key][0] for key in keys], "split": split}
        for split in (True, False)
        if (keys := [key for key in names if tensors[key].requires_grad and wanted(key) == split])
    ]


def near(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that look most like what the pattern may have meant."""
    words = re.sub(r"\W+", ".", pattern).strip(".")
    return difflib.get_close_matches(words, names, n=3, cutoff=0.0)
