"""What the ranks of a run say to each other; one process alone is answered at once."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thriftlab.data.errors import BackendError
from thriftlab.train.backends.channel import ALONE, Channel, share
from thriftlab.train.backends.device import choose_device, choose_own_device
from thriftlab.train.backends.environment import TORCHRUN, meeting_point, read_environment
from thriftlab.train.backends.rendezvous import meet


class Ranks:
    """One process: the interface, and what it means without company."""

    name: str
    rank, world = 0, 1

    def __init__(self, device: str = "auto") -> None:
        self.device = choose_device(device)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows [rows, ...] of all ranks in the order of the global batch: row i of rank r is its i * world + r."""
        return tensor

    def share(self, value: Any) -> list[Any]:
        """Small values of all ranks, in their order."""
        return [value]

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """The tensor of rank `source`, in place of every rank's."""

    def channel(self) -> Channel:
        """A way of its own to share, which a thread may use while training goes on."""
        return ALONE

    def close(self) -> None:
        """Leave the group."""


class Distributed(Ranks):
    """Ranks that torchrun started: nccl on GPUs, gloo on CPUs. Each backend of several ranks is one of these."""

    can_layerwise = False

    def __init__(self, device: str = "auto") -> None:
        self.rank, self.world, local_rank = read_environment()
        if "RANK" not in os.environ:
            raise BackendError(f"backend {self.name} needs torchrun: {TORCHRUN}")
        host, port = meeting_point()
        self.device = choose_own_device(device, local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        collectives = "nccl" if self.device.type == "cuda" else "gloo"
        store = meet(host, port, self.rank, self.world)
        dist.init_process_group(collectives, store=store, rank=self.rank, world_size=self.world)

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        ranks = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(ranks, tensor.contiguous())
        return torch.stack(ranks, 1).flatten(0, 1)

    def share(self, value: Any) -> list[Any]:
        return share(value)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        dist.broadcast(tensor, source)

    def channel(self) -> Channel:
        group = dist.new_group(backend="gloo")
        return Channel(self.rank, lambda value: share(value, group))

    def close(self) -> None:
        dist.destroy_process_group()
