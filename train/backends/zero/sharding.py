"""A method on pieces: what one rank steps of a model whose tensors are cut, whoever has cut them.

What steps entry by entry is stepped where it lies. What needs whole matrices gets them: those that are cut travel to an
owner and back (exchange.py), the others are views.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thriftlab.optim import Method
from thriftlab.optim.core.bill import PARTS, part_of
from thriftlab.optim.core.fragments import Fragment, is_cut
from thriftlab.optim.core.method import downhill
from thriftlab.optim.state.weights import LOW
from thriftlab.train.backends.norms import norms_of, total_norm
from thriftlab.train.backends.zero.exchange import CHUNK, Exchange, is_aligned, make_ownership

ParamGroup = dict[str, Any]
Flat = dict[str, Tensor]  # by name: what this rank holds of a parameter, or of its gradient, flat


class Sharding:
    """Steps a method's parameters, of which each rank holds pieces; all of them until `assign_owners` says otherwise.

    Args:
        stand_ins: by name, tensors with the shape and dtype of the whole; the state is kept under them, and the
            method's groups have them.
        chunk: entries of whole matrices that one rank has at once beside its own.
    """

    def __init__(self, method: Method, stand_ins: dict[str, Tensor], chunk: int = CHUNK):
        self.method, self.stand_ins, self.chunk = method, stand_ins, chunk
        self.shapes = {name: tuple(tensor.shape) for name, tensor in stand_ins.items()}
        self.fragments: dict[str, Fragment] | None = None  # what this rank holds; None: all, as every rank does
        self.begun = False  # whether there has been a step, and so is a state

    def assign_owners(self, held: list[list[Fragment]], like: Tensor) -> None:
        """Agree, without a word, on who owns what is cut.

        Args:
            held: by rank, what it holds.
            like: is on the device of every piece.
        """
        groups, rank = self.group_of(), dist.get_rank()
        ownership = make_ownership(
            held,
            by_entry={name: self.method.elementwise(self.shapes[name], group) for name, group in groups.items()},
            costs={name: self.method.cost(name, self.stand_ins[name], group) for name, group in groups.items()},
            chunk=self.chunk,
        )
        self.fragments = {fragment.name: fragment for fragment in held[rank]}
        self.exchange, self.like = Exchange(ownership, rank, dist.get_world_size()), like

    def take_low_bits(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Of the states of whole tensors, by name, what this rank keeps of their low bits."""
        for name, state in states.items():
            if LOW not in state:
                continue
            if fragment := self.fragment(name):
                self.state_of(name)[LOW] = state[LOW].view(-1)[fragment.start : fragment.stop].clone()
            elif self.keeps(name):
                self.state_of(name)[LOW] = state[LOW]

    def group_of(self) -> dict[str, ParamGroup]:
        """By the parameters' names."""
        return {name: group for group in self.method.param_groups for name in group["names"]}

    def fragment(self, name: str) -> Fragment | None:
        """What this rank holds of a tensor that is cut, and stepped where it lies."""
        if self.fragments is None or name not in self.fragments or name in self.exchange.ownership.owner:
            return None
        fragment = self.fragments[name]
        return fragment if fragment.stop - fragment.start < torch.Size(fragment.shape).numel() else None

    def keeps(self, name: str) -> bool:
        """Whether this rank steps a tensor as a whole."""
        if self.fragments is None:
            return True
        owner = self.exchange.ownership.owner.get(name)
        return owner == self.exchange.rank if owner is not None else name in self.fragments

    def state_of(self, name: str) -> dict[str, Tensor]:
        return self.method.state[self.stand_ins[name]]

    def predicted_state_parts(self) -> dict[str, int]:
        """Bytes of state on this rank, by part, by the method's spec; of entries chosen within pieces the expected
        number."""
        total = dict.fromkeys(PARTS, 0.0)
        for name, group in self.group_of().items():
            fragment, shape = self.fragment(name), self.shapes[name]
            here = (fragment.stop - fragment.start) / torch.Size(shape).numel() if fragment else self.keeps(name)
            for key, (size, dtype) in self.method.declared(name, self.stand_ins[name], group).items():
                whole = torch.Size(size).numel() * dtype.itemsize if size else 0
                total[part_of(key)] += whole * (here if is_cut(key, size) else here > 0)
        return {part: round(size) for part, size in total.items()}

    # ------------------------------------------------------------------------------------------------------ stepping

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        """Of the gradients of all ranks; `grads` are what this rank has of them."""
        if self.fragments is None:
            return total_norm(grads)
        square = torch.zeros((), dtype=torch.float64, device=self.like.device)
        for norm in norms_of(grads):
            square += norm.double().square()
        dist.all_reduce(square)
        return square.sqrt()

    def update(self, weights: Flat, grads: Flat, scale: Tensor, applied: Tensor | None = None) -> None:
        """The method's own step of everything that this rank holds or owns. `scale` and `applied` as in `Method.step`;
        `applied` is read by all ranks or by none, in a first step and where the method cannot do without."""
        if applied is not None and not (self.begun and self.method.takes_applied):
            if not applied:
                return
            applied = None
        self.begun = True
        groups = [group if applied is None else {**group, "applied": applied} for group in self.method.param_groups]
        _, owner, chunks = ({}, {}, []) if self.fragments is None else self.exchange.ownership
        for group in groups:
            here = [name for name in group["names"] if name in weights and name not in owner]
            cut = [name for name in here if self.fragment(name)]
            self.update_cut(group, cut, weights, grads, scale)
            self.update_whole(group, [name for name in here if name not in cut], weights, grads, scale)
        for names in chunks:
            for alike in self.by_dtype(names):
                self.update_chunk(groups, alike, weights, grads, scale)

    def update_cut(self, group: ParamGroup, names: list[str], weights: Flat, grads: Flat, scale: Tensor) -> None:
        """Steps pieces where they lie."""
        if names:
            fragments = [fragment for name in names if (fragment := self.fragment(name))]
            slopes = [downhill(weights[name], grads[name], group["maximize"]) for name in names]
            states = [self.state_of(name) for name in names]
            held = [weights[name] for name in names]
            self.method.apply_fragments(fragments, held, slopes, states, group, scale)

    def update_whole(self, group: ParamGroup, names: list[str], weights: Flat, grads: Flat, scale: Tensor) -> None:
        """Steps whole tensors; those that do not lie at the beginning of a cache line in copies, one at a time."""
        moved = [name for name in names if not (is_aligned(weights[name]) and is_aligned(grads[name]))]
        self.run(group, [name for name in names if name not in moved], weights, grads, scale)
        for name in moved:
            copy = weights[name].clone()
            self.run(group, [name], {name: copy}, {name: grads[name].clone()}, scale)
            weights[name].copy_(copy)

    def update_chunk(
        self, groups: list[ParamGroup], names: list[str], weights: Flat, grads: Flat, scale: Tensor
    ) -> None:
        """Makes some cut tensors whole at their owners, steps them there and takes the pieces back."""
        pieces = {name: (grads[name], weights[name]) for name in names if name in weights}
        like = self.like.new_empty(0, dtype=self.stand_ins[names[0]].dtype)
        whole_grads, whole_weights = self.exchange.to_owners(names, pieces, like)
        for group in groups:
            here = [name for name in group["names"] if name in whole_weights]
            self.run(group, here, whole_weights, whole_grads, scale)
        self.exchange.to_holders(names, whole_weights, {name: weights[name] for name in pieces}, like)

    def by_dtype(self, names: list[str]) -> list[list[str]]:
        """Those of one dtype travel together."""
        found: dict[torch.dtype, list[str]] = {}
        for name in names:
            found.setdefault(self.stand_ins[name].dtype, []).append(name)
        return list(found.values())

    def run(self, group: ParamGroup, names: list[str], weights: Flat, grads: Flat, scale: Tensor) -> None:
        """`Method.apply` of whole tensors."""
        if names:
            shaped = [weights[name].view(self.shapes[name]) for name in names]
            whole_grads = [grads[name].view(self.shapes[name]) for name in names]
            slopes = [downhill(w, g, group["maximize"]) for w, g in zip(shaped, whole_grads, strict=True)]
            self.method.apply(names, shaped, slopes, [self.state_of(name) for name in names], group, scale)
