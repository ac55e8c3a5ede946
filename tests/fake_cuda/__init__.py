"""A CPU-only torch that believes in one CUDA device, for fake tensors alone, in a process of its own.

`fake_cuda(function, *args)`, a fixture, calls a function of a test module there, under a FakeTensorMode, and returns
what it returns; both sides are pickled. Whole steps run at any size in it: no GPU, no memory. `Counts` (counts.py)
counts what a GPU and its host would do. The process is one for the session; compiling takes two seconds, starting four.

What is proved: devices, dtypes, host reads, copies, launches. What is not: time, and which kernel torch takes.

The surprise: torch must not be imported before the guard is loaded, for its autograd engine asks once which devices
there are; hence the process.
"""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("guard.cpp")


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory) -> Iterator[Callable[..., Any]]:
    """Calls `function(*args)` of a module in the process that believes in a CUDA device."""
    if not compiler():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("there is no C++ compiler (g++)")
    with process(tmp_path_factory.mktemp("fake_cuda")) as call:
        yield call


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


@contextmanager
def process(folder: Path) -> Iterator[Callable[..., Any]]:
    """The same, for a program."""
    spawn, library = multiprocessing.get_context("spawn"), build(folder)
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=believe, initargs=(library,)) as pool:
        yield lambda function, *args: pool.submit(in_fake_mode, function, *args).result()


def build(folder: Path) -> str:
    """Compiles the guard, against the torch that is installed, without importing it."""
    torch = Path(find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    library = str(folder / "libfakecuda.so")
    headers = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    command = [
        str(compiler()),
        "-shared",
        "-fPIC",
        "-O0",
        "-std=c++20",
        str(SOURCE),
        "-o",
        library,
        *headers,
        *libraries,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the guard does not compile: {done.stderr[-2000:]}")
    return library


def believe(library: str) -> None:
    """Makes this process believe in one CUDA device."""
    assert "torch" not in sys.modules
    os.environ.setdefault("THRIFTLAB_KERNELS", "torch")  # launches of kernels are counted where they are asked for
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    from tests.fake_cuda.stand_ins import install

    install()


def in_fake_mode(function: Callable[..., Any], *args: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return function(*args)
    except Exception:  # not every exception of torch can be pickled
        raise RuntimeError(traceback.format_exc()) from None
