"""The ruler: held-out loss over fixed windows, every token counted once.

Per source and over all: nats per token and bits per byte. Bytes are those that the predicted tokens spell, so the
number compares across tokenizers. The reason for this file: the evaluators of GaLore, Fira and APOLLO start their batch
counter at one, which multiplies the loss by n / (n + 1), and average batches whatever their length; a perplexity
printed that way depends on the number of GPUs. Here sums are divided once, at the end.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from thriftlab.data.loader import read_ahead
from thriftlab.data.mixture import REPEATED
from thriftlab.data.shards import Dataset, Windows
from thriftlab.train.backends.base import Backend
from thriftlab.train.late import bring, pinned
from thriftlab.train.windows import autocast, document_ids, split_windows


def evaluate(
    backend: Backend,
    dataset: Dataset,
    sequence_length: int,
    batch_size: int,
    precision: str,
    mask_delimiter: int | None = None,
    max_tokens: int | None = None,
    sources: Sequence[str] | None = None,
    pool: Windows | None = None,
) -> dict:
    """Held-out loss of the backend's model.

    Args:
        batch_size: rows of one forward; changes the speed and not the number.
        mask_delimiter: as in training, see `train_step`.
        max_tokens: stop after this many tokens of each source, rounded up to whole windows; None: all.
        sources: which of them; None: all.
        pool: training windows that are repeated, told as a source and not part of the sum.

    Returns:
        {"loss": nats per token, "bits_per_byte", "tokens", "bytes", "sources": {name: the same four}}.
    """
    backend.module.eval()
    token_bytes = bring(torch.from_numpy(dataset.tokenizer.token_bytes), backend.device)
    names = dataset.sources if sources is None else sources
    parts = {name: dataset.windows(name, "validation", sequence_length) for name in names}
    rows, held_out = [count_rows(windows, max_tokens) for windows in parts.values()], len(parts)
    if pool is not None:
        parts[REPEATED] = pool
        rows.append(len(pool))
    sums = [
        sum_losses(backend, windows, count, token_bytes, batch_size, precision, mask_delimiter)
        for windows, count in zip(parts.values(), rows, strict=True)
    ]
    totals = np.array(torch.stack(sums).cpu().tolist())  # the one time that the host waits
    backend.module.train()
    by_source = {name: means(total) for name, total in zip(parts, totals, strict=True) if total[1] > 0}
    return {**means(np.sum(totals[:held_out], axis=0)), "sources": by_source}


@torch.no_grad()
def sum_losses(
    backend: Backend,
    windows: Windows,
    rows: int,
    token_bytes: Tensor,
    batch_size: int,
    precision: str,
    mask_delimiter: int | None,
) -> Tensor:
    """[nats, tokens, bytes] over the first `rows` windows, summed over ranks in float64, on the device.

    Ranks take turns, and all make the same number of forwards: a rank without a turn left runs on nothing, since a
    sharded model cannot be called by some ranks only.
    """

    def read(first: int) -> Tensor:
        start = first + backend.rank * batch_size
        tokens = windows_padded(windows, start, min(start + batch_size, rows))
        return tokens if backend.device.type == "cpu" else pinned(tokens.int())

    totals = torch.zeros(3, dtype=torch.float64, device=backend.device)
    for tokens in read_ahead(read, range(0, rows, batch_size * backend.world), backend.device):
        inputs, targets = split_windows(tokens.to(backend.device, non_blocking=True).long())
        inputs = inputs.clamp(min=0)
        with autocast(backend.device, precision):
            losses = backend.module(inputs, targets, document_ids(inputs, mask_delimiter))
        predicted = targets >= 0
        counts = predicted.sum(), torch.where(predicted, token_bytes[targets.clamp(min=0)], 0).sum()
        totals += torch.stack([losses.double().sum(), *(count.double() for count in counts)])
    return backend.sum(totals)


def windows_padded(windows: Windows, start: int, stop: int) -> Tensor:
    """Windows start .. stop as int64 [rows, seq + 1]; the partial last one, and an empty range, are filled with -1."""
    whole = windows[np.arange(start, max(start, min(stop, len(windows))))].astype(np.int64)
    padded = np.full((max(1, stop - start), windows.sequence_length + 1), -1, dtype=np.int64)
    padded[: len(whole)] = whole
    tail = windows.tail()
    if tail is not None and stop > max(start, len(windows)):
        padded[stop - start - 1, : len(tail)] = tail
    return torch.from_numpy(padded)


def count_rows(windows: Windows, max_tokens: int | None) -> int:
    """Windows to evaluate, the partial last one included."""
    rows = len(windows) + (windows.tail() is not None)
    return rows if max_tokens is None else min(rows, math.ceil(max_tokens / windows.sequence_length))


def means(total: np.ndarray) -> dict:
    nats, tokens, n_bytes = (float(x) for x in total)
    return {
        "loss": nats / tokens if tokens else math.nan,
        "bits_per_byte": nats / n_bytes / math.log(2) if n_bytes else math.nan,
        "tokens": int(tokens),
        "bytes": int(n_bytes),
    }
