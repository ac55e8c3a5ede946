"""The rows of the cross-entropy on a CPU: what the loss does to logits beside its products, and what would be faster.

    OMP_NUM_THREADS=1 python -m tests.measure.bench_cross_entropy_rows [--bf16] [--rounds 15]

Loss and gradient of 2048 x 32000 logits, a weight for every token, taken in turn in a changing order:

    torch               F.cross_entropy of all rows at once, and its autograd
    ours                as linear_cross_entropy does it in plain torch, by blocks of rows
    not in place        with the log-probabilities of a block beside its logits, as it was
    ours, compiled      the same operations by torch.compile
    by lse, compiled    the reference of cross_entropy_rows.py by torch.compile: logits are kept, and one number a row

Prints the lower quartile of each one's CPU time, the median over the rounds of the time of ours over it, and whether
the gradient has the bits of ours.
"""

import argparse
import random
import statistics
import time

import torch
import torch.nn.functional as F

from thriftlab.kernels.cross_entropy_rows import ce_grad_torch_, ce_stats_torch
from thriftlab.kernels.linear_cross_entropy import grad_of_, losses_of

ROWS, VOCAB = 2048, 32000


BLOCKS = [slice(start, start + 64) for start in range(0, ROWS, 64)]  # as linear_cross_entropy.blocks


def all_at_once(logits, targets, grad):
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(logits.float(), targets, reduction="none"), logits, grad)


def in_place(logits, targets):
    block = logits.float()
    torch.log_softmax(block, -1, out=block)
    return losses_of(block, targets, False)[0], block


def beside(logits, targets):
    block = logits.float().log_softmax(-1)
    return losses_of(block, targets, False)[0], block


def grad_of(block, targets, grad, dtype):
    return grad_of_(block, targets, None, grad).to(dtype)


def by_log_probabilities(forward, backward):
    def run(logits, targets, grad):
        kept = [forward(logits[block], targets[block])[1] for block in BLOCKS]
        return [backward(kept.pop(0), targets[block], grad[block], logits.dtype) for block in BLOCKS]

    return run


def by_lse(forward, backward):
    def run(logits, targets, grad):
        kept = [forward(logits[block], targets[block])[1] for block in BLOCKS]
        return [backward(logits[block], targets[block], kept.pop(0), grad[block]) for block in BLOCKS]

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bf16", action="store_true", help="logits")
    options = parser.parse_args()
    logits = torch.randn(ROWS, VOCAB).to(torch.bfloat16 if options.bf16 else torch.float32)
    targets, grad = torch.randint(VOCAB, (ROWS,)), torch.rand(ROWS)
    compiled = [torch.compile(f, dynamic=False) for f in (in_place, grad_of, ce_stats_torch, ce_grad_torch_)]
    arms = {
        "ours": by_log_probabilities(in_place, grad_of),
        "torch": all_at_once,
        "not in place": by_log_probabilities(beside, grad_of),
        "ours, compiled": by_log_probabilities(*compiled[:2]),
        "by lse, compiled": by_lse(*compiled[2:]),
    }
    times, same, ours = {name: [] for name in arms}, {}, torch.empty(0)
    for turn in range(-2, options.rounds):
        for name in list(arms) if turn == -2 else random.sample(list(arms), len(arms)):
            given = logits.clone()  # one arm overwrites them
            start = time.process_time()
            found = arms[name](given, targets, grad)
            times[name] += [time.process_time() - start] if turn >= 0 else []
            if turn == -2:
                found = torch.cat(list(found))
                ours = found if name == "ours" else ours
                same[name] = torch.equal(found, ours)
            del found
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["ours"], taken, strict=True))
        bits = "the same bits" if same[name] else "other bits"
        print(f"{name:18} {1e3 * statistics.quantiles(taken)[0]:4.0f} ms, {ratio:.2f} x as fast as ours, {bits}")


if __name__ == "__main__":
    main()
