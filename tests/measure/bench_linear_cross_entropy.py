"""The loss of a linear head with its log-probabilities kept, recomputed, and by torch's own two functions.

    OMP_NUM_THREADS=1 python -m tests.measure.bench_linear_cross_entropy \
        [--tokens 2048] [--dim 256] [--vocab 4096] [--bf16]

Forward and backward with a weight for every token, taken in turn in a changing order. Prints the lower quartile of each
one's CPU time and the median over the rounds of its ratio to the kept one. `forward` is ours without a backward.
"""

import argparse
import random
import statistics
import time

import torch
import torch.nn.functional as F

from thriftlab.kernels.linear_cross_entropy import linear_cross_entropy


def seconds(loss, inputs, upstream, forward_only):
    start = time.process_time()
    with torch.set_grad_enabled(not forward_only):
        losses = loss(*inputs)
    if not forward_only:
        torch.autograd.grad(losses, inputs[:2], upstream)
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    options = parser.parse_args()
    hidden = torch.randn(options.tokens, options.dim).requires_grad_()
    weight = (torch.randn(options.vocab, options.dim) / options.dim**0.5).requires_grad_()
    inputs = hidden, weight, torch.randint(options.vocab, (options.tokens,))
    upstream = torch.rand(options.tokens)
    arms = {
        "kept": (lambda *x: linear_cross_entropy(*x, None), False),
        "recomputed": (lambda *x: linear_cross_entropy(*x, 0), False),
        "torch": (lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t, reduction="none"), False),
        "forward": (linear_cross_entropy, True),
    }
    times = {name: [] for name in arms}
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
        for turn in range(-2, options.rounds):
            for name in random.sample(list(arms), len(arms)):
                taken = seconds(arms[name][0], inputs, upstream, arms[name][1])
                times[name] += [taken] if turn >= 0 else []
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times["kept"], strict=True))
        print(f"{name}: {1e3 * statistics.quantiles(taken)[0]:.1f} ms, {ratio:.2f} of kept")


if __name__ == "__main__":
    main()
