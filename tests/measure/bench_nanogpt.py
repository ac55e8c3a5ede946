"""Training speed beside nanoGPT: same size, same text, same machine, one process, steps taken in turn.

    python -m tests.measure.bench_nanogpt [--data prepared/embedded] [--threads 1] [--rounds 15]

The other side is nanoGPT's recipe rebuilt from its description: LayerNorm without bias, GELU, learned positions, fused
query-key-value, tied head, mean cross-entropy, clipping, torch's AdamW as it picks it on a CPU, random windows. Ours is
the project's own step, with everything that a run does in it. Prints tokens/s of both and the median and range of the
ratio, for wall and for CPU time. With OMP_NUM_THREADS unset or equal to --threads.
"""

import argparse
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from thriftlab.data.loader import batches
from thriftlab.data.mixture import plan
from thriftlab.data.shards import open_dataset
from thriftlab.optim import METHODS, split_groups
from thriftlab.train.backends import make_backend
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.step import micro_batch_rows, train_step

SHAPES = {  # width, layers, heads, our SwiGLU width, rows, tokens of a row
    "readme": (128, 4, 4, 336, 12, 64),  # nanoGPT's setting for a CPU
    "nano": (128, 4, 4, 336, 8, 256),
    "small": (256, 6, 8, 672, 8, 256),
}


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class NanoGPT(nn.Module):
    def __init__(self, vocab, length, dim, layers, heads):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.layers = nn.Sequential(*(Layer(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim, bias=False), nn.Linear(dim, vocab, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x, y):
        h = self.layers(self.tokens(x) + self.positions(torch.arange(x.shape[1])))
        return F.cross_entropy(self.head(self.norm(h)).flatten(0, 1), y.flatten())


def theirs(dataset, shape):
    dim, layers, heads, _, rows, length = shape
    tokens = np.concatenate([s for name in dataset.sources for s in dataset.windows(name, "train", length).shards])
    model = NanoGPT(dataset.tokenizer.vocab_size, length, dim, layers, heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))

    def batch():
        starts = torch.randint(len(tokens) - length - 1, (rows,))
        x = torch.stack([torch.from_numpy(tokens[i : i + length].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
        return x, y

    def step():
        model(*batch()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def ours(dataset, shape):
    dim, layers, heads, hidden, rows, length = shape
    vocab = dataset.tokenizer.vocab_size
    model = GPT(
        ModelConfig(preset=None, dim=dim, layers=layers, heads=heads, hidden=hidden, vocab_size=vocab, tied=True)
    )
    model.init_weights(0)
    backend = make_backend("single")
    backend.prepare(model, METHODS["adamw"](split_groups(model, [r"\.(attn|mlp)\."]), lr=1e-3))
    batch, count = batches(plan(dataset, length, rows, seed=0), 0, 1, backend.device), iter(range(10**9))
    micro_batch = micro_batch_rows(backend.device, length, dim)

    def step():
        train_step(backend, batch(next(count)), None, micro_batch, "fp32", 1.0)

    return model, step


def seconds(step):
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="prepared/embedded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = open_dataset(options.data)
    for name, shape in SHAPES.items():
        (our_model, our_step), (their_model, their_step) = ours(dataset, shape), theirs(dataset, shape)
        for _ in range(3):
            our_step(), their_step()
        pairs = [(seconds(our_step), seconds(their_step)) for _ in range(options.rounds)]
        tokens = shape[-1] * shape[-2]
        count = [sum(p.numel() for p in model.parameters()) for model in (our_model, their_model)]
        print(f"{name}: parameters {count[0]:,} ours, {count[1]:,} nanoGPT; {options.threads} thread(s)")
        for kind, which in (("wall", 0), ("cpu", 1)):
            rates = [statistics.median(tokens / p[side][which] for p in pairs) for side in (0, 1)]
            ratios = sorted(theirs_[which] / ours_[which] for ours_, theirs_ in pairs)
            print(
                f"  {kind}: {rates[0]:,.0f} tokens/s ours, {rates[1]:,.0f} nanoGPT; ours / nanoGPT "
                f"{statistics.median(ratios):.3f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} pairs)"
            )


if __name__ == "__main__":
    main()
