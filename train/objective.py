"""From the losses of tokens to the one scalar that is differentiated.

Every micro-batch on every rank back-propagates a plain *sum* over its tokens. The one division, by a denominator summed
over the whole global batch, comes later, as the scale of the backend's step. So the gradient is the same for every
split of a batch into ranks and micro-batches; a mean of means is not, as soon as two parts predict different numbers of
tokens.
"""

from torch import Tensor


def split_windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Windows [rows, seq + 1] -> inputs and targets, each [rows, seq]."""
    return tokens[:, :-1], tokens[:, 1:]


def count_targets(targets: Tensor) -> Tensor:
    """Number of predicted tokens, a float64 scalar: the denominator of the mean loss."""
    return (targets >= 0).sum().double()


def total_loss(token_loss: Tensor) -> Tensor:
    """Sum of the losses [rows, seq] of one micro-batch; what is not predicted has loss zero."""
    return token_loss.sum()
