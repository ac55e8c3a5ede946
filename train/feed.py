"""A batch on its way to the model. To a GPU everything that is of its rows travels in one pinned copy, in 32 bits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from thriftlab.data.loader import Batch
from thriftlab.train.late import pinned

LookUp = Callable[[Batch], Tensor]  # the reference losses of a batch, fp32 [rows, seq], on the CPU


class Packed(NamedTuple):
    """A batch of the host, ready for one copy: of each row its tokens, its source, its sample in two words and, where
    they are needed, the bits of its reference losses."""

    words: Tensor  # int32 [rows, seq + 4], or [rows, 2 seq + 4]
    length: int  # seq + 1


class Arrived(NamedTuple):
    """The rows of one step on one rank, where the model is."""

    tokens: Tensor  # int64 [rows, seq + 1]
    source: Tensor  # int64 [rows]
    sample: Tensor  # int64 [rows]
    reference: Tensor | None  # fp32 [rows, seq]


def pack(batch: Batch, look_up: LookUp | None = None) -> Packed:
    sample = batch.sample.long().view(torch.int32).view(-1, 2)
    words = [batch.tokens.int(), batch.source.int()[:, None], sample]
    if look_up is not None:
        words.append(look_up(batch).float().view(torch.int32))
    return Packed(pinned(torch.cat(words, 1)), batch.tokens.shape[1])


def arrive(batch: Batch | Packed, device: torch.device, look_up: LookUp | None = None) -> Arrived:
    """The batch on the device; `look_up` is asked unless it is packed already."""
    if device.type == "cpu":
        assert isinstance(batch, Batch)
        return Arrived(batch.tokens, batch.source.long(), batch.sample.long(), look_up and look_up(batch))
    words, length = batch if isinstance(batch, Packed) else pack(batch, look_up)
    return unpack(words.to(device, non_blocking=True), length)


def unpack(words: Tensor, length: int) -> Arrived:
    tokens, source, sample, reference = words.split([length, 1, 2, words.shape[1] - length - 3], 1)
    return Arrived(
        tokens.long(),
        source[:, 0].long(),
        sample.contiguous().view(torch.int64)[:, 0],
        reference.contiguous().view(torch.float32) if reference.shape[1] else None,
    )
