"""What every method is: a `torch.optim.Optimizer` whose parameters have names, and whose one verb is `update`.

`update(names, weights, grads, states, group)` steps whole tensors in place. It is a function of its arguments alone:
randomness is keyed by (seed, name, count), counters are 0-dim tensors in the state, and a choice over a group (which
blocks are active) depends on the group's names and the count. So whoever holds a whole matrix, its gradient and its
state may make the call, and a sharded run equals one process. They call `apply`, which makes the call for them: it
takes weights as they are stored, and gradients as they were summed.

What does not fit is refused before it is stepped, in one place (guard.py); state is saved and loaded in saving.py.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from thriftlab.optim.core import hyper
from thriftlab.optim.core.declared import Declared
from thriftlab.optim.core.few_bits import few_bits_fragment_step, few_bits_step, narrow
from thriftlab.optim.core.fragments import Fragment, begin
from thriftlab.optim.core.groups import named_tensors, refuse_set, refuse_switches, without_switches
from thriftlab.optim.core.guard import guarded, refuse_kind
from thriftlab.optim.core.owners import assign
from thriftlab.optim.core.saving import load_state, saved_state
from thriftlab.optim.core.sharded import (
    check_placement,
    closed,
    fragment_here,
    keep_own,
    opened,
    rows_here,
    show,
)
from thriftlab.optim.core.tables import ask_tables_first, settled, with_tables
from thriftlab.optim.core.ways import step_each
from thriftlab.optim.state.counters import read
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.weights import Rounding, WeightDtype, begun

METHODS: dict[str, type["Method"]] = {}


class Method(Declared, torch.optim.Optimizer):
    """An optimizer with named parameters and declared state; `class X(Method, name="x")` registers it in `METHODS`.

    Args:
        params: parameters, `(name, parameter)` pairs, or group dicts with `params` and optionally `names`, `split` and
            hyper-parameters of their own.
        defaults: the hyper-parameters, which live in `param_groups`.
    """

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if name in METHODS:
            raise ValueError(f"there is already a method {name!r}: {METHODS[name].__qualname__}")
        if name is not None:
            METHODS[name] = cls
        ask_tables_first(cls)
        for verb in ("update", "update_fragments"):
            if verb in vars(cls):
                setattr(cls, verb, guarded(vars(cls)[verb]))
        if "__init__" in vars(cls):
            cls.__init__ = with_tables(without_switches(cls.__init__))  # type: ignore[method-assign]

    def __init__(self, params: Iterable[Any], **defaults: Any):
        self.fit: dict[Any, list] = {}  # what the guard has found fit
        self.plans: dict[Any, Any] = {}  # of steps by kernels
        refuse_set(params)
        super().__init__(params, {"maximize": False, **vars(self).pop("tables", {}), **defaults})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.fit, self.plans = {}, {}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        applied: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Any:
        """Steps every parameter that has a gradient; returns what `closure`, called first, returned.

        Args:
            applied: a 0-dim tensor, 1; or 0 to refuse the step: weights and state keep every bit, and counters their
                number. It is read on the host in a first step and where a refresh may be due, and in no other.
            scale: a 0-dim tensor that every gradient is multiplied by, in place or on the way.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if applied is not None and any(self.must_read(group["params"], group) for group in self.param_groups):
            if read([applied]) == [0]:
                return loss
            applied = None
        for group in self.param_groups:
            self.step_some(group["names"], group["params"], group, applied, scale)
        return loss

    @torch.no_grad()
    def step_only(
        self,
        names: list[str],
        weights: list[Tensor],
        group: dict[str, Any],
        applied: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Steps those of some parameters of a group that have a gradient, as `step` would: others do not matter."""
        if applied is not None and self.must_read(weights, group):
            if read([applied]) == [0]:
                return
            applied = None
        self.step_some(names, weights, group, applied, scale)

    def step_some(
        self,
        names: list[str],
        weights: list[Tensor],
        group: dict[str, Any],
        applied: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        """The same, where `applied` need not be read."""
        due = [(name, p) for name, p in zip(names, weights, strict=True) if p.grad is not None]
        if sharded := [(name, p) for name, p in due if isinstance(p, DTensor)]:
            self.step_sharded(sharded, group, scale)
            due = [(name, p) for name, p in due if not isinstance(p, DTensor)]
        names, weights = [name for name, _ in due], [p for _, p in due]
        grads = [downhill(p, p.grad, group["maximize"]) for p in weights if p.grad is not None]
        here = group if applied is None else {**group, "applied": applied}
        self.apply(names, weights, grads, [self.state[p] for p in weights], here, scale)
        for p in weights:
            if not self.state[p]:
                del self.state[p]  # nothing is kept, and so there is no entry

    def must_read(self, weights: list[Tensor], group: dict[str, Any]) -> bool:
        """Whether the host has to know if a step is applied: state would begin, or the method cannot do without."""
        due = [p for p in weights if p.grad is not None]
        if not self.takes_applied or any(isinstance(p, DTensor) for p in due):
            return bool(due)
        return any(not begun(self.state.get(p, {})) and self.spec(tuple(p.shape), p.dtype, **group) for p in due)

    # What is called in place of `update`: it knows how weights are stored and where a step is made by a kernel.

    def apply(
        self,
        names: list[str],
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        group: dict[str, Any],
        scale: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """`update` of whole tensors, of weights as they are stored and of gradients as they were summed.

        Args:
            scale: 0-dim; the gradients count so many times. They may be multiplied in place.
            skip: 0-dim; where it is 1 and not 0 weights and states keep every bit, as where `group["applied"]` is 0.
        """
        step_each(self, self.update, few_bits_step, names, weights, grads, states, group, scale, skip)

    def apply_fragments(
        self,
        fragments: list[Fragment],
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        group: dict[str, Any],
        scale: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """`update_fragments` in the same way."""
        step = self.update_fragments, few_bits_fragment_step
        step_each(self, *step, fragments, weights, grads, states, group, scale, skip)

    # Tensors that are cut: fragments of them, and those of FSDP2.

    @guarded
    def update_fragments(
        self,
        fragments: list[Fragment],
        weights: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        group: dict[str, Any],
    ) -> None:
        """`update` of fragments, in place, of tensors for which `elementwise` holds.

        Args:
            weights, grads: flat, [stop - start] each.
            group: with the names and shapes of all its tensors, whoever holds them; `params` may be meta tensors.
        """
        begin(fragments, states)
        self.update([fragment.name for fragment in fragments], weights, grads, states, group)

    def step_sharded(self, named: list[tuple[str, DTensor]], group: dict[str, Any], scale: Tensor | None) -> None:
        """Steps parameters of a group that are DTensors (`torch.distributed.fsdp.fully_shard`), which have a gradient.

        What is stepped entry by entry is stepped where it lies. Any other tensor has one rank, its owner, that keeps
        its state. Collective over their mesh; ValueError for a placement other than rows over a mesh of one dimension.
        """
        for name, p in named:
            check_placement(name, p)
        self.step_rows([pair for pair in named if self.elementwise(tuple(pair[1].shape), group)], group, scale)
        for name, p in named:
            if not self.elementwise(tuple(p.shape), group):
                self.step_owned(name, p, self.owner(name, p), group, scale)

    def step_rows(self, named: list[tuple[str, DTensor]], group: dict[str, Any], scale: Tensor | None) -> None:
        """Steps the rows that this rank has, without a word to the others."""
        fragments = [fragment_here(name, p) for name, p in named]
        weights = [p.to_local().view(-1) for _, p in named]
        grads = [p.grad.to_local().reshape(-1) for _, p in named]  # type: ignore[union-attr]
        slopes = [downhill(weight, grad, group["maximize"]) for weight, grad in zip(weights, grads, strict=True)]
        states = [self.state.get(p, {}) for _, p in named]
        here = [opened(fragment, state, group) for fragment, state in zip(fragments, states, strict=True)]
        self.apply_fragments(fragments, weights, slopes, here, group, scale)
        for (_, p), state, rows in zip(named, states, here, strict=True):
            if found := closed(p, rows, state, group):
                self.state[p] = found

    def owner(self, name: str, p: DTensor) -> int:
        """The rank that keeps the state of a tensor: written down, for what others cost may change."""
        if "owner" not in self.state[p]:
            self.state[p]["owner"] = torch.tensor(assign(self.costs(), p.device_mesh.size())[name])
        return int(self.state[p]["owner"])

    def step_owned(self, name: str, p: DTensor, owner: int, group: dict[str, Any], scale: Tensor | None) -> None:
        """Gathers weight and gradient, steps the whole tensor on its owner; the others take their rows of it."""
        ranks = p.device_mesh.get_group()
        weight, grad = p.full_tensor(), p.grad.full_tensor()  # type: ignore[union-attr]
        if dist.get_rank(ranks) == owner:
            slope = downhill(weight, grad, group["maximize"])
            self.apply([name], [weight], [slope], [self.state[p]], group, scale)
        dist.broadcast(weight, group=ranks, group_src=owner)
        p.to_local().copy_(weight[slice(*rows_here(p.shape[0], p))])

    # Weights in few bits.

    def keep_weights(self, dtype: WeightDtype, rounding: Rounding = "random", seed: int = 0) -> None:
        """Keeps the fp32 matrices that take gradients in bf16 from now on, with 0, 8 or 16 low bits in the state.

        The parameters change their dtype in place; call it before anything else takes them. Parameters that are bf16
        already begin with low bits of zero. ValueError for parameters that are cut.
        """
        for group in self.param_groups:
            group.update(weight_dtype=dtype, weight_rounding=rounding, weight_seed=seed)
            for name, p in zip(group["names"], group["params"], strict=True):
                if isinstance(p, DTensor) and p.dtype == torch.float32:
                    raise ValueError(
                        f"{name} is a DTensor of fp32; call keep_weights before fully_shard, or make it bf16"
                    )
                if p.requires_grad and p.ndim > 1 and p.dtype == torch.float32:
                    narrow(p, self.state[p], group)

    # Groups and state, by name.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. Its hyper-parameters are checked; parameters without names are named by their position."""
        group = {**param_group, **named_tensors(param_group, self.param_groups)}
        for name, p in zip(group["names"], group["params"], strict=True):
            if isinstance(p, Tensor):
                refuse_kind(name, p)
        refuse_switches(type(self), {key: value for key, value in group.items() if key not in self.defaults})
        group.update(hyper.check(type(self), {**self.defaults, **group}))
        self.check_group({**self.defaults, **group})
        group.update(settled(self, {**self.defaults, **group}))
        own_names = group.pop("param_names", None)  # torch wants them in all groups or in none
        held = [other.pop("param_names", None) for other in self.param_groups]
        try:
            super().add_param_group(group)
        finally:
            for other, theirs in zip([*self.param_groups, group], [*held, own_names], strict=False):
                if theirs is not None:
                    other["param_names"] = theirs

    def state_dict(self) -> dict[str, Any]:
        """torch's index-keyed state dict, fit for `weights_only=True`; an object is written as its type's name. It has
        zeros for idle blocks, because torch.distributed.checkpoint wants the keys before it reads; `rank_state_dict`
        has not.

        Of parameters that are DTensors it has DTensors, fit for torch.distributed.checkpoint at any number of ranks; of
        chosen rows and entries they are made in a collective operation. ValueError where the state of a tensor lies
        whole at one rank: `rank_state_dict` saves it.
        """
        return saved_state(self, super().state_dict, show)

    def rank_state_dict(self) -> dict[str, Any]:
        """What this rank keeps, whatever the method: plain tensors, to be saved by every rank in a file of its own.
        `load_state_dict` takes it back on the same rank of as many."""
        return saved_state(self, super().state_dict, keep_own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores every bit that `state_dict()` saved, by name where both sides have names."""
        load_state(self, state_dict, super().load_state_dict)


def downhill(weight: Tensor, grad: Tensor, maximize: bool) -> Tensor:
    """The gradient of what is minimised, in the memory layout of the weight; one that does not fit is left as it is,
    for `update` to refuse it by name."""
    if grad.layout is not torch.strided or grad.shape != weight.shape or grad.device != weight.device:
        return grad
    grad = grad if grad.stride() == weight.stride() else torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    return -grad if maximize else grad
