"""What one rank holds of a named tensor, and where the rest can be read.

Weights, gradients and optimizer state are named tensors, some of them cut: a sharded run keeps entries start to stop of
a matrix here and the others elsewhere. A piece says which, in the row-major order of the whole, and that is all that a
checkpoint or the witness ever asks of a backend.

One surprise: it is enough for state as well. Coordinates of a matrix in a subspace of single entries, rows, columns or
blocks are kept in row-major order, so a contiguous piece of the matrix has a contiguous piece of its moments.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Entries start to stop of a tensor, row-major; a scalar has shape () and one entry."""

    shape: tuple[int, ...]  # of the whole tensor
    start: int
    tensor: Tensor  # [stop - start]

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()

    @property
    def is_whole(self) -> bool:
        return self.tensor.numel() == torch.Size(self.shape).numel()


Pieces = dict[str, Piece]


class Source(Protocol):
    """Named whole tensors that can be read in any pieces: a checkpoint."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the whole tensors."""
        ...

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries start to stop, flat, on the CPU, in the dtype that was saved; not to be written to."""
        ...


def whole(tensor: Tensor) -> Piece:
    """A whole tensor as a piece; it shares memory where that is row-major."""
    return Piece(tuple(tensor.shape), 0, tensor.detach().reshape(-1))


def read_whole(source: Source, key: str) -> Tensor:
    """A tensor of the source in its shape."""
    return source.read(key).view(source.shapes[key])


def assemble(pieces: Iterable[Piece]) -> Tensor:
    """The whole tensor, from pieces that hold every entry exactly once. ValueError where they do not."""
    pieces = sorted(pieces, key=lambda piece: piece.start)
    if wrong := gaps([(piece.start, piece.stop) for piece in pieces], torch.Size(pieces[0].shape).numel()):
        raise ValueError(wrong)
    return torch.cat([piece.tensor for piece in pieces]).view(pieces[0].shape)


def gaps(ranges: Iterable[tuple[int, int]], size: int) -> str | None:
    """What is wrong with ranges that are to hold each of `size` entries exactly once, or None."""
    end = 0
    for start, stop in sorted(ranges):
        if start != end:
            return f"entries {min(start, end)} to {max(start, end)} are held {'twice' if start < end else 'by nobody'}"
        end = stop
    return None if end == size else f"entries {end} to {size} are held by nobody"
