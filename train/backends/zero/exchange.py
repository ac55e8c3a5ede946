"""Cut tensors made whole: who owns which, and how the pieces travel to the owner and back.

Shards cut matrices anywhere, and a matrix rule needs all of one. So each cut matrix has an owner among the ranks that
hold a piece of it: the others send it their pieces of gradient and weight, it runs the rule and keeps the state, and
sends the new weights back. Whoever knows all pieces finds the same owners; nothing is negotiated.

Weights travel with the gradients, three words per entry where two would do (gradient there, update back). So the rule
that runs is the one that runs in one process, on whole weights in place, to the last bit.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from thriftlab.optim.core.fragments import Fragment
from thriftlab.optim.core.owners import Cost

CHUNK = 2**26  # entries of whole matrices that one rank has at once, with their gradients 512 MiB in fp32
LINE = 16  # entries of a cache line: where fp32 tensors begin that torch allocates


class Holder(NamedTuple):
    """A rank that holds the entries start to stop of a tensor."""

    rank: int
    start: int
    stop: int


class Ownership(NamedTuple):
    """Of each cut tensor that is to be whole, by name: who holds and who owns it; and which are whole together."""

    holders: dict[str, list[Holder]]
    owner: dict[str, int]
    chunks: list[list[str]]

    def sent(self, rank: int) -> int:
        """Entries that a rank sends in one step: gradient and weight to owners, weights to holders."""
        total = 0
        for name, holders in self.holders.items():
            elsewhere = {h.rank: h.stop - h.start for h in holders if h.rank != self.owner[name]}
            total += sum(elsewhere.values()) if self.owner[name] == rank else 2 * elsewhere.get(rank, 0)
        return total


def make_ownership(
    held: list[list[Fragment]],
    by_entry: Mapping[str, bool],
    costs: Mapping[str, Cost],
    chunk: int = CHUNK,
) -> Ownership:
    """Who owns what.

    Args:
        held: by rank, what it holds.
        by_entry: whether pieces of a tensor are stepped where they lie, by name.
        costs: of whole tensors, by name.
        chunk: entries that one rank may own in one chunk, if it is more than one tensor.

    The largest piece of work goes first, to whom has least to do of those whose state stays within
    total / ranks + the largest tensor's.
    """
    whole = {fragment.name: fragment for fragments in held for fragment in fragments}
    holders: dict[str, list[Holder]] = {name: [] for name in whole}
    busy, full = [0.0] * len(held), [0.0] * len(held)
    for rank, fragments in enumerate(held):
        for fragment in fragments:
            holders[fragment.name].append(Holder(rank, fragment.start, fragment.stop))
    cut = [name for name, some in holders.items() if len(some) > 1 and not by_entry[name]]
    for name in (name for name in holders if name not in cut):  # in one order on all ranks: these are sums of floats
        for rank, start, stop in holders[name]:
            share = (stop - start) / torch.Size(whole[name].shape).numel()
            busy[rank] += costs[name].work * share
            full[rank] += costs[name].state_bytes * share

    sizes = [cost.state_bytes for cost in costs.values()]
    bound = sum(sizes) / len(held) + max(sizes)
    owner: dict[str, int] = {}
    for name in sorted(cut, key=lambda name: (-costs[name].work, name)):
        some = [h.rank for h in holders[name]]
        least = min(some, key=full.__getitem__)
        free = [rank for rank in some if full[rank] + costs[name].state_bytes <= bound] or [least]
        owner[name] = chosen = min(free, key=lambda rank: (busy[rank], rank))
        busy[chosen] += costs[name].work
        full[chosen] += costs[name].state_bytes

    chunks: list[list[str]] = []
    load = [0] * len(held)
    for name, rank in owner.items():
        size = torch.Size(whole[name].shape).numel()
        if not chunks or (load[rank] and load[rank] + size > chunk):
            chunks.append([])
            load = [0] * len(held)
        chunks[-1].append(name)
        load[rank] += size
    return Ownership({name: holders[name] for name in owner}, owner, chunks)


class Exchange:
    """Carries pieces to owners and back. `sent` counts the entries that this rank has sent."""

    def __init__(self, ownership: Ownership, rank: int, world: int, group: dist.ProcessGroup | None = None):
        self.ownership, self.rank, self.world, self.group = ownership, rank, world, group
        self.sent = 0

    def to_owners(
        self, names: list[str], pieces: Mapping[str, tuple[Tensor, Tensor]], like: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sends a chunk's pieces (gradient, weight) to the owners.

        Returns gradients and weights by name, flat and whole, of what this rank owns.
        """
        holders, owner, _ = self.ownership
        mine = [name for name in names if owner[name] == self.rank]
        outgoing = [[t for n in names if owner[n] == r and n in pieces for t in pieces[n]] for r in self.others()]
        incoming = [
            [h.stop - h.start for n in mine for h in holders[n] if h.rank == r for _ in range(2)] for r in self.others()
        ]
        received = self.all_to_all(outgoing, incoming, like)
        sizes = [holders[name][-1].stop for name in mine]
        buffers = aligned(sizes + sizes, like)
        grads, weights = (dict(zip(mine, some, strict=True)) for some in (buffers[: len(mine)], buffers[len(mine) :]))
        for name in mine:
            for rank, start, stop in holders[name]:
                grad, weight = pieces[name] if rank == self.rank else (received[rank].pop(0), received[rank].pop(0))
                grads[name][start:stop].copy_(grad)
                weights[name][start:stop].copy_(weight)
        return grads, weights

    def to_holders(
        self, names: list[str], whole: Mapping[str, Tensor], weights: Mapping[str, Tensor], like: Tensor
    ) -> None:
        """Sends a chunk's new weights, flat and whole at their owners, back; `weights` are this rank's pieces."""
        holders, owner, _ = self.ownership
        outgoing = [
            [whole[n][h.start : h.stop] for n in names if n in whole for h in holders[n] if h.rank == r]
            for r in self.others()
        ]
        incoming = [[weights[n].numel() for n in names if owner[n] == r and n in weights] for r in self.others()]
        received = self.all_to_all(outgoing, incoming, like)
        for name in names:
            if name in weights and owner[name] != self.rank:
                weights[name].copy_(received[owner[name]].pop(0))
            elif name in weights:
                here = next(h for h in holders[name] if h.rank == self.rank)
                weights[name].copy_(whole[name][here.start : here.stop])

    def others(self) -> list[int | None]:
        """Ranks in their order; None in place of this one, which sends itself nothing."""
        return [None if rank == self.rank else rank for rank in range(self.world)]

    def all_to_all(self, outgoing: list[list[Tensor]], incoming: list[list[int]], like: Tensor) -> list[list[Tensor]]:
        """Sends tensors to each rank, flat, and returns those that each rank sent, whose sizes are known."""
        parts = [t for some in outgoing for t in some]
        message = torch.cat(parts) if parts else like.new_empty(0)
        answer = like.new_empty(sum(map(sum, incoming)))
        lengths = [sum(t.numel() for t in some) for some in outgoing]
        dist.all_to_all_single(answer, message, [sum(some) for some in incoming], lengths, group=self.group)
        self.sent += message.numel()
        flat = iter(answer.split([size for some in incoming for size in some]))
        return [[next(flat) for _ in some] for some in incoming]


def aligned(sizes: list[int], like: Tensor) -> list[Tensor]:
    """Uninitialised tensors of these sizes in one piece of memory, each at the beginning of a cache line."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // LINE) * LINE)
    memory = like.new_empty(starts[-1])
    return [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % (4 * LINE) == 0
