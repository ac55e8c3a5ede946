"""Weights and gradients in few bits, as a configuration asks for them.

Kept in few bits are trained tensors of two and more dimensions. Vectors, as the scales of norms, stay fp32: they are
few, and at a learning rate of 1e-3 a bf16 scale near 1 would never move. What is not trained stays as it is.
"""

import torch
from torch import nn

from thriftlab.optim import Method
from thriftlab.train.config.schema import RunConfig


def narrow(config: RunConfig, model: nn.Module, optimizer: Method) -> None:
    """Brings the trained matrices of a model to what is kept of them, before a backend takes it, and says in which
    dtype their gradients are summed."""
    train = config.train
    if train.weights != "fp32":
        optimizer.keep_weights(train.weights, train.rounding, config.seed)
    for p in model.parameters():
        if p.requires_grad and p.ndim > 1:
            p.grad_dtype = torch.bfloat16 if train.gradients == "bf16" else torch.float32
