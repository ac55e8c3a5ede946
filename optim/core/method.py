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
from thriftlab.optim.core.fragments import Fragment, begin
from thriftlab.optim.core.fused import plan_step, step_fused
from thriftlab.optim.core.groups import named_tensors, refuse_set, refuse_switches, without_switches
from thriftlab.optim.core.guard import guarded, refuse_kind
from thriftlab.optim.core.kinds import ALL, Kind, Numbers, numbers_of_adamw, speaks_for
from thriftlab.optim.core.owners import Cost, assign
from thriftlab.optim.core.saving import load_state, saved_state
from thriftlab.optim.core.sharded import (
    as_local,
    check_placement,
    closed,
    fragment_here,
    keep_own,
    opened,
    rows_here,
    show,
)
from thriftlab.optim.core.tables import ask_tables_first, settled, with_tables
from thriftlab.optim.state.counters import read
from thriftlab.optim.state.keys import Spec, State, spec_bytes
from thriftlab.optim.state.lists import refused
from thriftlab.optim.state.rules import ADAMW, adamw

METHODS: dict[str, type["Method"]] = {}


class Method(torch.optim.Optimizer):
    """An optimizer with named parameters and declared state; `class X(Method, name="x")` registers it in `METHODS`.

    Args:
        params: parameters, `(name, parameter)` pairs, or group dicts with `params` and optionally `names`, `split` and
            hyper-parameters of their own.
        defaults: the hyper-parameters, which live in `param_groups`.
    """

    roles = False  # whether it asks groups for the `role` of their matrices
    takes_applied = False  # whether `update` knows `group["applied"]`, so that the host need not read it

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

    def update(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        """Steps `weights` in place. `states` are empty at first; `group` is a parameter group, or a copy of one."""
        raise NotImplementedError

    def update_plain(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        """Steps tensors that are AdamW's."""
        adamw(weights, grads, states, **{**ADAMW, **group})

    def plain_numbers(self, group: dict[str, Any]) -> Numbers:
        """What `update_plain` multiplies with, as an AdamW."""
        return numbers_of_adamw({**ADAMW, **group})

    def kernel_step(self, shape: tuple[int, ...], state: State, group: dict[str, Any]) -> Kind | None:
        """How a kernel makes the step that `update` makes of a tensor; None: there is none."""
        return None

    def plain_step(self, group: dict[str, Any]) -> Kind | None:
        """The same of a tensor that `update_plain` steps."""
        return Kind(ALL, self.plain_numbers, plain=True) if speaks_for(type(self), "plain_numbers") else None

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        """Names, shapes and dtypes of one tensor's state, under the defaults and what overrides them."""
        raise NotImplementedError

    def expected_spec(self, name: str, weight: Tensor, group: dict[str, Any]) -> Spec:
        """The `spec` of one tensor of a group as things stand now."""
        return self.spec(tuple(weight.shape), weight.dtype, **group)

    def idle(self, name: str, weight: Tensor, group: dict[str, Any], state: State) -> bool:
        """Whether a tensor with this state is to have no moments now."""
        return False

    def passing_spec(self, weight: Tensor, group: dict[str, Any]) -> Spec:
        """The part of its `spec` that the state of a tensor has at times, and at others not."""
        return {}

    def state_spec(self, shape: tuple[int, ...], dtype: torch.dtype, state: State, group: dict[str, Any]) -> Spec:
        """What a state that a tensor of this shape already has must be, where that may differ from a new one's."""
        return self.spec(shape, dtype, **group)

    def check_loaded(
        self, named: dict[str, Tensor], states: dict[str, State], group: dict[str, Any], own: dict[str, Any]
    ) -> None:
        """ValueError where states that are to be loaded do not go together with the tensors of a group; `own` is the
        group as it was before."""

    def check_kind(self, name: str, weight: Tensor, state: State, group: dict[str, Any]) -> None:
        """ValueError where a tensor has the state of one that the method steps in another way."""

    def diagnostics(self, fresh: bool = False) -> dict[str, dict[str, Tensor]]:
        """Scalars that a method tells of its tensors, by name; `fresh`: only those that the last step found out, mostly
        none, which is known without waiting for the device."""
        return {}

    def elementwise(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        """Whether a tensor of this shape is stepped entry by entry, so that pieces of it can be (fragments.py)."""
        return False

    def work(self, weight: Tensor, group: dict[str, Any]) -> int:
        """Operations of one tensor's step, up to a constant: here a walk over its entries."""
        return weight.numel()

    def cost(self, name: str, weight: Tensor, group: dict[str, Any]) -> Cost:
        """What one tensor costs the rank that owns it; an active one, where state comes and goes."""
        return Cost(name, self.work(weight, group), spec_bytes(self.spec(tuple(weight.shape), weight.dtype, **group)))

    def costs(self) -> list[Cost]:
        """Of the parameters of all groups that take gradients or have one left, in order."""
        return [
            self.cost(name, p, group)
            for group in self.param_groups
            for name, p in zip(group["names"], group["params"], strict=True)
            if p.requires_grad or p.grad is not None
        ]

    def remarks(self) -> list[str]:
        """Where the method, as it is set, is not what its name promises."""
        return []

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError where the hyper-parameters of a new group do not go together."""

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
        states = [self.state[p] for p in weights]
        self.apply(names, weights, grads, states, here, scale)
        for p, state in zip(weights, states, strict=True):
            if not state:
                del self.state[p]  # nothing is kept, and so there is no entry

    def must_read(self, weights: list[Tensor], group: dict[str, Any]) -> bool:
        """Whether the host has to know if a step is applied: state would begin, or the method cannot do without."""
        due = [p for p in weights if p.grad is not None]
        if not self.takes_applied or any(isinstance(p, DTensor) for p in due):
            return bool(due)
        return any(not self.state.get(p) and self.spec(tuple(p.shape), p.dtype, **group) for p in due)

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
        group = unless(group, skip)
        left = step_fused(self, names, weights, grads, states, group, scale)
        if left or not weights:
            slopes = scaled([grads[i] for i in left], scale)
            self.update(some(names, left), some(weights, left), slopes, some(states, left), group)
            plan_step(self, names, weights, grads, states, group)

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
        group = unless(group, skip)
        left = step_fused(self, fragments, weights, grads, states, group, scale)
        if left or not weights:
            slopes = scaled([grads[i] for i in left], scale)
            self.update_fragments(some(fragments, left), some(weights, left), slopes, some(states, left), group)
            plan_step(self, fragments, weights, grads, states, group)

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
    grad = grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad)
    return -grad if maximize else grad


def some(values: list[Any], places: list[int]) -> list[Any]:
    return [values[i] for i in places]


def scaled(grads: list[Tensor], scale: Tensor | None) -> list[Tensor]:
    """The gradients, multiplied in place."""
    if scale is not None and grads:
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))
    return grads


def unless(group: dict[str, Any], skip: Tensor | None) -> dict[str, Any]:
    """The group of a step that is refused where `skip` is 1."""
    return group if skip is None else {**group, "applied": refused(skip)}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state that is allocated now, 0-dim counters apart."""
    tensors = (value for state in optimizer.state.values() for value in as_local(state).values())
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor) and t.ndim)


def predicted_state_bytes(optimizer: Method, keeps: Callable[[str], bool] = lambda name: True) -> int:
    """The same from the declared `spec`, before or after it is allocated, for the parameters that take gradients.

    Args:
        keeps: whether the state of a parameter is counted, by its name.
    """
    return sum(
        spec_bytes(optimizer.expected_spec(name, p, group))
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"], strict=True)
        if p.requires_grad and keeps(name)
    )
