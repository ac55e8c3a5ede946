"""Launches of an optimizer's step on a GPU, by method: `python -m tests.measure.launches [--preset llama-1b] [NAME ...]`.

Counted on fake CUDA tensors (tests/fake_cuda), so at any size and without a GPU. A foreach or fused operation is one
launch. The table of docs/gpu.md is this program's; tests/optim/test_launches.py holds the product to it.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.fake_cuda import process

RANK = 512
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "signsgd": ("signsgd", {}),
    "muon": ("muon", {}),
    "scale": ("scale", {}),
    "rmnp": ("rmnp", {}),
    "sinkgd": ("sinkgd", {}),
    "adam-mini": ("adam_mini", {}),
    "galore": ("galore", dict(rank=RANK)),
    "fira": ("fira", dict(rank=RANK)),
    "fira, exact": ("fira", dict(rank=RANK, residual="exact")),
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
    "adamw, bf16": ("adamw", dict(state_dtype="bf16")),
    "adamw, 8bit": ("adamw", dict(state_dtype="8bit")),
    "galore, 8bit": ("galore", dict(rank=RANK, state_dtype="8bit")),
    "frugal, columns, bf16": ("frugal", dict(subspace="columns", state_dtype="bf16")),
}


class Row(NamedTuple):
    """What one step is on a device."""

    launches: int
    matrices: int
    reads: int
    copies: int
    refresh_launches: int
    refresh_reads: int
    refresh_copies: int
    by_operation: dict[str, int]
    by_place: dict[str, int]
    places: dict[str, int]  # reads and copies of the plain step, by line
    refresh_places: dict[str, int]


def count(name: str, preset: str, deferred: bool) -> Row:
    """Two steps of a method, the first with a refresh; in the process that believes in a device."""
    import torch

    from tests.fake_cuda.counts import Counts, to_device
    from thriftlab.optim import METHODS as KINDS
    from thriftlab.optim import split_groups
    from thriftlab.train.model import GPT, ModelConfig

    kind, hyper = METHODS[name]
    with torch.device("meta"):
        model = GPT(ModelConfig(preset=preset, vocab_size=32000))
    to_device(model)
    groups = split_groups(model, include=[r"\.(attn|mlp)\."], roles=KINDS[kind].roles)
    optimizer = KINDS[kind](groups, lr=1e-3, weight_decay=0.1, **hyper)  # type: ignore[call-arg]
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    applied = dict(applied=torch.ones((), device="cuda")) if deferred else {}
    steps = []
    for _ in range(2):
        with Counts() as counts:
            optimizer.step(**applied)
        steps.append(counts.counted)
    first, plain = steps
    copies = [sum((c.to_device + c.to_host).values()) for c in steps]
    matrices = sum(len(group["params"]) for group in groups if group["split"])
    where = [{str(k): n for k, n in (c.reads + c.to_device + c.to_host).items()} for c in steps]
    return Row(
        sum(plain.launches.values()), matrices, sum(plain.reads.values()), copies[1],
        sum(first.launches.values()), sum(first.reads.values()), copies[0],
        dict(plain.launches.most_common()), dict(plain.where.most_common()), where[1], where[0],
    )  # fmt: skip


def table(rows: dict[str, Row]) -> str:
    """Markdown."""
    lines = [
        "| method | launches of a plain step | a matrix | host reads | launches of a refresh | its host reads |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        each = row.launches / row.matrices
        lines.append(
            f"| {name} | {row.launches:,} | {each:.1f} | {row.reads} | {row.refresh_launches:,} | {row.refresh_reads} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(METHODS), metavar="NAME")
    parser.add_argument("--preset", default="llama-1b")
    parser.add_argument("--plain", action="store_true", help="without `applied`, as in a loop of one's own")
    parser.add_argument("--why", action="store_true", help="also operations and lines")
    options = parser.parse_args()
    rows, began = {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, process(Path(folder)) as call:
        for name in options.names:
            rows[name] = row = call(count, name, options.preset, not options.plain)
            print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
            if options.why:
                print(name, row.by_operation, dict(list(row.by_place.items())[:12]), row.places, row.refresh_places)
    print(table(rows))


if __name__ == "__main__":
    main()
