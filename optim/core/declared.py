"""What a method declares: how a tensor is stepped, what is kept for it, what that costs, and what does not go together.

A rule is written by overriding some of these. Who calls them and when is method.py's affair.
"""

from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.core.kinds import ALL, Kind, Numbers, numbers_of_adamw, speaks_for
from thriftlab.optim.core.owners import Cost
from thriftlab.optim.state.keys import Spec, State, spec_bytes
from thriftlab.optim.state.rules import ADAMW, adamw
from thriftlab.optim.state.weights import dtype_of_step, low_spec


class Declared:
    """The part of a method that an author of a rule may write."""

    roles = False  # whether it asks groups for the `role` of their matrices
    takes_applied = False  # whether `update` knows `group["applied"]`, so that the host need not read it
    param_groups: list[dict[str, Any]]

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

    def matrix_kind(self, state: State, group: dict[str, Any]) -> Kind | None:
        """The same of a matrix that a method splits."""
        return None

    def matrix_step(self, state: State, group: dict[str, Any]) -> Kind | None:
        """What `matrix_kind` says, if that is said of the step that the method has."""
        return self.matrix_kind(state, group) if speaks_for(type(self), "matrix_kind") else None

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        """Names, shapes and dtypes of one tensor's state, under the defaults and what overrides them."""
        raise NotImplementedError

    def expected_spec(self, name: str, weight: Tensor, group: dict[str, Any]) -> Spec:
        """The `spec` of one tensor of a group as things stand now."""
        return self.spec(tuple(weight.shape), dtype_of_step(weight, group), **group)

    def declared(self, name: str, weight: Tensor, group: dict[str, Any]) -> Spec:
        """The same with what is kept of a weight beside itself."""
        return self.expected_spec(name, weight, group) | low_spec(tuple(weight.shape), weight.dtype, group)

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

    def in_pieces(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        """Whether flat pieces of a whole tensor, of any number of 8-bit blocks, can be stepped by themselves, one after
        the other, with the `spec` of its state at the beginning all zeros."""
        return False

    def work(self, weight: Tensor, group: dict[str, Any]) -> int:
        """Operations of one tensor's step, up to a constant: here a walk over its entries."""
        return weight.numel()

    def cost(self, name: str, weight: Tensor, group: dict[str, Any]) -> Cost:
        """What one tensor costs the rank that owns it; an active one, where state comes and goes."""
        shape, low = tuple(weight.shape), low_spec(tuple(weight.shape), weight.dtype, group)
        spec = self.spec(shape, dtype_of_step(weight, group), **group) | low
        return Cost(name, self.work(weight, group), spec_bytes(spec))

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
