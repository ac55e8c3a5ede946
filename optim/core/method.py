"""What every method is: a `torch.optim.Optimizer` whose parameters have names, and whose one verb is `update`.

`update(names, weights, grads, states, group)` steps whole tensors in place. It is a function of its arguments alone:
randomness is keyed by (seed, name, count), counters are 0-dim tensors in the state, and a choice over a group (which
blocks are active) depends on the group's names and the count. So whoever holds a whole matrix, its gradient and its
state may make the call, and a sharded run equals one process.

The surprise: torch's own `load_state_dict` casts state to the parameter's dtype (int32 indices to bfloat16, too) and
matches parameters by position. Here dtypes stay as saved, and names decide where both sides have them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from thriftlab.optim.core import hyper
from thriftlab.optim.core.fragments import Fragment, begin
from thriftlab.optim.core.groups import match_groups, named_tensors
from thriftlab.optim.core.owners import Cost, assign
from thriftlab.optim.core.sharded import (
    as_local,
    check_placement,
    closed,
    fragment_here,
    opened,
    rows_here,
    show,
    states_here,
    this_rank,
)
from thriftlab.optim.state.keys import Spec, State, spec_bytes

METHODS: dict[str, type["Method"]] = {}


class Method(torch.optim.Optimizer):
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

    def __init__(self, params: Iterable[Any], **defaults: Any):
        super().__init__(params, {"maximize": False, **defaults})

    def update(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        """Steps `weights` in place. `states` are empty at first; `group` is a parameter group, or a copy of one."""
        raise NotImplementedError

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        """Names, shapes and dtypes of one tensor's state, under the defaults and what overrides them."""
        raise NotImplementedError

    def expected_spec(self, name: str, weight: Tensor, group: dict[str, Any]) -> Spec:
        """The `spec` of one tensor of a group as things stand now."""
        return self.spec(tuple(weight.shape), weight.dtype, **group)

    def idle(self, name: str, weight: Tensor, group: dict[str, Any], state: State) -> bool:
        """Whether a tensor with this state is to have no moments now."""
        return False

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
        """Of the parameters of all groups that take gradients, in order."""
        return [
            self.cost(name, p, group)
            for group in self.param_groups
            for name, p in zip(group["names"], group["params"], strict=True)
            if p.requires_grad
        ]

    def remarks(self) -> list[str]:
        """Where the method, as it is set, is not what its name promises."""
        return []

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError where the hyper-parameters of a new group do not go together."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps every parameter that has a gradient; returns what `closure`, called first, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.step_only(group["names"], group["params"], group)
        return loss

    @torch.no_grad()
    def step_only(self, names: list[str], weights: list[Tensor], group: dict[str, Any]) -> None:
        """Steps those of some parameters of a group that have a gradient, as `step` would: others do not matter."""
        due = [(name, p) for name, p in zip(names, weights, strict=True) if p.grad is not None]
        if sharded := [(name, p) for name, p in due if isinstance(p, DTensor)]:
            self.step_sharded(sharded, group)
            due = [(name, p) for name, p in due if not isinstance(p, DTensor)]
        names, weights = [name for name, _ in due], [p for _, p in due]
        grads = [downhill(p, p.grad, group["maximize"]) for p in weights if p.grad is not None]
        self.update(names, weights, grads, [self.state[p] for p in weights], group)

    # Tensors that are cut: fragments of them, and those of FSDP2.

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

    def step_sharded(self, named: list[tuple[str, DTensor]], group: dict[str, Any]) -> None:
        """Steps parameters of a group that are DTensors (`torch.distributed.fsdp.fully_shard`), which have a gradient.

        What is stepped entry by entry is stepped where it lies. Any other tensor has one rank, its owner, that keeps
        its state. Collective over their mesh; ValueError for a placement other than rows over a mesh of one dimension.
        """
        for name, p in named:
            check_placement(name, p)
        self.step_rows([pair for pair in named if self.elementwise(tuple(pair[1].shape), group)], group)
        for name, p in named:
            if not self.elementwise(tuple(p.shape), group):
                self.step_owned(name, p, self.owner(name, p), group)

    def step_rows(self, named: list[tuple[str, DTensor]], group: dict[str, Any]) -> None:
        """Steps the rows that this rank has, without a word to the others."""
        fragments = [fragment_here(name, p) for name, p in named]
        weights = [p.to_local().view(-1) for _, p in named]
        grads = [p.grad.to_local().reshape(-1) for _, p in named]  # type: ignore[union-attr]
        slopes = [downhill(weight, grad, group["maximize"]) for weight, grad in zip(weights, grads, strict=True)]
        states = [self.state.get(p, {}) for _, p in named]
        here = [opened(fragment, state, group) for fragment, state in zip(fragments, states, strict=True)]
        self.update_fragments(fragments, weights, slopes, here, group)
        for (_, p), state, rows in zip(named, states, here, strict=True):
            if found := closed(p, rows, state, group):
                self.state[p] = found

    def owner(self, name: str, p: DTensor) -> int:
        """The rank that keeps the state of a tensor: written down, for what others cost may change."""
        if "owner" not in self.state[p]:
            self.state[p]["owner"] = torch.tensor(assign(self.costs(), p.device_mesh.size())[name])
        return int(self.state[p]["owner"])

    def step_owned(self, name: str, p: DTensor, owner: int, group: dict[str, Any]) -> None:
        """Gathers weight and gradient, steps the whole tensor on its owner; the others take their rows of it."""
        ranks = p.device_mesh.get_group()
        weight, grad = p.full_tensor(), p.grad.full_tensor()  # type: ignore[union-attr]
        if dist.get_rank(ranks) == owner:
            self.update([name], [weight], [downhill(weight, grad, group["maximize"])], [self.state[p]], group)
        dist.broadcast(weight, group=ranks, group_src=owner)
        p.to_local().copy_(weight[slice(*rows_here(p.shape[0], p))])

    # Groups and state, by name.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. Its hyper-parameters are checked; parameters without names are named by their position."""
        group = {**param_group, **named_tensors(param_group, start=sum(len(g["params"]) for g in self.param_groups))}
        names = [name for other in (*self.param_groups, group) for name in other["names"]]
        if len(set(names)) < len(names):
            raise ValueError(f"two parameters have one name: {sorted({n for n in names if names.count(n) > 1})}")
        group.update(hyper.check(type(self), {**self.defaults, **group}))
        self.check_group({**self.defaults, **group})
        super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """torch's index-keyed state dict, fit for `weights_only=True`; an object is written as its type's name.

        Of parameters that are DTensors it has DTensors, fit for torch.distributed.checkpoint at any number of ranks; of
        chosen rows and entries they are made in a collective operation. ValueError where the state of a tensor lies
        whole at one rank: `rank_state_dict` saves it.
        """
        saved = self._packed()
        show(self, saved)
        return saved

    def rank_state_dict(self) -> dict[str, Any]:
        """What this rank keeps, whatever the method: plain tensors, to be saved by every rank in a file of its own.
        `load_state_dict` takes it back on the same rank of as many."""
        saved = self._packed()
        saved["state"] = {index: as_local(state) for index, state in saved["state"].items()}
        return {**saved, "rank": this_rank()}

    def _packed(self) -> dict[str, Any]:
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.update({key: type(value).__name__ for key, value in group.items() if not _is_data(value)})
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores every bit that `state_dict()` saved, by name where both sides have names."""
        groups = match_groups(self.param_groups, state_dict["param_groups"])
        objects = [  # and hyper-parameters that are younger than the file
            {key: value for key, value in group.items() if not _is_data(value) or key not in saved}
            for group, saved in zip(self.param_groups, groups, strict=True)
        ]
        for saved, own in zip(groups, objects, strict=True):
            hyper.check(type(self), {**saved, **own})
        merged = [{**saved, **own} for saved, own in zip(groups, objects, strict=True)]
        state_dict = {**state_dict, "state": states_here(self, state_dict, merged)}
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group, saved, own in zip(self.param_groups, groups, objects, strict=True):
            group.update(own)
            for p, index in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    self.state[p][key] = _restored(value, p)


def downhill(weight: Tensor, grad: Tensor, maximize: bool) -> Tensor:
    """The gradient of what is minimised, in the memory layout of the weight."""
    if grad.is_sparse:
        raise TypeError("sparse gradients are not supported; make the embedding with sparse=False")
    grad = grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad)
    return -grad if maximize else grad


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


def _is_data(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | list | tuple | dict | Tensor)


def _restored(value: Tensor, p: Tensor) -> Tensor:
    """A copy of a saved tensor on the device of `p`, fp32 beside fp32 in its layout; counters on the CPU."""
    alike = value.shape == p.shape and value.ndim and value.dtype == p.dtype in (torch.float32, torch.float64)
    if alike and not isinstance(p, DTensor):
        return torch.empty_like(p).copy_(value)
    return value.to(p.device if value.ndim else "cpu", copy=True)
