"""What ranks import, imported once by the process that they are forked from."""

import importlib.util

import pytest  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

from thriftlab.train import loop  # noqa: F401
from thriftlab.train.backends.zero.engine import load_deepspeed

if torch.version.cuda is None and importlib.util.find_spec("deepspeed"):  # with CUDA each process chooses for itself
    load_deepspeed(cuda=False)
