"""The product of LOST beside its two branches as they are written, and beside the dense product: forward and backward.

    python -m tests.measure.bench_lost

LLaMA-60M's three shapes, rank 128, density 0.01, SiLU, 2048 tokens, fp32, one thread. In each round every form runs
once, in turn; ratios are taken within a round.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from tests.tools.products import concatenated, gradients, tensors, traffic
from thriftlab.kernels.lost_linear import lost_linear, reference

SHAPES = {"q": (512, 512, 5), "gate": (512, 1376, 5), "down": (1376, 512, 13)}  # in, out, channels
FORMS = {"two branches": reference, "side by side": concatenated, "ours": lost_linear}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def dense(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(torch.nn.functional.linear(x, weight), (x, weight), grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("layer  form            ms     two branches' time over it: median (10 % - 90 % of rounds)    MB moved")
    for name, (inner, out, channels) in SHAPES.items():
        leaves, index, grad = tensors((options.tokens,), inner, options.rank, out, channels, torch.float32)
        weight = torch.randn(out, inner, requires_grad=True)
        calls = {form: lambda f=f, a=(leaves, index, grad): gradients(f, *a) for form, f in FORMS.items()}
        calls["dense"] = lambda x=leaves[0], w=weight, g=grad: dense(x, w, g)
        rounds = [{form: seconds(call) for form, call in calls.items()} for _ in range(options.rounds + 3)][3:]
        for form in calls:
            ratios = sorted(times["two branches"] / times[form] for times in rounds)
            spread = f"{ratios[len(ratios) // 10]:.2f} - {ratios[-1 - len(ratios) // 10]:.2f}"
            moved = f"{traffic(FORMS[form], leaves, index, grad) / 1e6:8.1f}" if form in FORMS else ""
            time_ms = 1e3 * median(times[form] for times in rounds)
            print(f"{name:6} {form:14} {time_ms:6.1f}   {median(ratios):5.2f} ({spread})   {moved}", flush=True)


if __name__ == "__main__":
    main()
