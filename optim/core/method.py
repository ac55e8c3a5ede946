"""What every method is: a `torch.optim.Optimizer` whose parameters have names, and whose one verb is `update`.

`update(names, weights, grads, states, group)` steps whole tensors in place. It is a function of its arguments alone:
randomness is keyed by (seed, name, count), counters are 0-dim tensors in the state, and a choice over a group (which
blocks are active) depends on the group's names and the count. So whoever holds a whole matrix, its gradient and its
state may make the call, and a sharded run equals one process.

The surprise: torch's own `load_state_dict` casts state to the parameter's dtype (int32 indices to bfloat16, too) and
matches parameters by position. Here dtypes stay as saved, and names decide where both sides have them.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.core import hyper

State = dict[str, Tensor]
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]

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

    def diagnostics(self, fresh: bool = False) -> dict[str, dict[str, Tensor]]:
        """Scalars that a method tells of its tensors, by name; `fresh`: only those that the last step found out, mostly
        none, which is known without waiting for the device."""
        return {}

    def elementwise(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        """Whether a tensor of this shape is stepped entry by entry, so that pieces of it can be (fragments.py)."""
        return False

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
        if any(hasattr(p, "device_mesh") for _, p in due):
            due = self.step_sharded(due, group)
        names, weights = [name for name, _ in due], [p for _, p in due]
        grads = [downhill(p, p.grad, group["maximize"]) for p in weights if p.grad is not None]
        self.update(names, weights, grads, [self.state[p] for p in weights], group)

    def step_sharded(self, due: list[tuple[str, Any]], group: dict[str, Any]) -> list[tuple[str, Tensor]]:
        """Steps those parameters that are DTensors (dtensor.py); returns the others."""
        from thriftlab.optim.core.dtensor import step_sharded

        sharded = [(name, p) for name, p in due if hasattr(p, "device_mesh")]
        step_sharded(self, [name for name, _ in sharded], [p for _, p in sharded], group)
        return [(name, p) for name, p in due if not hasattr(p, "device_mesh")]

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
        """torch's index-keyed state dict, fit for `weights_only=True`; an object is written as its type's name."""
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


def named_tensors(group: dict[str, Any], start: int) -> dict[str, list]:
    """`params` and `names` of a group of tensors or `(name, tensor)` pairs; without names they count from `start`."""
    if isinstance(group["params"], set):
        raise TypeError("parameters in a set have no order; use a list")
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    names = group.get("names")
    if params and isinstance(params[0], tuple):
        names, params = map(list, zip(*params, strict=True))
    names = [str(start + i) for i in range(len(params))] if names is None else list(names)
    if len(names) != len(params):
        raise ValueError(f"a parameter group has {len(params)} parameters and {len(names)} names")
    if len({id(p) for p in params}) < len(params):
        raise ValueError("a parameter group lists a parameter twice; list a tied parameter once")
    return {"params": params, "names": names}


def match_groups(own: list[dict], saved: list[dict]) -> list[dict]:
    """The saved groups in the order of our own: by name where both have names, else by position as in torch."""
    if len(own) != len(saved):
        raise ValueError(f"the saved optimizer state has {len(saved)} parameter groups, this optimizer has {len(own)}")
    if not (_named(own) and _named(saved)):
        return [{**s, "names": o["names"]} for o, s in zip(own, saved, strict=True)]
    by_names = {frozenset(group["names"]): group for group in saved}
    groups = []
    for group in own:
        found = by_names.get(frozenset(group["names"]))
        if found is None:
            strangers = set(group["names"]) ^ {name for s in saved for name in s["names"]}
            raise ValueError(f"the saved optimizer state has other parameter groups; for example {min(strangers)!r}")
        index = dict(zip(found["names"], found["params"], strict=True))
        groups.append({**found, "names": group["names"], "params": [index[name] for name in group["names"]]})
    return groups


def keyed_seed(seed: int, name: str, count: int) -> int:
    """63 bits that are a function of (seed, name, count)."""
    digest = hashlib.blake2b(f"{seed}/{count}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, name: str, count: int) -> torch.Generator:
    """A CPU generator that is a function of (seed, name, count)."""
    return torch.Generator().manual_seed(keyed_seed(seed, name, count))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state that is allocated now, 0-dim counters apart."""
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor) and t.ndim)


def predicted_state_bytes(optimizer: Method) -> int:
    """The same from the declared `spec`, before or after it is allocated, for the parameters that take gradients."""
    specs = (
        optimizer.expected_spec(name, p, group)
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"], strict=True)
        if p.requires_grad
    )
    return sum(torch.Size(shape).numel() * dtype.itemsize for spec in specs for shape, dtype in spec.values() if shape)


def _named(groups: list[dict]) -> bool:
    return all("names" in group and not all(name.isdigit() for name in group["names"]) for group in groups)


def _is_data(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | list | tuple | dict | Tensor)


def _restored(value: Tensor, p: Tensor) -> Tensor:
    """A copy of a saved tensor on the device of `p`, fp32 beside fp32 in its layout; counters on the CPU."""
    alike = value.shape == p.shape and value.ndim and value.dtype == p.dtype in (torch.float32, torch.float64)
    if alike and not hasattr(p, "device_mesh"):
        return torch.empty_like(p).copy_(value)
    return value.to(p.device if value.ndim else "cpu", copy=True)
