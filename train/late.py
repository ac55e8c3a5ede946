"""Numbers on their way to the host, and tensors to the device, without either of them waiting.

All numbers of a step leave a GPU in one copy. The host reads it when the next step is queued, so the device is never
idle meanwhile. On a CPU everything is there at once, and nothing here has an effect.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Numbers = dict[str, Tensor]


def send(numbers: Numbers) -> Callable[[], Numbers]:
    """Begins to copy numbers of one device to the host; what is returned waits for them. On a CPU they are there."""
    return copied(numbers) if next(iter(numbers.values())).is_cuda else lambda: numbers


def copied(numbers: Numbers) -> Callable[[], Numbers]:
    """All in one copy, in float64, which holds every fp32 and every count below 2^53."""
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in numbers.values()])
    shapes = {name: tensor.shape for name, tensor in numbers.items()}
    landed = landing_place(flat).copy_(flat, non_blocking=True)
    landing = mark()

    def receive() -> Numbers:
        landing()
        parts = landed.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    return receive


def mark() -> Callable[[], None]:
    """A function that waits until the GPU has done what is queued for it now, and for nothing after that."""
    if not torch.cuda.is_initialized():
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def landing_place(tensor: Tensor) -> Tensor:
    """Room on the host for a tensor of a GPU, which that can write to by itself."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_initialized())


def pinned(tensor: Tensor) -> Tensor:
    """A tensor of the host where a GPU can fetch it by itself."""
    return tensor.pin_memory() if torch.cuda.is_initialized() else tensor


def bring(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device."""
    return tensor if device.type == "cpu" else pinned(tensor).to(device, non_blocking=True)
