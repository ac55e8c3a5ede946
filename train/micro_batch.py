"""How many windows one forward takes on a GPU where nobody said so: as many as its memory holds.

Forward and backward of two numbers of windows are run on fake tensors, which have no memory, and the bytes that they
would hold at once are counted. What is free on the device, less what training will keep there, is divided by the
difference for a window. The number is chosen once and kept with the run: the last bits of its gradients depend on it.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thriftlab.data.errors import UserError
from thriftlab.train.build import Run, make_model
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.log import Counters
from thriftlab.train.storages import Storages
from thriftlab.train.windows import autocast

PROBE = 64  # windows at most: what is bounded, as the log-probabilities that the loss keeps, is full by then
SPARE = 0.1  # of the free bytes: kernels' workspaces, NCCL's buffers, gaps between what the allocator gave out


class Need(NamedTuple):
    """Bytes of a forward and backward beside weights and gradients."""

    fixed: int
    window: int  # of each window


def windows_that_fit(free: int, kept: int, need: Need, most: int) -> int:
    """Windows of a micro-batch, at least one; of `most` windows as few micro-batches as possible, all about as large.

    Args:
        free: bytes of the device.
        kept: bytes of them that training will keep: gradients, state.
    """
    room = (1 - SPARE) * free - kept - need.fixed
    largest = max(1, int(room // need.window))
    return math.ceil(most / math.ceil(most / largest))


def need_of(
    model: nn.Module, device: torch.device, most: int, length: int, precision: str, documents: bool, dropout: bool
) -> Need:
    """Counted on fake tensors, of two windows or more: for fewer than were counted it is too high rather than too low.

    Args:
        model: on the meta device; it is used up.
        most: windows that may be asked for.
        documents: whether attention is masked between them.
    """
    with FakeTensorMode():
        known = put_on(model, device)

        @functools.cache
        def held(windows: int) -> int:
            tokens, keys = (
                torch.empty(shape, dtype=torch.int64, device=device) for shape in ((windows, length), windows)
            )
            with Storages([*known, tokens, keys]) as storages:
                with autocast(device, precision):
                    losses = model(tokens, tokens, tokens if documents else None, keys if dropout else None)
                losses.sum().backward()
            return storages.peak

        many = min(most, PROBE)
        few = many // 2
        window = (held(many) - held(few)) // (many - few)
        return Need(fixed=max(0, held(many) - many * window), window=window)


def put_on(model: nn.Module, device: torch.device) -> list[torch.Tensor]:
    """Gives every parameter, and a gradient to it, and every buffer of a meta model a fake tensor; returns them."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied one once
    known: list[torch.Tensor] = []
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p not in made:
                made[p] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device), p.requires_grad)
                if p.requires_grad:
                    made[p].grad = torch.empty_like(made[p])
                    known.append(made[p].grad)  # type: ignore[arg-type]
            module._parameters[name] = None if p is None else made[p]
        for name, buffer in module._buffers.items():
            module._buffers[name] = (
                None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            )
    return [*known, *model.parameters(), *model.buffers()]


def free_bytes(device: torch.device) -> int:
    """Of the device, with those that torch's allocator has and nobody uses."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def kept_bytes(run: Run) -> int:
    """Gradients, twice where ranks collect them in buckets, and state."""
    gradients = sum(p.numel() * (p.grad_dtype or p.dtype).itemsize for p in run.model.parameters() if p.requires_grad)
    return gradients * (1 if run.backend.world == 1 else 2) + run.backend.predicted_state_bytes()


def fitting(run: Run) -> int:
    """What fits on the GPUs of all ranks, before the first step."""
    c, device = run.config, run.backend.device
    most = fits = c.train.rows_per_rank(run.backend.world)
    if most > 1:
        model, _ = make_model(c, run.dataset)
        data, t = c.data, c.train
        need = need_of(model, device, most, data.sequence_length, t.precision, data.document_mask, t.dropout > 0)
        fits = windows_that_fit(free_bytes(device), kept_bytes(run), need, most)
    return min(run.backend.share(fits))


def with_micro_batch(run: Run, counters: Counters) -> Run:
    """The run with the micro-batch that it began with, or else with one that fits."""
    if run.micro_batch_size is not None:
        return run
    if counters.micro_batch_size is None:
        counters.micro_batch_size = fitting(run)
    return replace(run, micro_batch_size=counters.micro_batch_size)


@contextmanager
def named_shortage(config: RunConfig) -> Iterator[None]:
    """Turns a GPU's lack of memory in the body into one line that says what may help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows = config.train.micro_batch_size or "what the run chose (speed.micro_batch_size)"
        raise UserError(
            f"the memory of the GPU is not enough ({str(error).partition('. ')[0]}); set train.micro_batch_size below "
            f"{rows}, or train.activation_checkpointing=true, or take a method with less state"
        ) from error
