"""Owned: every parameter has one rank that steps it, whole. ZeRO-1's and ZeRO-2's saving (1910.02054) for any method.

    each micro-batch    every rank computes all gradients
    the last one        each gradient is summed on the rank that owns it, and freed elsewhere
    step                owners scale, clip and update; the state exists on the owner only
    then                each owner sends its weights to the others

A rule sees whole matrices, so nothing about it changes; a choice over a group (which blocks are active) depends on
names alone. The norm is bitwise that of one process: the norms of the tensors are gathered, in the order of the
parameters, where a sum of the owners' squares would add in another order.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thriftlab.optim import predicted_state_bytes
from thriftlab.optim.core.owners import assign
from thriftlab.train.backends.base import Backend, as_method
from thriftlab.train.backends.optim_state import unpack_optimizer
from thriftlab.train.backends.pieces import TensorReader
from thriftlab.train.backends.ranks import Distributed

BUCKET = 2**22  # entries that travel together; a tensor that is larger travels alone
IN_FLIGHT = 4  # buckets


class Bucket(NamedTuple):
    """Parameters of one owner and one dtype that travel together."""

    owner: int
    parameters: list[Tensor]


class Owned(Distributed, Backend):
    """Whole parameters by turns: reduced to their owners, updated there, broadcast."""

    name = "owned"

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool = False, precision: str = "fp32"
    ) -> None:
        super().prepare(model, optimizer, compiled)
        self.method = as_method(optimizer, self.name)
        self.owners = assign(self.method.costs(), self.world)
        named = dict(model.named_parameters())
        self.buckets = make_buckets([(self.owners[name], p) for name, p in named.items() if name in self.owners])
        self.mine = {p for name, p in named.items() if self.owners.get(name) == self.rank}

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        yield
        if last:
            self.sum_gradients()

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Every gradient summed on its owner. One that no rank has stays None, as with one process."""
        has = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.uint8, device=self.device)
        dist.all_reduce(has, dist.ReduceOp.MAX)
        self.has_gradient = {p for p, there in zip(self.parameters, has.tolist(), strict=True) if there}

        def keep_own(p: Tensor, total: Tensor) -> None:
            if p not in self.mine:
                p.grad = None
            elif p.grad is None:
                p.grad = total.clone()
            else:
                p.grad.copy_(total)

        self.travel(
            pack=lambda p: torch.zeros_like(p) if p.grad is None else p.grad,
            send=lambda flat, owner: dist.reduce(flat, owner, async_op=True),
            unpack=keep_own,
        )

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        place = {p: i for i, p in enumerate(p for p in self.parameters if p in self.has_gradient)}
        norms = torch.zeros(len(place), device=self.device, dtype=self.parameters[0].dtype)
        if grads:
            mine = [place[p] for p in place if p.grad is not None]  # the parameters of `grads`
            norms[mine] = torch.stack(torch._foreach_norm(grads)).to(norms)
        return torch.linalg.vector_norm(self.sum(norms))

    def update(self, applied: Tensor | None = None) -> None:
        super().update(applied)
        self.travel(
            pack=lambda p: p.detach() if p in self.mine else torch.empty_like(p),
            send=lambda flat, owner: dist.broadcast(flat, owner, async_op=True),
            unpack=lambda p, new: None if p in self.mine else p.detach().copy_(new),
        )

    def travel(
        self,
        pack: Callable[[Tensor], Tensor],
        send: Callable[[Tensor, int], Any],
        unpack: Callable[[Tensor, Tensor], Any],
    ) -> None:
        """Sends something of every parameter that has a gradient, bucket by bucket, a few of them at a time."""
        flying: deque[tuple[Any, Tensor, list[Tensor]]] = deque()

        def land() -> None:
            work, flat, parameters = flying.popleft()
            work.wait()
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                unpack(p, part.view(p.shape))

        for owner, parameters in self.buckets:
            present = [p for p in parameters if p in self.has_gradient]
            if present:
                flat = torch.cat([pack(p).reshape(-1) for p in present])
                flying.append((send(flat, owner), flat, present))
            if len(flying) == IN_FLIGHT:
                land()
        while flying:
            land()

    def owns(self, name: str) -> bool:
        """Whether this rank steps a parameter, and has its state."""
        return self.owners.get(name) == self.rank

    def saves(self, key: str) -> bool:
        name = key if key in self.owners else key.rpartition("/")[0]
        return self.owners.get(name, 0) == self.rank

    def load_states(self, states: TensorReader, options: dict[str, Any]) -> None:
        unpack_optimizer(self.optimizer, states, options, self.owns)

    def predicted_state_bytes(self) -> int:
        return predicted_state_bytes(self.method, self.owns)


def make_buckets(owned: list[tuple[int, Tensor]]) -> list[Bucket]:
    """The parameters in buckets of up to BUCKET entries, owners by turns, so that all of them receive at once."""
    by_owner: dict[tuple[int, torch.dtype], list[list[Tensor]]] = {}
    for owner, p in owned:
        buckets = by_owner.setdefault((owner, p.dtype), [[]])
        if buckets[-1] and sum(q.numel() for q in buckets[-1]) + p.numel() > BUCKET:
            buckets.append([])
        buckets[-1].append(p)
    turns = [(turn, owner, bucket) for (owner, _), rows in by_owner.items() for turn, bucket in enumerate(rows)]
    return [Bucket(owner, bucket) for _, owner, bucket in sorted(turns, key=lambda item: item[:2])]
