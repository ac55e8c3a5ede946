"""One optimizer step: micro-batches -> summed gradients -> one scale -> clip -> update. The page everyone reads.

One surprise: a bad step is found without looking at anything on the way. If the loss is not finite the scale becomes
NaN, then so does the gradient norm, on every rank alike, and the backend leaves the weights as they are. On a GPU the
host does not wait for any of it: what a step was is read from its `Numbers`, later (late.py).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from thriftlab.data.loader import Batch
from thriftlab.train.backends.base import Backend
from thriftlab.train.backends.device import same_draws_again
from thriftlab.train.feed import Packed, arrive
from thriftlab.train.late import Numbers, send
from thriftlab.train.objective import Objective
from thriftlab.train.signals.base import Uniform
from thriftlab.train.windows import autocast, document_ids, split_windows

WEIGHTS, REFRESH = "weights/", "refresh/"  # before names of numbers
CACHE_ELEMENTS = 2**17  # of the residual stream that one micro-batch may have for each thread of a CPU: 512 kB in fp32


class StepResult(NamedTuple):
    loss: float  # mean over the predicted tokens of the global batch, nats; uniform, whatever the signal
    grad_norm: float  # of the gradient, before clipping
    tokens: int  # predicted, over all ranks
    applied: bool  # False: loss or gradient was not finite, and nothing was updated
    weights: dict[str, Tensor] | None = None  # what a signal did, where that was watched
    refresh: dict[str, Tensor] | None = None  # what an optimizer found out, see log.py
    asked: list[float] | None = None  # sums over ranks of `objective.asked`


def train_step(backend: Backend, *args: Any, **kwargs: Any) -> StepResult:
    """`take_step`, and what it was."""
    return result_of(backend, send(take_step(backend, *args, **kwargs))())


def take_step(
    backend: Backend,
    batch: Batch | Packed,
    mask_delimiter: int | None,
    micro_batch_size: int,
    precision: str,
    max_norm: float | None,
    objective: Objective | None = None,
    row_keys: Tensor | None = None,
) -> Numbers:
    """Update the weights once; on a GPU that is queued when this returns, and nothing was waited for.

    Args:
        batch: this rank's windows, [rows, seq + 1].
        mask_delimiter: the token that opens a document, to mask attention between documents; None: no mask.
        micro_batch_size: rows of one forward and backward.
        precision: "fp32" or "bf16" (autocast).
        max_norm: gradients are scaled down to this global norm; None: never.
        objective: how much each token counts; None: all alike.
        row_keys: int64 [rows], keys of the dropout of each row, see dropout.py; None: nothing is dropped.

    Returns:
        What `result_of` takes, on the device.
    """
    objective = objective or Objective(Uniform())
    here = arrive(batch, backend.device, None if objective.idle else objective.reference)
    inputs, targets = split_windows(here.tokens)
    micro_batches = [slice(start, start + micro_batch_size) for start in range(0, len(inputs), micro_batch_size)]

    def token_loss(rows: slice) -> Tensor:
        drops = [] if row_keys is None else [row_keys[rows]]
        with autocast(backend.device, precision):
            return backend.module(inputs[rows], targets[rows], document_ids(inputs[rows], mask_delimiter), *drops)

    ahead = None  # the losses of all rows, where they have to be known before the first is back-propagated
    if objective.waits and len(micro_batches) > 1:
        with torch.no_grad(), same_draws_again(backend.device):
            ahead = torch.cat([token_loss(rows) for rows in micro_batches])

    step = objective.begin(backend, here, inputs, targets, ahead)
    backend.begin(step.denominator)
    for rows in micro_batches:
        with backend.micro_batch(last=rows is micro_batches[-1]):
            backend.backward(step.total(token_loss(rows), rows))
    loss, tokens, denominator, asked, weights = step.finish()

    scale = torch.where(loss.isfinite(), 1 / denominator, torch.nan)
    grad_norm, applied = backend.step(scale, max_norm)
    numbers = {"loss": loss / tokens, "grad_norm": grad_norm, "tokens": tokens, "applied": applied, "asked": asked}
    return numbers | {f"{WEIGHTS}{key}": tensor for key, tensor in (weights or {}).items()}


def result_of(backend: Backend, numbers: Numbers) -> StepResult:
    """Of a step whose numbers have reached the host. UserError where it cannot be taken back and should be."""
    if backend.layerwise:
        backend.layerwise.check(bool(numbers["applied"]))
    return StepResult(
        loss=numbers["loss"].item(),
        grad_norm=numbers["grad_norm"].item(),
        tokens=int(numbers["tokens"]),
        applied=bool(numbers["applied"]),
        weights=under(WEIGHTS, numbers),
        refresh=under(REFRESH, numbers),
        asked=numbers["asked"].tolist(),
    )


def under(prefix: str, numbers: Numbers) -> Numbers | None:
    """The numbers whose names begin so, without that."""
    return {key.removeprefix(prefix): tensor for key, tensor in numbers.items() if key.startswith(prefix)} or None


def micro_batch_rows(device: torch.device, sequence_length: int, dim: int) -> int | None:
    """Rows of a micro-batch where the user has no wish: what a CPU's cache holds; None, all rows, on a GPU.

    A sum of gradients does not depend on the split, and on a CPU smaller pieces are up to a tenth faster.
    """
    cache = CACHE_ELEMENTS * torch.get_num_threads()
    return max(1, cache // (sequence_length * dim)) if device.type == "cpu" else None
