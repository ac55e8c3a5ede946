"""Weights and gradients in few bits, as a configuration asks for them: what is refused, and how a model is narrowed.

Kept in few bits are trained tensors of two and more dimensions. Vectors, as the scales of norms, stay fp32: they are
few, and at a learning rate of 1e-3 a bf16 scale near 1 would never move. What is not trained stays as it is.
"""

import torch
from torch import nn

from thriftlab.data.errors import BackendError, ConfigError
from thriftlab.optim import Method
from thriftlab.train.backends.base import Backend
from thriftlab.train.config.schema import RunConfig

WIDE = "fp32"


def refuse_few_bits(config: RunConfig, backend: Backend) -> None:
    """ConfigError or BackendError for what does not go together, known without data and model."""
    train = config.train
    weights, gradients = train.weights != WIDE, train.gradients != WIDE
    asked = [f"train.weights = {train.weights}"] * weights + [f"train.gradients = {train.gradients}"] * gradients
    if not asked:
        return
    if train.precision != "bf16":
        raise ConfigError(
            f"{asked[0]} is of a model whose products are made in bf16, and this run has train.precision = "
            f"{train.precision}; set train.precision=bf16"
        )
    rows = train.rows_per_rank(backend.world)
    if gradients and (train.micro_batch_size or 0) < rows:
        raise ConfigError(
            f"train.gradients = bf16 needs one micro-batch on a rank, for sums of several are fp32; set "
            f"train.micro_batch_size={rows}, or train.gradients=fp32"
        )
    if backend.why_fp32:
        raise BackendError(f"{asked[0]} is not possible with backend {backend.name!r}: {backend.why_fp32}")
    if backend.one_dtype and weights != gradients:
        raise BackendError(
            f"under backend {backend.name!r} a gradient has the dtype of its weight, and here they are "
            f"train.weights = {train.weights} and train.gradients = {train.gradients}; set "
            f"{'train.gradients=bf16' if weights else 'train.weights, too'}, or use backend.name=owned"
        )


def narrow(config: RunConfig, model: nn.Module, optimizer: Method) -> None:
    """Brings the trained matrices of a model to what is kept of them, before a backend takes it, and says in which
    dtype their gradients are summed."""
    train = config.train
    if train.weights != WIDE:
        optimizer.keep_weights(train.weights, train.rounding, config.seed)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    for p in matrices:
        wanted = torch.bfloat16 if train.gradients == "bf16" else torch.float32
        if p.dtype != wanted:
            p.grad_dtype = wanted
