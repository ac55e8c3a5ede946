"""What ranks import, imported once by the process that they are forked from."""

import importlib.util
import os

import numpy.ma  # noqa: F401
import pytest  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

from thriftlab.train import loop  # noqa: F401
from thriftlab.train.backends.zero.engine import load_deepspeed
from thriftlab.train.config.schema import RunConfig

os.fsync = lambda descriptor: None  # as in conftest.py
RunConfig()  # makes the models of the methods' hyper-parameters

if torch.version.cuda is None and importlib.util.find_spec("deepspeed"):  # with CUDA each process chooses for itself
    load_deepspeed(cuda=False)
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # every engine does, and it imports a compiler
