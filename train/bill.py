"""The bytes of a rank by part, twice: predicted from the configuration and what the method declares, and measured on
the tensors that are there.

    weights     what the model has, of a matrix in few bits the bf16 that it sees
    low_bits    what is kept of such a matrix beside that
    gradients   between the last backward and the update; of several micro-batches their sums
    moments     of the optimizer's state what its rule keeps
    scales      of 8-bit blocks
    bases       of subspaces

Not in it: activations, buffers of communication, what a step or a backward allocates and frees, and the engine of
DeepSpeed, which keeps copies of its own.
"""

import torch

from thriftlab.optim.core.bill import PARTS as STATE
from thriftlab.optim.core.bill import state_parts
from thriftlab.train.backends.base import Backend
from thriftlab.train.build import Run
from thriftlab.train.records.record import Record

PARTS = ("weights", "low_bits", "gradients", *(part for part in STATE if part != "low_bits"))


def predicted(run: Run) -> dict[str, int] | None:
    """By part; None where a library keeps copies that nobody declares."""
    if not run.backend.has_bill:
        return None
    train, backend, weights, gradients = run.config.train, run.backend, 0, 0
    for name, p in run.model.named_parameters():
        narrow = p.requires_grad and p.ndim > 1
        weights += backend.entries(name, p) * bytes_of(train.weights, narrow)
        gradients += backend.summed_entries(name, p) * bytes_of(train.gradients, narrow) * p.requires_grad
    if train.layerwise and (run.micro_batch_size or 0) >= train.rows_per_rank(backend.world):
        gradients = 0
    return ordered({"weights": weights, "gradients": gradients, **backend.predicted_state_parts()})


def bytes_of(kept: str, narrow: bool) -> int:
    """Of an entry."""
    return (torch.float32 if kept == "fp32" or not narrow else torch.bfloat16).itemsize


def measured(backend: Backend) -> dict[str, int] | None:
    """The same of the tensors, after a step."""
    if not backend.has_bill:
        return None
    weights = sum(piece.tensor.nbytes for piece in backend.weights().values())
    return ordered({"weights": weights, "gradients": backend.gradient_bytes, **state_parts(backend.optimizer)})


def ordered(parts: dict[str, int]) -> dict[str, int]:
    return {part: parts[part] for part in PARTS}


def bill_of(record: Record) -> str:
    """The line of a finished run: bytes of each parameter of the model, on its first rank; nothing where that is not
    known."""
    memory = record.memory
    if not (memory.measured and memory.predicted):
        return ""
    parameters = record.model.parameters
    found, expected = memory.measured["parts"], memory.predicted["parts"]
    each = " + ".join(f"{part.replace('_', ' ')} {size / parameters:.2f}" for part, size in found.items() if size)
    totals = (f"{sum(parts.values()) / parameters:.2f}" for parts in (found, expected))
    return "bytes a parameter: {} = {}, predicted {}\n".format(each, *totals)
