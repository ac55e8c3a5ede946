"""How ranks work together: the backends by name."""

import os
from typing import Any

from thriftlab.data.errors import BackendError
from thriftlab.train.backends.base import Backend
from thriftlab.train.backends.ddp import DDP
from thriftlab.train.backends.owned import Owned
from thriftlab.train.backends.zero.engine import DeepSpeed

BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (Backend, DDP, Owned, DeepSpeed)}


def make_backend(name: str, **options: Any) -> Backend:
    """The named backend; "auto" is ddp under torchrun and single otherwise."""
    if name == "auto":
        name = "ddp" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "single"
    if name == "single" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BackendError("backend 'single' was started on several ranks by torchrun; use backend.name=ddp")
    return BACKENDS[name](**options)
