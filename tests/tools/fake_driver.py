"""Launchers without a GPU: triton's own launch path, up to the driver, which is a stand-in that knows an architecture.

    with fake_driver(90) as launches:
        launcher(...)                 # on CPU tensors
    launches[0].kernel, launches[0].grid, launches[0].compiled

So a kernel is specialised as on a GPU, by dtypes, by which addresses and numbers are multiples of 16, and is compiled.
Only where triton does not interpret.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

PROPERTIES = {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    compiled: Any


class Driver:
    def __init__(self, architecture: int):
        self.architecture = architecture
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: PROPERTIES)

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture  # triton keeps what it compiled by the number of the device

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def set_current_device(self, device):
        pass

    def get_benchmarker(self):
        return None


@contextmanager
def fake_driver(architecture: int) -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    plain = JITFunction.run

    def run(self, *arguments, grid, warmup, **options):
        compiled = plain(self, *arguments, grid=grid, warmup=True, **options)  # compiled, not run
        launches.append(Launch(self.__name__, grid, compiled))
        return compiled

    with patch.object(driver, "_active", Driver(architecture)), patch.object(JITFunction, "run", run):
        yield launches
