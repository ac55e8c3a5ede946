"""DeepSpeed's ZeRO (1910.02054), stages 0 to 3, unmodified, under any method, and equal to one process.

    0  every rank holds all          1  the state is sharded
    2  and the gradients             3  and the weights

The engine runs forward, backward and the reduction of gradients. Its optimizer is ours (optimizer.py), and what it
would do beyond, clipping, loss scaling, checkpoints, is switched off: the project's own is the same for all backends.

Weights and gradients stay fp32 under bf16, which is an autocast of the products alone. So stages 0 to 3 give the same
bits there, too.
"""

import logging
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from thriftlab.data.errors import BackendError
from thriftlab.train.backends.base import as_method
from thriftlab.train.backends.device import choose_device
from thriftlab.train.backends.pieces import Piece, Pieces
from thriftlab.train.backends.zero.exchange import CHUNK
from thriftlab.train.backends.zero.holdings import Sharded
from thriftlab.train.backends.zero.layout import VERSION
from thriftlab.train.backends.zero.optimizer import ShardedMethod
from thriftlab.train.backends.zero.settings import refuse_unknown

BF16 = "weights and gradients stay fp32; use train.precision=bf16"
OFFLOAD = "owners could not step what is not on their device; use a higher stage, or a method with less state"
DENSE = "fragments of experts and of sliced tensors are not known here; use a dense model, whole on every rank"
SUMS = "gradients must arrive as sums over tokens; leave it out, and set train.batch_size and train.micro_batch_size"
REFUSED = {  # keys of DeepSpeed's JSON: why, and the nearest that works
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "amp"), BF16),
    **dict.fromkeys((f"zero_optimization.{k}" for k in ("offload_optimizer", "offload_param")), OFFLOAD),
    **dict.fromkeys((f"zero_optimization.{k}" for k in ("cpu_offload", "cpu_offload_param")), OFFLOAD),
    **dict.fromkeys(("expert_parallel", "tensor_parallel", "sequence_parallel_size"), DENSE),
    **dict.fromkeys(("train_batch_size", "gradient_accumulation_steps"), SUMS),
    **dict.fromkeys(("prescale_gradients", "gradient_predivide_factor"), SUMS),
    "communication_data_type": "sums over ranks are taken in fp32; leave it out",
    "checkpoint": "DeepSpeed's own, universal ones included, lose the method's state; resume the run itself",
    "elasticity": "DeepSpeed has removed it; resume the run on another number of ranks",
    "optimizer": "the method is the run's own; use optim.name",
    "scheduler": "the method's rates are the run's own; use optim.lr and schedule",
}


class DeepSpeed(Sharded):
    """DeepSpeed's engine.

    Args:
        stage: 0, 1, 2 or 3.
        settings: further keys of DeepSpeed's JSON configuration.
    """

    name = "deepspeed"
    has_bill = False
    why_fp32 = (
        "without a bf16 section DeepSpeed takes fp32 parameters only, and with one it keeps masters of its own, which "
        "it rounds to nearest; use backend.name=owned or backend.name=fsdp2"
    )
    sharded: ShardedMethod
    chunk = CHUNK  # entries of whole matrices that one rank has at once beside its own

    def __init__(self, stage: int = 1, settings: dict[str, Any] | None = None, device: str = "auto"):
        self.stage, self.settings = stage, settings or {}
        config = merged(engine_settings(stage, "fp32"), self.settings)
        load_deepspeed(cuda=choose_device(device).type == "cuda")
        refuse_unknown(config)  # before ranks meet
        super().__init__(device)

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool = False, precision: str = "fp32"
    ) -> None:
        import deepspeed

        super().prepare(model, optimizer)
        self.sharded = ShardedMethod(as_method(optimizer, self.name), model, self.chunk)
        config = merged(engine_settings(self.stage, precision), self.settings)
        if self.device.type == "cuda":
            config = overlapped(config)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.sharded, config=config)
        self.sharded.attach(self.engine)
        self.module = self.engine
        if compiled:
            self.engine.compile()

    def micro_batch(self, last: bool) -> AbstractContextManager:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, scale: Tensor, max_norm: float | None) -> tuple[Tensor, Tensor]:
        sharded = self.sharded
        sharded.scale, sharded.max_norm = scale * self.averaged, max_norm
        sharded.norm = torch.full_like(scale, torch.nan)  # what it stays if DeepSpeed skips a step by itself
        self.engine.step()
        self.factor = sharded.factor / self.averaged  # as `gradients` shows them
        return sharded.norm, sharded.norm.isfinite()

    @property
    def averaged(self) -> int:
        """By how much gradients have been divided: ZeRO-3 cannot but average over ranks."""
        return self.world if self.stage == 3 else 1

    def weights(self) -> Pieces:
        layout = self.sharded.layout
        return super().weights() if layout is None else self.laid_out(layout.flat.detach())

    def gradients(self) -> Pieces:
        if self.sharded.layout is None:
            return super().gradients()
        parts = self.engine.optimizer.averaged_gradients[0]
        return self.laid_out(torch.cat([part.flatten() for part in parts]) * self.averaged)

    def laid_out(self, flat: Tensor) -> Pieces:
        layout = self.sharded.layout
        assert layout is not None
        places = layout.places
        return {n: Piece(places[n][0].shape, places[n][0].start, t) for n, t in layout.views(flat).items()}

    def put_weights(self, value: Callable[[str, Piece], Tensor]) -> None:
        super().put_weights(value)
        self.publish()

    def publish(self) -> None:
        """Bring the master weights of all ranks into the model."""
        zero = self.engine.optimizer
        if self.stage == 3:
            zero._partition_all_parameters()  # what is gathered already would be thought to be new
            zero._reassign_or_swap_out_partitioned_parameters(0)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        elif self.stage:
            zero.update_lp_params()


def load_deepspeed(cuda: bool) -> None:
    """Import DeepSpeed, without its noise and without what it would compile. BackendError if it is not there."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    try:
        import deepspeed
        from deepspeed.utils import logger
    except ImportError as error:
        raise BackendError(
            f"backend deepspeed needs the package deepspeed {VERSION}: pip install 'thriftlab[train]'; or use "
            "backend.name=owned"
        ) from error
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*_tensor. is deprecated")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, for inference only


def engine_settings(stage: int, precision: str) -> dict[str, Any]:
    """What the engine is told: sums where it can, no clipping (its default is 1.0), no norm where it can do without."""
    zero: dict[str, Any] = {"stage": stage, "round_robin_gradients": False, "compute_grad_norm": stage not in (1, 2)}
    if stage == 3:
        zero["sub_group_size"] = 2**62  # one group
    return {
        "train_micro_batch_size_per_gpu": 1,  # of no consequence: batches are the trainer's
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": "fp32"},
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


def overlapped(config: dict[str, Any]) -> dict[str, Any]:
    """At stages 1 and 2 gradients are reduced during backward, unless the configuration says otherwise. That takes two
    buffers, which are 2 GB each in fp32 if nobody says how many entries they have."""
    zero = config["zero_optimization"]
    if zero["stage"] not in (1, 2):
        return config
    return {**config, "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 2**26, **zero}}


def merged(ours: dict[str, Any], theirs: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Both, one inside the other. BackendError for a key of theirs that is ours, or that cannot be used here."""
    result = dict(ours)
    for key, value in theirs.items():
        if path + key in REFUSED and is_off(value):
            continue
        if reason := REFUSED.get(path + key):
            raise BackendError(f"backend.settings cannot set {path}{key}: {reason}")
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            result[key] = merged(ours[key], value, f"{path}{key}.")
        elif key in ours:
            raise BackendError(f"backend.settings cannot set {path}{key}: the backend sets it, to {ours[key]!r}")
        else:
            result[key] = value
    return result


def is_off(section: Any) -> bool:
    """Whether a section of DeepSpeed's JSON switches off what it is about, as files that were made for others do."""
    return isinstance(section, dict) and (section.get("enabled") is False or section.get("device") == "none")
