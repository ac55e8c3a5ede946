"""Windows of tokens on their way to a loss: inputs and targets, the documents in them, and sums over their tokens."""

import torch
from torch import Tensor


def split_windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Windows [rows, seq + 1] -> inputs and targets, each [rows, seq]."""
    return tokens[:, :-1], tokens[:, 1:]


def document_ids(inputs: Tensor, delimiter: int | None) -> Tensor | None:
    """Number of document starts up to each token, [rows, seq]; None without a delimiter."""
    return None if delimiter is None else (inputs == delimiter).cumsum(1)


def count_targets(targets: Tensor) -> Tensor:
    """Number of predicted tokens, a float64 scalar: the denominator of the mean loss."""
    return (targets >= 0).sum().double()


def total_loss(token_loss: Tensor) -> Tensor:
    """Sum of the losses [rows, seq] of one micro-batch; what is not predicted has loss zero."""
    return token_loss.sum()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 for the matrix products; parameters, gradients and losses stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
