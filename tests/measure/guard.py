"""What the guard of optim/core/guard.py costs beside the step that it guards, for every method.

    python -m tests.measure.guard

The tensors of LLaMA-60M, plain steps without a refresh, fp32, one thread, CPU time. In each round the step runs with
the guard and without it, in turn, on the same tensors and in one process; the guard is timed by itself as well, for
the difference of two steps drowns in their noise. A figure is the median of the rounds.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import nn

from thriftlab.optim import METHODS, Method, split_groups
from thriftlab.optim.core import guard
from thriftlab.optim.core.hyper import hyperparameters

GAP = 10**6  # one refresh, in the first step


def model(dim: int, layers: int) -> nn.Module:
    """The tensors of a LLaMA: seven matrices and two norms a layer, and a small embedding."""
    shapes = [(dim, dim)] * 4 + [(8 * dim // 3, dim)] * 2 + [(dim, 8 * dim // 3)]
    blocks = nn.ModuleList()
    for _ in range(layers):
        block = nn.Module()
        for i, shape in enumerate(shapes):
            block.register_parameter(f"w{i}", nn.Parameter(0.02 * torch.randn(shape)))
        for i in range(2):
            block.register_parameter(f"norm{i}", nn.Parameter(torch.ones(dim)))
        blocks.append(block)
    return nn.ModuleDict({"blocks": blocks, "embed": nn.Embedding(1024, dim)})


def optimizer(name: str, net: nn.Module) -> Method:
    own = {key: value for key, value in {"gap": GAP, "rank": 64}.items() if key in hyperparameters(METHODS[name])}
    return METHODS[name](split_groups(net, include=[r"\.w\d"]), lr=1e-4, **own)


@contextmanager
def checks(seconds: list[float], off: bool) -> Iterator[None]:
    """Times what is inside of `check`, or leaves it out."""
    plain = guard.check

    def timed(*given) -> None:
        start = time.thread_time()
        plain(*given)
        seconds.append(time.thread_time() - start)

    guard.check = (lambda *given: None) if off else timed
    try:
        yield
    finally:
        guard.check = plain


def step(method: Method) -> float:
    start = time.thread_time()
    method.step()
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        "method      step ms   guard ms   guard / step   microseconds a tensor   with / without: median (10 % - 90 %)"
    )
    for name in options.methods.split(","):
        net = model(options.dim, options.layers)
        parameters = list(net.parameters())
        for p in parameters:
            p.grad = torch.randn_like(p) / 100
        method = optimizer(name, net)
        for _ in range(2):
            method.step()
        shares, ratios, steps, guards = [], [], [], []
        for turn in range(options.rounds):
            took: dict[bool, float] = {}
            spent: list[float] = []
            for off in (False, True) if turn % 2 else (True, False):
                with checks(spent, off):
                    took[off] = step(method)
            steps.append(took[True])
            guards.append(sum(spent))
            shares.append(sum(spent) / took[True])
            ratios.append(took[False] / took[True])
        ratios.sort()
        spread = f"{ratios[len(ratios) // 10]:.3f} - {ratios[-1 - len(ratios) // 10]:.3f}"
        print(
            f"{name:10} {1e3 * median(steps):8.2f}   {1e3 * median(guards):8.3f}   {median(shares):12.2%}"
            f"   {1e6 * median(guards) / len(parameters):21.1f}   {median(ratios):.3f} ({spread})",
            flush=True,
        )


if __name__ == "__main__":
    main()
