"""What every rank has a copy of: held equal before the first step, and the buffers kept with a run.

A layer may have what is no parameter and yet a part of it: which channels, which positions. Such buffers are constant
and nobody sends them round, so they must be equal from the beginning. ZeRO and DDP make the weights of all ranks equal
without a word, and of a buffer that differs they know nothing; gradients would be sums over different models.

The buffers of a checkpoint count more than those that the seed gives: they follow from a decomposition, and another
machine's may choose another channel where two are nearly alike.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from thriftlab.data.errors import BackendError, CheckpointError
from thriftlab.train.backends.pieces import TensorReader
from thriftlab.train.backends.rendezvous import ranks_in_words

SHOWN = 3  # tensors in the message


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent ones, by name."""
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if not isinstance(t, nn.Parameter)}


@torch.no_grad()
def take_up(model: nn.Module, weights: TensorReader, saved: TensorReader) -> None:
    """Parameters and buffers of a checkpoint, of a model that is whole on this rank. CheckpointError for another's."""
    for name, p in model.named_parameters():
        if weights.shapes.get(name) != tuple(p.shape):
            raise CheckpointError(
                f"parameter {name!r} is {tuple(p.shape)} in the model and {weights.shapes.get(name) or 'not there'} in "
                "the checkpoint; use the configuration that wrote it"
            )
        p.copy_(weights[name])
    take_up_buffers(model, saved)


def take_up_buffers(model: nn.Module, saved: TensorReader) -> None:
    """Overwrites them with those of a checkpoint. CheckpointError unless it has just these."""
    own = {name: tuple(tensor.shape) for name, tensor in buffers(model).items()}
    for name in sorted(own.keys() | saved.shapes.keys()):
        here, there = own.get(name), saved.shapes.get(name)
        if here != there:
            raise CheckpointError(
                f"buffer {name!r} is {here or 'not there'} in the model and {there or 'not there'} in the checkpoint; "
                "resume with the configuration that wrote it, or start anew in another folder"
            )
    model.load_state_dict({name: saved[name] for name in own}, strict=False)


def refuse_differences(model: nn.Module, share: Callable[[Any], list[Any]]) -> None:
    """BackendError, on every rank, unless all have the same bits in every parameter and buffer.

    Args:
        share: collects the values of all ranks.
    """
    first, *others = share({name: digest(t) for name, t in [*model.named_parameters(), *model.named_buffers()]})
    wrong: dict[str, set[int]] = {}
    for rank, digests in enumerate(others, 1):
        for name in sorted(first.keys() | digests.keys()):
            if first.get(name) != digests.get(name):
                wrong.setdefault(name, set()).add(rank)
    if wrong:
        some = "; ".join(f"{name} on {ranks_in_words(ranks)}" for name, ranks in list(wrong.items())[:SHOWN])
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise BackendError(
            f"before the first step not all ranks have what rank 0 has: {some}{more}. What a rank begins with must be "
            "a function of the seed and of names: start all ranks from one configuration and one installation"
        )


def digest(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, str]:
    """Shape, dtype and the sha256 of the bits."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return tuple(tensor.shape), tensor.dtype, hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
