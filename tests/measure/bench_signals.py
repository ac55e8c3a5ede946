"""What a step costs under a signal, beside the same step under the plain mean.

    OMP_NUM_THREADS=1 python -m tests.measure.bench_signals [--dim 256] [--layers 4] [--rows 16] [--rounds 40]

A GPT of 4,096 tokens of vocabulary, windows of 256 tokens, fp32, AdamW, one thread; the batch is whole or in four
micro-batches. In each round every kind of step is taken once, in a changing order. Prints the median over the rounds of
its CPU time over that of the uniform step that is split alike, and a 95 % interval of that median.
"""

import argparse
import random
import statistics
import time

import torch

from thriftlab.data.loader import Batch
from thriftlab.optim import AdamW, split_groups
from thriftlab.train.backends.base import Backend
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.objective import Objective
from thriftlab.train.signals import SIGNALS
from thriftlab.train.step import train_step

VOCABULARY, SEQ = 4096, 256
STEPS = {  # signal, its options, statistics
    "uniform": ("uniform", {}, "exact"),
    "linupper, lagged": ("linupper", {}, "lagged"),
    "linupper, exact": ("linupper", {}, "exact"),
    "linupper of documents, lagged": ("linupper", {"unit": "document"}, "lagged"),
    "linupper of documents, exact": ("linupper", {"unit": "document"}, "exact"),
    "extremes with a cap, lagged": ("extremes", {"w_max": 2.0}, "lagged"),
    "focal": ("focal", {}, "exact"),
    "domains": ("domains", {}, "exact"),
    "rho1, lagged": ("rho1", {"reference": "-"}, "lagged"),
    "rho1, exact": ("rho1", {"reference": "-"}, "exact"),
}


def steps(options):
    """(name, micro-batches) -> a function that takes one step."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(preset=None, dim=options.dim, layers=options.layers, heads=4, vocab_size=VOCABULARY))
    model.init_weights(0)
    backend = Backend()
    backend.prepare(model, AdamW(split_groups(model, [r"\.(attn|mlp)\."]), lr=1e-4))
    rows = options.rows
    batch = Batch(torch.randint(VOCABULARY, (rows, SEQ + 1)), torch.arange(rows) % 15, torch.arange(rows))
    losses = 8 + torch.randn(rows, SEQ)

    def step(name, micro_batches):
        signal, given, statistics_ = STEPS[name]
        made = SIGNALS[signal](**given)
        reference = (lambda _: losses) if made.reference else None
        objective = Objective(made, [str(i) for i in range(15)], statistics_, delimiter=7, reference=reference)
        objective.at(0, 0.5)
        return lambda: train_step(backend, batch, None, rows // micro_batches, "fp32", 1.0, objective)

    return {(name, n): step(name, n) for n in (1, 4) for name in STEPS}


def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    calls, rounds = steps(options), []
    for turn in range(-2, options.rounds):
        taken = {key: seconds(calls[key]) for key in random.sample(list(calls), len(calls))}
        rounds += [taken] if turn >= 0 else []
    print("micro-batches  signal                          ms    of uniform: median (95 %)")
    for (name, n), ratios in {key: sorted(t[key] / t["uniform", key[1]] for t in rounds) for key in calls}.items():
        aside = max(0, int(len(ratios) / 2 - 0.98 * len(ratios) ** 0.5))  # order statistics around a median
        interval = f"{ratios[aside]:.3f} - {ratios[-1 - aside]:.3f}"
        time_ms = 1e3 * statistics.median(t[name, n] for t in rounds)
        print(f"{n:13}  {name:30} {time_ms:5.0f}    {statistics.median(ratios):.3f} ({interval})")
    whole = sorted(t["linupper, exact", 1] / t["uniform", 4] for t in rounds)
    print(f"linupper, exact, whole, over uniform in four: {statistics.median(whole):.3f}")


if __name__ == "__main__":
    main()
