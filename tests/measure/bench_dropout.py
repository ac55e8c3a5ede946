"""What a step costs with dropout, beside the same step without it, and with torch's dropout at the same places.

    OMP_NUM_THREADS=1 python -m tests.measure.bench_dropout [--rounds 40]

A GPT of 1,024 tokens of vocabulary, 8 windows of 256 tokens, fp32, AdamW, one thread, micro-batches as in a run. In
each round every kind of step is taken once, in a changing order. Prints the median over the rounds of its CPU time over
that of the step without dropout, and the quarters of the ratios.
"""

import argparse
import random
import statistics
import time

import torch
import torch.nn.functional as F

from thriftlab.data.loader import Batch
from thriftlab.optim import AdamW, split_groups
from thriftlab.train import model as model_file
from thriftlab.train.backends.base import Backend
from thriftlab.train.dropout import dropout, row_keys
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.step import micro_batch_rows, train_step

VOCABULARY, ROWS, SEQ, RATE = 1024, 8, 256, 0.1
SHAPES = {"nano": (128, 4, 4, 352), "small": (256, 6, 8, 704)}  # width, layers, heads, MLP
KINDS = {"off": None, "keyed": dropout, "torch": lambda x, rate, keys, place: F.dropout(x, rate)}


def steps(dim, layers, heads, hidden):
    """Kind -> a function that takes one step and returns its CPU time."""
    torch.manual_seed(0)
    sizes = ModelConfig(preset=None, dim=dim, layers=layers, heads=heads, hidden=hidden, vocab_size=VOCABULARY)
    model = GPT(sizes, dropout=RATE)
    model.init_weights(0)
    backend = Backend()
    backend.prepare(model, AdamW(split_groups(model, [r"\.(attn|mlp)\."]), lr=1e-4))
    batch = Batch(torch.randint(VOCABULARY, (ROWS, SEQ + 1)), torch.zeros(ROWS), torch.arange(ROWS))
    rows = micro_batch_rows(backend.device, SEQ, dim)

    def step(kind):
        model_file.dropout = KINDS[kind] or dropout
        start = time.process_time()
        keys = row_keys(0, 0, ROWS, 0, 1, backend.device) if KINDS[kind] else None
        train_step(backend, batch, None, rows, "fp32", 1.0, row_keys=keys)
        return time.process_time() - start

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        step, kinds, times = steps(*shape), [*KINDS], []
        for kind in kinds * 2:
            step(kind)
        for _ in range(options.rounds):
            random.shuffle(kinds)
            times.append({kind: step(kind) for kind in kinds})
        for kind in ("keyed", "torch"):
            low, middle, high = statistics.quantiles((each[kind] / each["off"] for each in times), n=4)
            print(f"{name}: {kind} {middle:.3f} ({low:.3f} to {high:.3f}) of the step without dropout")


if __name__ == "__main__":
    main()
