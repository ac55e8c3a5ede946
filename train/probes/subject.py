"""The model as a probe sees it: losses, choices and attention weights of rows of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thriftlab.train.backends.base import Backend
from thriftlab.train.model import GPT
from thriftlab.train.probes.attention import watched_attention
from thriftlab.train.windows import autocast, document_ids, split_windows

ROWS = 16  # of one forward


@dataclass(frozen=True)
class Subject:
    """`model` is the one inside of the backend's module. All results are on the CPU."""

    backend: Backend
    model: GPT
    precision: str = "fp32"
    mask_delimiter: int | None = None
    compiled: bool = False

    def losses(self, rows: Tensor) -> Tensor:
        """Nats of each token but the first of its row, float64 [rows, seq] of tokens [rows, seq + 1]."""
        return torch.cat([self(inputs, targets).double().cpu() for inputs, targets in self.pieces(rows)])

    def choices(self, rows: Tensor) -> Tensor:
        """The most probable token in the place of each but the first, alike."""
        return torch.cat([self(inputs, None).argmax(-1).cpu() for inputs, _ in self.pieces(rows)])

    def attention(self, rows: Tensor) -> Tensor:
        """Attention weights, mean over rows: float64 [layers, heads, query, key] of tokens [rows, seq]."""
        total = torch.zeros((), dtype=torch.float64)
        for inputs in rows.to(self.backend.device).split(ROWS):
            with watched_attention(self.model) as seen:
                self(inputs, None)
            total = total + torch.stack([weights.double().sum(0) for weights in seen]).cpu()
        return total / len(rows)

    def pieces(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of some rows at a time."""
        return (split_windows(piece) for piece in rows.to(self.backend.device).split(ROWS))

    def __call__(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        with autocast(self.backend.device, self.precision):
            return self.backend.module(inputs, targets, document_ids(inputs, self.mask_delimiter))
