"""What Python asks of CUDA and a CPU-only torch refuses: pinned memory, streams and events that have nothing to do."""

import contextlib
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.runtime.jit import JITFunction

pinned: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensors whose copy to the device need not wait
waits: list[None] = []  # one for each time that the host waited for a stream or an event
watching: list[Callable[..., None]] = []  # called with each launch of a Triton kernel: its name and arguments
captures: list[None] = []  # not empty: what is launched would go into a CUDA graph


unused = itertools.count(2**30)
addresses: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of fake tensors, where somebody has asked


def address(tensor) -> int:
    """A number like no other tensor's, a multiple of what a GPU begins its tensors at."""
    if tensor not in addresses:
        addresses[tensor] = 512 * next(unused)
    return addresses[tensor]


def at(place: int) -> Tensor:
    return next(tensor for tensor, address in addresses.items() if address == place)


def launch(kernel, *args, **kwargs) -> None:
    """Stands for what triton does with a kernel. It gets its arguments by the names that the kernel has for them."""
    kernel.signature.bind(*args, **{key: x for key, x in kwargs.items() if key in kernel.signature.parameters})
    for watch in watching:
        watch(kernel.fn.__name__, *args, **kwargs)


class Stream:
    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream) -> None:
        pass

    wait_event = wait_stream

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self) -> None:
        waits.append(None)

    def query(self) -> bool:
        return True


class Event(Stream):
    def record(self, stream=None) -> None:
        pass

    wait = record

    def elapsed_time(self, end) -> float:
        return 0.0


def pin(tensor: Tensor, device=None) -> Tensor:
    copy = tensor.clone()
    pinned[copy] = True
    return copy


def is_pinned(tensor: Tensor, device=None) -> bool:
    return tensor in pinned


def install() -> None:
    """Only in a process that has nothing else to do."""
    cuda, current = torch.cuda, Stream()
    cuda.is_available = lambda: True
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.current_device = lambda: 0  # type: ignore[assignment]
    cuda.device_count = lambda: 1
    cuda.is_current_stream_capturing = lambda: bool(captures)
    cuda.Stream, cuda.Event = Stream, Event  # type: ignore[assignment, misc]
    cuda.current_stream = cuda.default_stream = lambda device=None: current  # type: ignore[assignment]
    cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]
    cuda.synchronize = lambda device=None: current.synchronize()
    Tensor.pin_memory, Tensor.is_pinned = pin, is_pinned  # type: ignore[method-assign, assignment]
    Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]
    FakeTensor.data_ptr = address  # type: ignore[method-assign]
    JITFunction.run = launch  # type: ignore[method-assign]
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU first
