"""Models to put layers into: a small one that is filled, LLaMA's sizes without memory, and what the papers print."""

import torch

from thriftlab.train.model import GPT, ModelConfig

BLOCKS = (r"\.(attn|mlp)\.",)
RANKS = {"llama-60m": 128, "llama-130m": 256, "llama-350m": 256, "llama-1b": 512, "llama-7b": 1024}


def tiny(**sizes):
    """Two layers, filled."""
    sizes = dict(preset=None, dim=32, layers=2, heads=2, hidden=48, vocab_size=19) | sizes
    model = GPT(ModelConfig(**sizes))
    model.init_weights(0)
    return model


def on_meta(preset, **sizes):
    with torch.device("meta"):
        return GPT(ModelConfig(preset=preset, vocab_size=32000, **sizes))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def tokens(batch=2, length=9, vocab=19):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def as_printed(number, like):
    return f"{number:.{len(like.partition('.')[2])}f}"
