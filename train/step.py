"""One optimizer step: micro-batches -> summed gradients -> one scale -> clip -> update. The page everyone reads.

One surprise: a bad step is found without looking at anything on the way. If the loss is not finite the scale becomes
NaN, then so does the gradient norm, on every rank alike, and the backend leaves the weights as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from thriftlab.data.loader import Batch
from thriftlab.train.backend import Backend
from thriftlab.train.objective import count_targets, split_windows, total_loss

CACHE_ELEMENTS = 2**17  # of the residual stream that one micro-batch may have for each thread of a CPU: 512 kB in fp32


class StepResult(NamedTuple):
    loss: float  # mean over the predicted tokens of the global batch, nats
    grad_norm: float  # of the mean gradient, before clipping
    tokens: int  # predicted, over all ranks
    applied: bool  # False: loss or gradient was not finite, and nothing was updated


def train_step(
    backend: Backend,
    batch: Batch,
    delimiter: int | None,
    micro_batch_size: int,
    precision: str,
    max_norm: float | None,
) -> StepResult:
    """Update the weights once.

    Args:
        batch: this rank's windows, int64 [rows, seq + 1].
        delimiter: the token that opens a document, to mask attention between documents; None: no mask.
        micro_batch_size: rows of one forward and backward.
        precision: "fp32" or "bf16" (autocast).
        max_norm: gradients are scaled down to this global norm; None: never.
    """
    inputs, targets = split_windows(batch.tokens.to(backend.device, non_blocking=True))
    totals = torch.zeros(2, dtype=torch.float64, device=backend.device)  # [loss, tokens]
    totals[1] = count_targets(targets)
    backend.begin(totals[1])

    starts = range(0, len(inputs), micro_batch_size)
    for start in starts:
        rows = slice(start, start + micro_batch_size)
        with backend.micro_batch(last=start == starts[-1]):
            with autocast(backend.device, precision):
                documents = document_ids(inputs[rows], delimiter)
                loss = total_loss(backend.module(inputs[rows], targets[rows], documents))
            backend.backward(loss)
        totals[0] += loss.detach()

    loss, tokens = backend.sum(totals)
    scale = torch.where(loss.isfinite(), 1 / tokens, torch.nan)
    grad_norm, applied = backend.step(scale, max_norm)
    return StepResult((loss / tokens).item(), grad_norm, int(tokens), applied)


def micro_batch_rows(device: torch.device, sequence_length: int, dim: int) -> int | None:
    """Rows of a micro-batch where the user has no wish: what a CPU's cache holds; None, all rows, on a GPU.

    A sum of gradients does not depend on the split, and on a CPU smaller pieces are up to a tenth faster.
    """
    cache = CACHE_ELEMENTS * torch.get_num_threads()
    return max(1, cache // (sequence_length * dim)) if device.type == "cpu" else None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 for the matrix products; parameters, gradients and losses stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def document_ids(inputs: Tensor, delimiter: int | None) -> Tensor | None:
    """Number of document starts up to each token, [rows, seq]; None without a delimiter."""
    return None if delimiter is None else (inputs == delimiter).cumsum(1)
