"""The check of a GPU against a CPU: the same runs on both."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from thriftlab.launch.gpu.methods import with_rank
from thriftlab.launch.gpu.setting import Finding, Setting
from thriftlab.launch.peers import variants
from thriftlab.launch.probe import configured, loss_of, opened, stepper

STEPS, TOLERANCE = 20, 1e-4


def agree(setting: Setting) -> Iterator[Finding]:
    """Every method in fp32: the losses of some steps nearly equal, and the integers of its subspaces equal."""
    rows: dict[str, Any] = {}
    wrong: list[str] = []
    for label, (name, hyper) in variants().items():
        optim = {"name": name, **with_rank(name, hyper, setting.size(32, 8))}
        here, there = (trained(setting, optim, device) for device in ("cpu", str(setting.device)))
        far = max(abs(a - b) for a, b in zip(here[0], there[0], strict=True))
        other = sorted(key for key in here[1] if not torch.equal(here[1][key], there[1][key]))
        rows[label] = {"far": far, "integers": len(here[1]), "other": other, "losses": there[0]}
        if not far < TOLERANCE:
            wrong.append(f"{label}: a loss is {far:.1e} nats from the CPU's, {TOLERANCE} is allowed")
        if other:
            wrong.append(f"{label}: {len(other)} integers of the state differ, as {other[0]}")
        worst = max(row["far"] for row in rows.values())
        yield Finding(f"{len(rows)} methods, losses within {worst:.1e} nats of the CPU's", {"methods": rows}, wrong)


def trained(setting: Setting, optim: dict[str, Any], device: str) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a run on this device, and the integers in the optimizer's state at its end."""
    config = configured(
        {
            "model": setting.model({"preset": "nano"}),
            "data": {"path": str(setting.text), "sequence_length": setting.size(64, 16)},
            "train": {"batch_size": setting.size(8, 2), "precision": "fp32"},
            "optim": optim,
            "backend": {"device": device},
            "out": str(setting.folder / "run"),
        }
    )
    with opened(config) as run:
        step = stepper(run)
        losses = [loss_of(run, step()) for _ in range(setting.size(STEPS, 3))]
        state = {key: piece.tensor.cpu() for key, piece in run.backend.states().items()}
    return losses, {key: tensor for key, tensor in state.items() if not tensor.dtype.is_floating_point}
