"""How gradients meet, are scaled and clipped, and who steps.

A backend owns the module that is called, the optimizer that steps and everything that ranks say to each other. The loop
and the step do not know which one runs. Scaling and clipping are the project's own and the same everywhere: gradients
arrive as sums over tokens, and `step` multiplies them once, by scale * min(1, max_norm / norm).
One surprise: DDP is told to add and not, as it likes to, to average.
"""

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thriftlab.train.errors import UserError

BACKENDS: dict[str, type["Backend"]] = {}


class Backend:
    """One process: the interface, and what it means without company."""

    name = "single"
    rank, world = 0, 1

    def __init_subclass__(cls) -> None:
        BACKENDS[cls.name] = cls

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool = False) -> None:
        """Take the model and its optimizer; afterwards `module` is what is called."""
        self.model, self.optimizer = model, optimizer
        warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
        self.module: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of one micro-batch; gradients need to meet at the last one only."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place."""
        return tensor

    @torch.no_grad()
    def step(self, scale: Tensor, max_norm: float | None) -> tuple[float, bool]:
        """Scale the summed gradients, clip, update, clear.

        Args:
            scale: scalar tensor, the inverse of the global denominator; NaN to refuse this step.
            max_norm: bound on the global norm of the scaled gradient.

        Returns:
            The norm before clipping, and whether the update was applied: a norm that is not finite leaves everything as
            it was, on all ranks.
        """
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads).to(scale) * scale
        factor = scale if max_norm is None else scale * (max_norm / norm).clamp(max=1.0)
        applied = bool(norm.isfinite())
        if applied:
            torch._foreach_mul_(grads, factor.to(grads[0].dtype))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item(), applied

    def close(self) -> None:
        """Leave the group."""


BACKENDS[Backend.name] = Backend


class DDP(Backend):
    """Replicas that sum their gradients (torch's DistributedDataParallel): nccl on GPUs, gloo on CPUs."""

    name = "ddp"

    def __init__(self) -> None:
        super().__init__()
        if "RANK" not in os.environ:
            raise BackendError("backend ddp needs torchrun: torchrun --nproc_per_node 2 -m thriftlab.launch train ...")
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        collectives = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(collectives, timeout=timedelta(minutes=10))
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool = False) -> None:
        super().prepare(model, optimizer, compiled)
        ids = [self.device.index] if self.device.type == "cuda" else None
        self.module = self.replica = DistributedDataParallel(self.module, device_ids=ids, gradient_as_bucket_view=True)
        self.replica.register_comm_hook(None, sum_gradients)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.replica.no_sync()

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def close(self) -> None:
        dist.destroy_process_group()


def sum_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook: all-reduce with addition and no division."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


class BackendError(UserError):
    """A backend that cannot run here; says why and what can."""


def make_backend(name: str) -> Backend:
    """The named backend; "auto" is ddp under torchrun and single otherwise."""
    if name == "auto":
        name = "ddp" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "single"
    if name == "single" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BackendError("backend 'single' was started on several ranks by torchrun; use backend.name=ddp")
    return BACKENDS[name]()
