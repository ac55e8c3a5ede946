"""Trajectories of published optimizers, and the groups of the model that they are of.

tests/optim/golden/NAME.npz has `init/TENSOR`, `grad/TENSOR` [25, ...] and `param/TENSOR` [3, ...] after the steps in
AFTER, in fp32. Nine tensors of a LLaMA block; of the 40 rows of the embedding 24 have no gradient in a step. Gradients
are given, so a difference does not grow by itself.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from thriftlab.optim.core.groups import ROLES

GOLDEN = Path(__file__).parent.parent / "optim" / "golden"
AFTER = (0, 9, 24)
STEPS = 25
NAMES = {name: f"layers.0.attn.{name}.weight" for name in "qkvo"} | {
    "embed": "embed.weight", "up": "layers.0.mlp.up.weight", "down": "layers.0.mlp.down.weight",
    "norm": "layers.0.attn_norm.weight", "head": "lm_head.weight",
}  # fmt: skip
ROLE = {"embed": "input", "head": "output", "norm": "vector"}


def groups_of(params, **by_role):
    """A group for each role, with hyper-parameters of its own."""
    found = []
    for role in ROLES:
        if here := [name for name in params if ROLE.get(name, "matrix") == role]:
            group = {"params": [params[name] for name in here], "names": [NAMES[name] for name in here]}
            found.append({**group, "split": role == "matrix", "role": role, **by_role.get(role, {})})
    return found


def farthest(name, make, lr):
    """The largest distance of a weight to the trajectory, in lr, by tensor; `make` takes the parameters by name."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    params = {key[5:]: nn.Parameter(torch.tensor(golden[key])) for key in golden if key.startswith("init/")}
    optimizer, far = make(params), dict.fromkeys(params, 0.0)
    for step in range(STEPS):
        for key, p in params.items():
            p.grad = torch.tensor(golden[f"grad/{key}"][step])
        optimizer.step()
        if step in AFTER:
            for key, p in params.items():
                want = golden[f"param/{key}"][AFTER.index(step)]
                far[key] = max(far[key], float(np.abs(p.detach().numpy() - want).max()) / lr)
    return far
