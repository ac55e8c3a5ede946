"""What one rank holds of a named tensor, and where the rest can be read.

Weights, gradients and optimizer state are named tensors, some of them cut: a sharded run keeps entries start to stop of
a matrix here and the others elsewhere. A piece says which, in the row-major order of the whole, and that is all that a
checkpoint or the witness ever asks of a backend.

It is enough for state as well: coordinates of a matrix in a subspace of single entries, rows, columns or blocks are
kept in row-major order, so a contiguous piece of the matrix has a contiguous piece of its moments.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

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


class TensorReader(Mapping[str, Tensor]):
    """Named whole tensors, read when they are asked for, as a whole or in any pieces: a checkpoint."""

    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries start to stop, flat, on the CPU, in the dtype that was saved; not to be written to."""

    def __getitem__(self, key: str) -> Tensor:
        return self.read(key).view(self.shapes[key])

    def __contains__(self, key: object) -> bool:
        return key in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def whole(tensor: Tensor) -> Piece:
    """A whole tensor as a piece; it shares memory where that is row-major."""
    return Piece(tuple(tensor.shape), 0, tensor.detach().reshape(-1))


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
