"""Recorded trajectories (tests/optim/trajectories): weights of nine small tensors over 25 steps of given gradients.

Numbers of a published code, or, where it has no licence or there is none, of a float64 program written from the paper.
A file has init/NAME, grad/NAME [25, ...], and param/NAME, the weights after the steps (from 0) in `steps`.
"""

from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "optim" / "trajectories"
MATRICES = ("q", "k", "v", "o", "up", "down")
OTHERS = ("embed", "norm", "head")


def recorded(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def follow(record, make):
    """The largest distance of a weight from the recorded one; `make` makes the optimizer of parameters by name."""
    params = {name: torch.nn.Parameter(torch.tensor(record[f"init/{name}"])) for name in (*MATRICES, *OTHERS)}
    optimizer, far = make(params), 0.0
    after = {int(step): place for place, step in enumerate(record["steps"])}
    for t in range(len(record["grad/q"])):
        for name, p in params.items():
            p.grad = torch.tensor(record[f"grad/{name}"][t])
        optimizer.step()
        if t in after:
            far = max(far, *(float((p.detach() - torch.tensor(record[f"param/{name}"][after[t]])).abs().max())
                             for name, p in params.items()))  # fmt: skip
    return far


def split(params, **plain):
    """Groups: the matrices of the blocks, and the rest, which is not split."""
    return [
        {"params": [(name, params[name]) for name in MATRICES]},
        {"params": [(name, params[name]) for name in OTHERS], "split": False, **plain},
    ]
