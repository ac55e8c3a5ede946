"""Launches of an optimizer's step on a GPU, by method: `python -m tests.measure.launches [--preset P] [NAME ...]`.

Counted on fake CUDA tensors (tests/fake_cuda), so at any size and without a GPU. A foreach or fused operation is one
launch where torch makes it one. The table of docs/measurements.md is this program's; tests/optim/test_launches.py holds
the product to it.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from tests.fake_cuda import process

RANK, LAYERS = 512, 2
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "signsgd": ("signsgd", {}),
    "muon": ("muon", {}),
    "normuon": ("normuon", {}),
    "scale": ("scale", {}),
    "rmnp": ("rmnp", {}),
    "sinkgd": ("sinkgd", {}),
    "adam-mini": ("adam_mini", {}),
    "stable-spam": ("stable_spam", {}),
    "stable-spam, total": ("stable_spam", dict(total=1000)),
    "soap": ("soap", {}),
    "conda": ("conda", {}),
    "dion2": ("dion2", {}),
    "galore": ("galore", dict(rank=RANK)),
    "fira": ("fira", dict(rank=RANK)),
    "fira, exact": ("fira", dict(rank=RANK, residual="exact")),
    "subtrack": ("subtrack", dict(rank=RANK)),
    "apollo": ("apollo", dict(rank=RANK)),
    "apollo-mini": ("apollo", dict(rank=1, granularity="tensor", scale=128.0)),
    "badam": ("badam", {}),
    "frugal, blocks": ("frugal", dict(subspace="blocks")),
    "frugal, columns": ("frugal", dict(subspace="columns")),
    "frugal, rows": ("frugal", dict(subspace="rows")),
    "frugal, coordinates": ("frugal", dict(subspace="coordinates")),
    "frugal, svd": ("frugal", dict(subspace="svd")),
    "frugal, columns, lion": ("frugal", dict(subspace="columns", rule="lion")),
    "frugal, columns, sgdm": ("frugal", dict(subspace="columns", rule="sgdm", free="sgd")),
    "frugal, columns, lion for all": ("frugal", dict(subspace="columns", rule="lion", plain="rule")),
    "adamw, tables by ember": ("adamw", dict(tables="ember")),
    "adamw, bf16": ("adamw", dict(state_dtype="bf16")),
    "adamw, 8bit": ("adamw", dict(state_dtype="8bit")),
    "galore, 8bit": ("galore", dict(rank=RANK, state_dtype="8bit")),
    "frugal, columns, bf16": ("frugal", dict(subspace="columns", state_dtype="bf16")),
}
KEPT_WIDE = [name for name, (_, hyper) in METHODS.items() if "state_dtype" not in hyper]  # shown

FUSED = ("adamw", "signsgd", "badam", "frugal, blocks", "frugal, columns", "frugal, rows")  # whole by one kernel


class Row(NamedTuple):
    """What steps are on a device: a first one, with a refresh, and a plain one."""

    matrices: int
    plain: Any  # Counted
    first: Any

    def launches(self) -> int:
        return sum(self.plain.launches.values())


def count(
    name: str, preset: str, layers: int | None, deferred: bool, weights: str = "fp32", kernels: str = "torch"
) -> Row:
    """Steps of a method, with weights kept so, by kernels or not; in the process that believes in a device."""
    import torch

    from tests.fake_cuda.counts import Counts

    model, optimizer = made(name, preset, layers)
    if weights != "fp32":
        optimizer.keep_weights(weights)
        for p in model.parameters():
            p.grad = None
            p.grad = torch.empty_like(p)
    applied = dict(applied=torch.ones((), device="cuda")) if deferred else {}
    steps = []
    for _ in range(2):
        with patch.dict(os.environ, THRIFTLAB_KERNELS=kernels), Counts() as counts:
            optimizer.step(**applied)
        steps.append(counts.counted)
    matrices = sum(len(group["params"]) for group in optimizer.param_groups if group["split"])
    return Row(matrices, steps[1], steps[0])


def made(name: str, preset: str, layers: int | None, **more: Any) -> tuple[Any, Any]:
    """A model on the device and an optimizer, with gradients."""
    import torch

    from tests.fake_cuda.counts import to_device
    from thriftlab.optim import METHODS as KINDS
    from thriftlab.optim import split_groups
    from thriftlab.train.model import GPT, PRESETS, ModelConfig

    kind, hyper = METHODS[name]
    layers = layers or PRESETS[preset]["layers"]
    with torch.device("meta"):
        model = GPT(ModelConfig(preset=preset, layers=layers, vocab_size=32000))
    to_device(model)
    groups = split_groups(model, include=[r"\.(attn|mlp)\."], roles=KINDS[kind].roles or "tables" in hyper)
    optimizer = KINDS[kind](groups, **{"lr": 1e-3, "weight_decay": 0.1, **hyper, **more})  # type: ignore[call-arg]
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    return model, optimizer


def waits(counted: Any) -> int:
    """How often the host waits for the device."""
    return sum(counted.reads.values()) + sum(n for (_, waits), n in counted.to_host.items() if waits)


def table(rows: dict[str, tuple[Row, Row]]) -> str:
    """Markdown: of each method the whole model and two layers of it."""
    lines = [
        "| method | launches of a plain step | a matrix | with two layers | host reads | host reads of a refresh |",
        "|---|---|---|---|---|---|",
    ]
    for name, (row, small) in rows.items():
        lines.append(
            f"| {name} | {row.launches():,} | {row.launches() / row.matrices:.1f} | {small.launches():,} | "
            f"{waits(row.plain)} | {waits(small.first)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=KEPT_WIDE, metavar="NAME")
    parser.add_argument("--preset", default="llama-1b")
    parser.add_argument("--plain", action="store_true", help="without `applied`, as in a loop of one's own")
    parser.add_argument("--weights", default="fp32", help="how weights are kept: train.weights")
    parser.add_argument("--kernels", default="torch", choices=["torch", "auto"], help="auto: as on a GPU")
    parser.add_argument("--why", action="store_true", help="also operations and lines")
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder, process(Path(folder)) as call:
        for name in options.names:
            how = not options.plain, options.weights, options.kernels
            sizes = [call(count, name, options.preset, layers, *how) for layers in (None, LAYERS)]
            rows[name] = sizes[0], sizes[1]
            print(name, sizes[0].launches(), file=sys.stderr)
            if options.why:
                print(name, *sizes[0].plain[:2], sizes[0].plain.reads, sizes[0].first.reads)
    print(table(rows))


if __name__ == "__main__":
    main()
