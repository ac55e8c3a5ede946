"""Owned: every parameter has one rank that steps it, whole. ZeRO-1's and ZeRO-2's saving (1910.02054) for any method.

    each micro-batch    every rank computes all gradients
    the last one        during backward each gradient is summed on the rank that owns it, and freed elsewhere
    step                owners scale, clip and update; the state exists on the owner only
    then                each owner sends its weights to the others

A rule sees whole matrices, so nothing about it changes; a choice over a group (which blocks are active) depends on
names alone. The norm is bitwise that of one process: the norms of the tensors are gathered, in the order of the
parameters, where a sum of the owners' squares would add in another order.

Ranks must begin the sums in one order, and so cannot ask, while they go backward, which gradients there will be. They
expect those of the step before, count what is missing as zero, and settle the difference afterwards.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thriftlab.optim.core.bill import predicted_state_parts
from thriftlab.optim.core.owners import assign
from thriftlab.optim.state.storage import wide
from thriftlab.train.backends.base import Backend, as_method
from thriftlab.train.backends.norms import norms_of
from thriftlab.train.backends.optim_state import unpack_optimizer
from thriftlab.train.backends.pieces import TensorReader
from thriftlab.train.backends.ranks import Distributed

BUCKET = 2**22  # entries that travel together; a tensor that is larger travels alone
IN_FLIGHT = 4  # buckets


class Bucket(NamedTuple):
    """Parameters of one owner and one dtype that travel together."""

    owner: int
    parameters: list[Tensor]


class Travel:
    """Sends something of every parameter, bucket by bucket in the given order, a few of them at a time."""

    def __init__(
        self,
        buckets: Iterable[Bucket],
        pack: Callable[[Tensor], Tensor],
        send: Callable[[Tensor, int], Any],
        unpack: Callable[[Tensor, Tensor], Any],
    ):
        self.waiting, self.flying = deque(buckets), deque[tuple[Any, Tensor, list[Tensor]]]()
        self.pack, self.send, self.unpack = pack, send, unpack

    def depart(self) -> None:
        if len(self.flying) == IN_FLIGHT:
            self.land()
        owner, parameters = self.waiting.popleft()
        flat = torch.cat([self.pack(p).reshape(-1) for p in parameters])
        self.flying.append((self.send(flat, owner), flat, parameters))

    def land(self) -> None:
        work, flat, parameters = self.flying.popleft()
        work.wait()
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            self.unpack(p, part.view(p.shape))

    def finish(self) -> None:
        while self.waiting:
            self.depart()
        while self.flying:
            self.land()


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
        for name in named:
            if not self.owns(name):
                self.method.state.pop(named[name], None)  # its low bits
        self.mine = {p for name, p in named.items() if self.owners.get(name) == self.rank}
        self.has_gradient: set[Tensor] = {p for name, p in named.items() if name in self.owners}  # in the last step
        self.sums: Travel | None = None  # of gradients, during the last backward of a step
        self.host = dist.new_group(backend="gloo") if self.device.type == "cuda" else None
        for p in self.has_gradient:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self.depart)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if last:
            self.ready, self.found = set[Tensor](), set[Tensor]()
            self.sums = self.sum_gradients(self.has_gradient)
        yield
        if last:
            self.finish_sums()

    def sum_gradients(self, parameters: set[Tensor]) -> Travel:
        """Each gradient to its owner, in fp32, whatever it is kept in. Those come first whose gradients do: of the last
        parameters."""

        def take(p: Tensor) -> Tensor:
            if p.grad is None:
                return torch.zeros_like(p, dtype=wide(p.dtype))
            self.found.add(p)
            return p.grad.to(wide(p.dtype))

        def keep_own(p: Tensor, total: Tensor) -> None:
            if p not in self.mine:
                p.grad = None
            elif p.grad is None:
                p.grad = total.to(p.grad_dtype, copy=True)
            else:
                p.grad.copy_(total)

        place: dict[Tensor, int] = {p: i for i, p in enumerate(self.parameters)}
        order = sorted(self.present(parameters), key=lambda bucket: -place[bucket.parameters[0]])
        return Travel(order, take, lambda flat, owner: dist.reduce(flat, owner, async_op=True), keep_own)

    @torch.no_grad()
    def depart(self, p: Tensor) -> None:
        """The gradient of `p` is complete: sends the buckets that are, up to the first that is not."""
        if self.sums is None:
            return
        self.ready.add(p)
        while self.sums.waiting and self.ready.issuperset(self.sums.waiting[0].parameters):
            self.sums.depart()

    @torch.no_grad()
    def finish_sums(self) -> None:
        """Every gradient is summed on its owner. One that no rank has stays None, as with one process."""
        assert self.sums is not None
        self.sums.finish()
        self.sums = None
        late = {p for p in self.parameters if p not in self.has_gradient and p.grad is not None}
        has = torch.tensor([p in self.found or p in late for p in self.parameters], dtype=torch.uint8)
        dist.all_reduce(has, dist.ReduceOp.MAX, self.host)
        has_gradient: set[Tensor] = {p for p, there in zip(self.parameters, has.tolist(), strict=True) if there}
        for p in self.has_gradient - has_gradient:
            p.grad = None
        self.sum_gradients(has_gradient - self.has_gradient).finish()
        self.has_gradient = has_gradient

    def present(self, parameters: set[Tensor]) -> list[Bucket]:
        """The buckets of some parameters."""
        buckets = [Bucket(owner, [p for p in bucket if p in parameters]) for owner, bucket in self.buckets]
        return [bucket for bucket in buckets if bucket.parameters]

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        mine = [p for p in self.parameters if p.grad is not None]  # the parameters of `grads`
        norms = dict(zip(mine, norms_of(grads), strict=True))
        nothing = torch.zeros((), device=self.device, dtype=wide(self.parameters[0].dtype))
        each = [norms.get(p, nothing).to(nothing) for p in self.parameters if p in self.has_gradient]
        return torch.linalg.vector_norm(self.sum(torch.stack(each)))

    def update(self, applied: Tensor | None = None) -> None:
        super().update(applied)
        Travel(
            self.present(self.has_gradient),
            pack=lambda p: p.detach() if p in self.mine else torch.empty_like(p),
            send=lambda flat, owner: dist.broadcast(flat, owner, async_op=True),
            unpack=lambda p, new: None if p in self.mine else p.detach().copy_(new),
        ).finish()

    def owns(self, name: str) -> bool:
        """Whether this rank steps a parameter, and has its state."""
        return self.owners.get(name) == self.rank

    def saves(self, key: str) -> bool:
        name = key if key in self.owners else key.rpartition("/")[0]
        return self.owners.get(name, 0) == self.rank

    def load_states(self, states: TensorReader, options: dict[str, Any]) -> None:
        unpack_optimizer(self.optimizer, states, options, self.owns)

    def predicted_state_parts(self) -> dict[str, int]:
        return predicted_state_parts(self.method, self.owns)

    def summed_entries(self, name: str, p: Tensor) -> int:
        return p.numel() if self.owns(name) else 0


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
