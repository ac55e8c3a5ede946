"""How ranks work together: the backends by name."""

from typing import Any

from thriftlab.data.errors import BackendError
from thriftlab.train.backends.base import Backend
from thriftlab.train.backends.ddp import DDP
from thriftlab.train.backends.device import warn_of_idle_gpu
from thriftlab.train.backends.environment import read_environment
from thriftlab.train.backends.fsdp2 import FSDP2
from thriftlab.train.backends.owned import Owned
from thriftlab.train.backends.zero.engine import DeepSpeed

BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (Backend, DDP, Owned, FSDP2, DeepSpeed)}


def make_backend(name: str, device: str = "auto", **options: Any) -> Backend:
    """The named backend; "auto" is ddp under torchrun and single otherwise."""
    rank, world, _ = read_environment()
    if name == "auto":
        name = "ddp" if world > 1 else "single"
    if name == "single" and world > 1:
        raise BackendError("backend 'single' was started on several ranks by torchrun; use backend.name=ddp")
    if rank == 0:
        warn_of_idle_gpu(device)
    return BACKENDS[name](device=device, **options)
