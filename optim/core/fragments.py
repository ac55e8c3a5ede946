"""Fragments: contiguous pieces of flattened tensors, stepped by the ranks that hold them without a word between them.

Sharded training cuts tensors anywhere. A rule that looks at one entry at a time (AdamW, signs; FRUGAL and BAdam where
whole tensors, columns, rows or single entries are state-full) may step each fragment by itself, if what is chosen
depends on (seed, name, count) and the whole shape: then the moments of a fragment are a contiguous piece of the whole
tensor's moments, and both the step and the state are bitwise those of one process.

The surprise: an entry-wise kernel is not a function of the entry. torch's fused AdamW rounds the last few entries of a
tensor differently, so a fragment remembers where in the whole it lies ("whole.first", "whole.size").
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thriftlab.optim.state.blocks import Blocks
from thriftlab.optim.state.coordinates import CoordinateSubspace
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.subspaces import basis_of, subspace_of
from thriftlab.optim.state.weights import LOW

LOCAL = ("whole.first", "whole.size", "basis.first", "basis.stop")  # state that says where a fragment lies


class Fragment(NamedTuple):
    """Entries start to stop of a tensor, row-major."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    stop: int


class FragmentSubspace(CoordinateSubspace):
    """What lies within one fragment of the entries that `subspace` chooses of the whole matrix."""

    def __init__(self, subspace: CoordinateSubspace, fragment: Fragment, state: State):
        super().__init__(subspace.density)
        self.subspace, self.fragment, self.state = subspace, fragment, state

    def refresh(self, grad: Tensor, name: str, count: int, generator: torch.Generator) -> State:
        whole = grad.new_empty(()).expand(self.fragment.shape)
        return self.within(self.subspace.refresh(whole, name, count, generator))

    def within(self, basis: State) -> State:
        """The basis of the whole matrix, and which of its entries are here."""
        shape = self.fragment.shape
        edges = self.fragment.start, self.fragment.stop, torch.Size(shape).numel()
        first, stop, size = (self.subspace.below(edge, shape, basis) for edge in edges)
        locate(self.state, first, size)
        return {**basis, "first": torch.tensor(first), "stop": torch.tensor(stop)}

    def where(self, matrix: Tensor, basis: State) -> Tensor:
        entries = torch.arange(int(basis["first"]), int(basis["stop"]), device=matrix.device)
        return self.subspace.positions(self.fragment.shape, basis, entries) - self.fragment.start

    def take(self, matrix: Tensor, where: Tensor) -> Tensor:
        return matrix.index_select(0, where)

    def put(self, matrix: Tensor, where: Tensor, small: Tensor) -> None:
        matrix.index_copy_(0, where, small)


def locate(state: State, first: int, size: int) -> None:
    """Writes down that the moments in `state` are those of the entries from `first` on, of `size`."""
    state["whole.first"], state["whole.size"] = torch.tensor(first), torch.tensor(size)


def begin(fragments: list[Fragment], states: list[State]) -> None:
    """Gives the states of new fragments their place."""
    for fragment, state in zip(fragments, states, strict=True):
        if "whole.first" not in state:
            locate(state, fragment.start, torch.Size(fragment.shape).numel())


def countable(group: dict[str, Any]) -> CoordinateSubspace:
    """The subspace of a group whose matrices are stepped entry by entry."""
    subspace = subspace_of(group)
    assert isinstance(subspace, CoordinateSubspace)
    return subspace


def on_fragment(group: dict[str, Any], fragment: Fragment, state: State) -> dict[str, Any]:
    """The group of a matrix as one fragment of it sees it; blocks, which choose whole matrices, look the same."""
    if isinstance(subspace_of(group), Blocks):
        return group
    return {**group, "subspace": FragmentSubspace(countable(group), fragment, state)}


def place(fragment: Fragment, state: State, group: dict[str, Any]) -> tuple[int, int]:
    """Writes into a state where the fragment lies; which of the whole tensor's moments, flat, are its own."""
    locate(state, fragment.start, torch.Size(fragment.shape).numel())
    if not (basis := basis_of(state)):
        return fragment.start, fragment.stop
    basis = FragmentSubspace(countable(group), fragment, state).within(basis)
    state.update({f"basis.{key}": tensor for key, tensor in basis.items()})
    return int(basis["first"]), int(basis["stop"])


def small_shape(shape: tuple[int, ...], state: State, group: dict[str, Any]) -> tuple[int, ...]:
    """Shape of the moments of a whole tensor."""
    basis = basis_of(state)
    return countable(group).small_shape(shape, basis) if basis else shape


# What a checkpoint sees: each tensor of a fragment's state as a piece of the whole tensor's.


def saved_pieces(
    fragment: Fragment, state: State, group: dict[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], int, Tensor]]:
    """(key, shape of the whole, where the piece starts in it, piece [n]), row-major."""
    shape = small_shape(fragment.shape, state, group)
    for key, tensor in state.items():
        if key == LOW:
            yield key, fragment.shape, fragment.start, tensor.flatten()
        elif is_moment(key, tensor.shape):
            yield key, shape, int(state["whole.first"]), tensor.flatten()
        elif key not in LOCAL:
            yield key, tuple(tensor.shape), 0, tensor.flatten()


def take_up(
    fragment: Fragment,
    group: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str, int, int | None], Tensor],
) -> State:
    """The state of a fragment, from a source of the whole tensor's: the shapes of its tensors by key, and
    `read(key, start, stop)`, flat."""
    state: State = {}
    for key, shape in shapes.items():
        if not is_cut(key, shape) and not key.startswith("diagnostic."):
            state[key] = read(key, 0, None).view(shape).clone()
    first, stop = place(fragment, state, group)
    for key, shape in shapes.items():
        if key == LOW:
            state[key] = read(key, fragment.start, fragment.stop).clone()
        elif is_moment(key, shape):
            state[key] = read(key, first, stop).clone()
    return state


def is_moment(key: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 0 and key != LOW and not key.startswith("basis.")


def is_cut(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a fragment has a piece of it: of moments, which the basis may choose, and of the weight's low bits."""
    return key == LOW or is_moment(key, shape)
