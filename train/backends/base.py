"""How gradients meet, are scaled and clipped, and who steps.

A backend owns the module that is called, the optimizer that steps and everything that ranks say to each other. The loop
and the step do not know which one runs. Scaling and clipping are the project's own and the same everywhere: gradients
arrive as sums over tokens, and `step` multiplies them once, by scale * min(1, max_norm / norm).
What a rank holds it shows as pieces (pieces.py) under the names of the parameters: checkpoints and the witness need no
more. One surprise: DDP is told to add and not, as it likes to, to average.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thriftlab.data.errors import UserError
from thriftlab.optim import Method, predicted_state_bytes
from thriftlab.optim.state.storage import prune
from thriftlab.train.backends import channel
from thriftlab.train.backends.channel import Channel
from thriftlab.train.backends.layerwise import Layerwise
from thriftlab.train.backends.optim_state import pack_optimizer, unpack_optimizer
from thriftlab.train.backends.pieces import Piece, Pieces, Source, read_whole, whole
from thriftlab.train.backends.rendezvous import meet

BACKENDS: dict[str, type["Backend"]] = {}


class Backend:
    """One process: the interface, and what it means without company."""

    name = "single"
    rank, world = 0, 1
    layerwise: Layerwise | None = None
    whole_weights = True  # whether every rank has every weight, uncut
    can_layerwise = True  # whether a gradient is whole inside of backward, see `update_in_backward`

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            BACKENDS[cls.name] = cls

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool = False, precision: str = "fp32"
    ) -> None:
        """Take the model and its optimizer; afterwards `module` is called, in autocast if `precision` is bf16."""
        self.model, self.optimizer, self.parameters = model, optimizer, list(model.parameters())
        warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
        self.module: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]

    def update_in_backward(self) -> None:
        """Use each gradient as soon as it is complete; what goes on between ranks does not allow it."""
        assert isinstance(self.optimizer, Method)
        self.layerwise = Layerwise(self.model, self.optimizer)

    def begin(self, denominator: Tensor) -> None:
        """A step begins, of sums that are divided by `denominator` on this rank, a 0-dim tensor that may grow in place
        until the last backward."""
        self.denominator = denominator

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of one micro-batch; gradients need to meet at the last one only."""
        return self.layerwise.armed() if self.layerwise and last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        if self.layerwise:
            self.layerwise.scale = 1 / self.denominator
        loss.backward()

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
        return channel.ALONE

    @torch.no_grad()
    def step(self, scale: Tensor, max_norm: float | None) -> tuple[float, bool]:
        """Scale the summed gradients, clip, update, clear.

        Args:
            scale: scalar tensor, the inverse of the global denominator; NaN to refuse this step.
            max_norm: bound on the global norm of the scaled gradient.

        Returns:
            The norm before clipping, and whether the update was applied: a norm that is not finite leaves everything as
            it was, on all ranks. `factor` is what gradients were multiplied by.
        """
        if self.layerwise:
            return self.layerwise.finish(scale), True
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = self.total_norm(grads).to(scale) * scale
        self.factor = clip_factor(norm, scale, max_norm)
        applied = bool(norm.isfinite())
        if applied:
            if grads:
                torch._foreach_mul_(grads, self.factor.to(grads[0].dtype))
            self.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item(), applied

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        """The norm over all ranks; `grads` are what this rank has of the summed gradients."""
        return nn.utils.get_total_norm(grads)

    def update(self) -> None:
        """Every rule runs once over all ranks, or alike on all; afterwards every rank has the weights that it uses."""
        self.optimizer.step()

    def forget(self, shares: Mapping[str, float]) -> None:
        """Between two steps, by parameter: all of its state (1), or a share of its moments' entries, the smallest."""
        for group in self.optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                if shares.get(name) == 1:
                    self.optimizer.state.pop(p, None)
                elif name in shares:
                    prune(self.optimizer.state.get(p, {}), shares[name])

    # What this rank holds, replicas of what other ranks hold included, all of it in the precision that is stepped.

    def weights(self) -> Pieces:
        """Of the parameters, by name."""
        return {name: whole(p) for name, p in self.model.named_parameters()}

    def states(self) -> Pieces:
        """Of the optimizer's state, by "parameter/key". A scalar is held by every rank that has some of its tensor."""
        return {key: whole(tensor) for key, tensor in pack_optimizer(self.optimizer)[0].items()}

    def gradients(self) -> Pieces:
        """Between the last `backward` and `step`: of the gradients, summed over ranks and tokens and not yet scaled."""
        return {name: whole(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}

    def owns(self, name: str) -> bool:
        """Whether this rank has the state of a parameter."""
        return True

    def answers(self, key: str) -> bool:
        """Whether this rank is the one that saves its piece `key`; over all ranks every entry exactly once.

        Of a parameter, of a state ("parameter/key") or of something of a group.
        """
        return self.rank == 0

    def options(self) -> dict[str, Any]:
        """What a checkpoint needs beside the states: JSON, the same on every rank."""
        return pack_optimizer(self.optimizer)[1]

    def load(self, weights: Source, states: Source, options: dict[str, Any]) -> None:
        """Take what this rank holds from a checkpoint of any backend, stage and world size."""
        self.put_weights(lambda name, piece: weights.read(name, piece.start, piece.stop))
        unpack_optimizer(self.optimizer, {key: read_whole(states, key) for key in states.shapes}, options)

    def predicted_state_bytes(self) -> int:
        """Bytes of state that this rank keeps, by the method's `spec`."""
        assert isinstance(self.optimizer, Method)
        return predicted_state_bytes(self.optimizer)

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, `params` with the shapes of whole parameters (on the meta device will do)."""
        return self.optimizer.param_groups

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps inside start from the present weights and an empty state, and are undone: every bit is as it was."""
        optimizer = self.optimizer
        weights = {name: piece.tensor.to("cpu", copy=True) for name, piece in self.weights().items()}
        groups = [dict(group) for group in optimizer.param_groups]
        states, optimizer.state = optimizer.state, type(optimizer.state)(dict)
        try:
            yield
        finally:
            optimizer.state = states
            for group, old in zip(optimizer.param_groups, groups, strict=True):
                group.update(old)
            self.put_weights(lambda name, piece: weights[name])

    def put_weights(self, value: Callable[[str, Piece], Tensor]) -> None:
        """Overwrite what this rank holds of the parameters; `value(name, piece)` is flat, as the piece is."""
        for name, piece in self.weights().items():
            piece.tensor.copy_(value(name, piece))

    def close(self) -> None:
        """Leave the group."""


BACKENDS[Backend.name] = Backend


def clip_factor(norm: Tensor, scale: Tensor, max_norm: float | None) -> Tensor:
    """What summed gradients are multiplied by; `norm` is that of the scaled gradient."""
    return scale if max_norm is None else scale * (max_norm / norm).clamp(max=1.0)


class Group(Backend):
    """Ranks that talk: nccl on GPUs, gloo on CPUs. Each backend of several ranks is one of these."""

    can_layerwise = False

    def __init__(self) -> None:
        super().__init__()
        if "RANK" not in os.environ:
            raise BackendError(
                f"backend {self.name} needs torchrun: torchrun --nproc_per_node 2 -m thriftlab.launch train ..."
            )
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        collectives = "nccl" if self.device.type == "cuda" else "gloo"
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = meet(self.rank, self.world)
        dist.init_process_group(collectives, store=store, rank=self.rank, world_size=self.world)

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        ranks = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(ranks, tensor.contiguous())
        return torch.stack(ranks, 1).flatten(0, 1)

    def share(self, value: Any) -> list[Any]:
        return channel.share(value)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        dist.broadcast(tensor, source)

    def channel(self) -> Channel:
        group = dist.new_group(backend="gloo")
        return Channel(self.rank, lambda value: channel.share(value, group))

    def close(self) -> None:
        dist.destroy_process_group()


class DDP(Group):
    """Replicas that sum their gradients (torch's DistributedDataParallel)."""

    name = "ddp"
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
    """DDP communication hook: all-reduce with addition and no division."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


class BackendError(UserError):
    """A backend that cannot run here; says why and what can."""


def as_method(optimizer: torch.optim.Optimizer, backend: str) -> Method:
    """The optimizer, if its parameters can be stepped on different ranks; else BackendError."""
    if not isinstance(optimizer, Method):
        raise BackendError(
            f"backend {backend} has each rank step a part of the model, and {type(optimizer).__name__} does not "
            "promise that its parameters can be stepped apart; make it a thriftlab.optim.Method, or use "
            "backend.name=ddp"
        )
    return optimizer


def make_backend(name: str, **options: Any) -> Backend:
    """The named backend; "auto" is ddp under torchrun and single otherwise."""
    if name == "auto":
        name = "ddp" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "single"
    if name == "single" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BackendError("backend 'single' was started on several ranks by torchrun; use backend.name=ddp")
    return BACKENDS[name](**options)
