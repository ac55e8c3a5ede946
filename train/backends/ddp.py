"""Replicas that sum their gradients: torch's DistributedDataParallel, told to add and not, as it would, to average."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thriftlab.optim.state.storage import wide
from thriftlab.train.backends.base import Backend
from thriftlab.train.backends.ranks import Distributed


class DDP(Distributed, Backend):
    """Every rank holds and steps everything, alike."""

    name = "ddp"
    one_dtype = True  # of the reducer's buckets
    replica: DistributedDataParallel

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool = False, precision: str = "fp32"
    ) -> None:
        super().prepare(model, optimizer, compiled)
        ids = [self.device.index] if self.device.type == "cuda" else None
        self.module = self.replica = DistributedDataParallel(
            self.module, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )
        self.replica.register_comm_hook(None, sum_gradients)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.replica.no_sync()

    def close(self) -> None:
        """The reducer goes before the group. As the last to hold it, it would join gloo's threads with the interpreter
        locked, for which one of them may just be waiting (pytorch issue 56297): a process that never ends."""
        if hasattr(self, "replica"):
            del self.replica.reducer, self.replica.logger
        super().close()


def sum_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook: all-reduce with addition and no division, in fp32; bf16 gradients are rounded once."""
    kept = bucket.buffer()
    total = kept.to(wide(kept.dtype))
    work = dist.all_reduce(total, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: kept.copy_(future.value()[0]))
