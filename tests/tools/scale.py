"""A small crooked model, trained by one process and by several: what tests of backends hold against each other."""

import torch

from thriftlab.optim import LAYERS, convert, split_groups
from thriftlab.train.backends import make_backend
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.windows import autocast

# Odd sizes, tied weights; a hidden size that no world divides.
CONFIG = ModelConfig(preset=None, dim=10, layers=2, heads=1, hidden=13, vocab_size=17, tied=True, init_std=0.2)
ROWS, SEQ = 12, 6
MATRICES = [r"\.(attn|mlp)\."]


def make(maker, dtype=torch.float32, checkpointing=False, layer=None, frozen=None, **hyper):
    """Model and optimizer, the same everywhere; with a layer in the place of every matrix of a block, and with what has
    `frozen` in its name frozen."""
    model = GPT(CONFIG, checkpointing).to(dtype)
    if layer:
        convert(model, LAYERS[layer], MATRICES, rank=0.4)
    model.init_weights(0)
    for name, p in model.named_parameters():
        p.requires_grad_(frozen is None or frozen not in name)
    return model, maker(split_groups(model, MATRICES, roles=getattr(maker, "roles", False)), **hyper)


def batch(step, rank, world):
    """Inputs and targets of one rank; at every third step the last one has no token to predict."""
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(CONFIG.vocab_size, (ROWS, SEQ + 1), generator=draw)[rank::world]
    targets = tokens[:, 1:].clone()
    if step % 3 == 2 and rank == world - 1:
        targets[:] = -1
    return tokens[:, :-1], targets


def one_step(backend, parts, max_norm=None, micro_batches=1, precision="fp32"):
    """A step on the (inputs, targets) of every rank that this process stands for; the norm, and whether it counted."""
    micro = [
        pair
        for inputs, targets in parts
        for pair in zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True)
    ]
    count = backend.sum(sum((targets >= 0).sum() for _, targets in micro).double())
    for i, (inputs, targets) in enumerate(micro):
        with backend.micro_batch(last=i == len(micro) - 1):
            with autocast(backend.device, precision):
                loss = backend.module(inputs, targets).sum()
            backend.backward(loss)
    norm, applied = backend.step(1 / count, max_norm)
    return norm.item(), bool(applied)


def alone(maker, world, steps, dtype=torch.float32, layer=None, frozen=None, **how):
    """What one process makes of the ranks' batches, in their order: weights and norms."""
    model, optimizer = make(maker, dtype, layer=layer, frozen=frozen)
    backend = make_backend("single")
    backend.prepare(model, optimizer)
    norms = [one_step(backend, [batch(t, r, world) for r in range(world)], **how)[0] for t in range(steps)]
    return weights_of(model), norms


def weights_of(model):
    """Whole, also of tensors that FSDP2 has cut: then all ranks call it together."""
    return {name: getattr(p.detach(), "full_tensor", p.detach)().clone() for name, p in model.named_parameters()}


def distance(a, b):
    assert a.keys() == b.keys()
    return max((torch.as_tensor(a[name]) - torch.as_tensor(b[name])).abs().max().item() for name in a)
