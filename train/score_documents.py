"""Nats per token of a document under the model of a finished run: a score for `thriftlab prepare`.

A document begins with the delimiter, as in training, and is read in windows of the run's length that do not overlap.
Each is computed alone, without other documents beside it and on one thread, because a matrix product may round its last
bits by the shape of the batch: so a score depends on nothing else in the data. It is rounded to 1e-3 nats, and is
promised to be the same only on one type of CPU.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from thriftlab.data.errors import UserError
from thriftlab.data.shards import open_dataset
from thriftlab.data.tokens import Tokenizer, encode_document
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.model import GPT
from thriftlab.train.records.machine import cpu_model
from thriftlab.train.records.record import Record, read_record
from thriftlab.train.write_reference import finished_config, load_model, token_losses

UNIT = 1 << 16  # of a nat, as of the scores of data/prepare/scores
ROWS = 16  # windows of one forward, all of the same document


class Scorer(NamedTuple):
    """Pickled as the name of the run; every process loads the model once."""

    run: Path

    def __call__(self, texts: Iterable[str]) -> NDArray[np.int32]:
        """Nats per token in units of 1/UNIT, [documents]; 0 for a text without tokens."""
        config, tokenizer, model = load(self.run)
        with one_thread():
            nats = [document_nats(model, config, encode_document(tokenizer, text)[0]) for text in texts]
        if not np.isfinite(nats).all():
            raise UserError(f"{self.run}: its model gives losses that are not finite; name another run")
        return np.array([min(round(1000 * n) * UNIT // 1000, 2**31 - 1) for n in nats], np.int32)

    def about(self) -> dict[str, Any]:
        """What decides the scores: the run, and the CPU that equality is promised for."""
        return {"run": Record.from_json(read_record(self.run / "record.json")).fingerprint, "cpu": cpu_model()}


def scorer(run: Path) -> Scorer:
    """The scorer of a finished run. UserError if it has no record or no weights."""
    load(run)
    return Scorer(run)


@cache
def load(run: Path) -> tuple[RunConfig, Tokenizer, GPT]:
    config = finished_config(Record.from_json(read_record(run / "record.json")).config)
    dataset = open_dataset(config.data.path, verify=False)
    return config, dataset.tokenizer, load_model(config, dataset, run)


def document_nats(model: GPT, config: RunConfig, ids: NDArray[np.uint32]) -> float:
    """The mean loss of all ids but the first, the delimiter."""
    precision, length = config.train.precision, config.data.sequence_length
    losses = [token_losses(model, rows, None, precision) for rows in windows(ids, length)]
    return sum(float(rows.sum(dtype=np.float64)) for rows in losses) / max(len(ids) - 1, 1)


def windows(ids: NDArray[np.uint32], length: int) -> Iterator[NDArray[np.uint32]]:
    """Rows [rows, seq + 1] in which every id but the first is a target once; the last may be shorter."""
    whole = (len(ids) - 1) // length
    for start in range(0, whole, ROWS):
        rows = np.arange(start, min(start + ROWS, whole))
        yield ids[rows[:, None] * length + np.arange(length + 1)]
    if len(rest := ids[whole * length :]) > 1:
        yield rest[None]


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
