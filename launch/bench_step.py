"""thriftlab bench step: what a whole training step of each method costs, forward, backward and update.

Methods are measured one after another, since two large models may not fit beside each other; so a change of the
machine's speed meanwhile is part of their difference, and the range over the rounds shows some of it.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import Field

from thriftlab.data.errors import ConfigError
from thriftlab.data.files import make_folder, replace_atomically
from thriftlab.data.paths import FilePath
from thriftlab.launch.bench import spread
from thriftlab.launch.probe import configured, made_up_text, opened, stepper
from thriftlab.launch.studies.arms import Arm
from thriftlab.launch.studies.compare import CompareConfig, make_comparison
from thriftlab.launch.timing import gpu_seconds, peak_allocation, wall_seconds
from thriftlab.optim import state_bytes
from thriftlab.train.backends.device import choose_device, warn_of_idle_gpu
from thriftlab.train.config.choice import Section
from thriftlab.train.config.parse import Settings, validate
from thriftlab.train.records.record import provenance
from thriftlab.train.records.speed import mfu

WARM = 3  # steps before the first that counts: compilation, the allocator, the first refresh


class StepBench(Section):
    """How steps are timed."""

    rounds: int = Field(7, ge=1, description="steps of each method that count")
    out: FilePath | None = Field(None, description="JSON file for every number; null: none")


@dataclass(frozen=True)
class Row:
    """One method and what was measured of it."""

    method: str
    seconds: list[float]
    tokens: int  # of one step
    mfu: float | None
    state_bytes: int
    transient_bytes: int  # beyond weights, state and what else stays


def bench_steps(settings: Settings) -> dict[str, Any]:
    """Time a step of each method, print a table and return its numbers. `settings` as for `thriftlab compare`."""
    options = validate(StepBench, settings.pick([*StepBench.model_fields]))
    asked = settings.drop([*StepBench.model_fields])
    asked.words = settings.words
    if idle := asked.tree.keys() & CompareConfig.model_fields.keys():
        raise ConfigError(f"{', '.join(sorted(idle))}: has no effect on the time of a step; leave it out")
    comparison = make_comparison(asked)
    if options.out:
        make_folder(Path(options.out).parent)
    warn_of_idle_gpu(comparison.base.backend.device)
    device = choose_device(comparison.base.backend.device)
    request = comparison.request()
    with tempfile.TemporaryDirectory(prefix="thriftlab-bench-") as folder:
        given = "data" in settings.tree and "path" in settings.tree["data"]
        data = request.base["data"]["path"] if given else made_up_text(Path(folder) / "text", documents=400)
        own = {"data": {**request.base["data"], "path": str(data)}, "out": str(Path(folder) / "run")}
        rows = [measured({**request.base, **own}, arm, device, options.rounds) for arm in request.arms]
    origin = provenance()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else origin["machine"]["cpu"]
    result: dict[str, Any] = {**origin, "device": name, "threads": torch.get_num_threads(), "config": request.base}
    result["rows"] = list(map(asdict, rows))
    print(table(result, rows))
    if options.out:
        replace_atomically(Path(options.out), json.dumps(result, indent=1).encode())
    return result


def measured(base: dict[str, Any], arm: Arm, device: torch.device, rounds: int) -> Row:
    """One arm: some steps ahead, then those that count, then one for its memory."""
    seconds = gpu_seconds if device.type == "cuda" else partial(wall_seconds, device=device)
    config = configured(base, arm.tree)
    with opened(config) as run:
        step = stepper(run)
        for _ in range(WARM):
            step()
        taken = [seconds(step) for _ in range(rounds)]
        tokens = config.train.batch_size * config.data.sequence_length
        share = mfu(tokens / median(taken), run.flops_per_token, device)
        held = state_bytes(run.optimizer)
        return Row(arm.name, taken, tokens, share, held, peak_allocation(step, device))


def table(result: dict[str, Any], rows: list[Row]) -> str:
    """Markdown, one row a method: median (range)."""
    c = result["config"]
    length, windows, precision = c["data"]["sequence_length"], c["train"]["batch_size"], c["train"].get("precision")
    lines = [
        f"{c['model'].get('preset')}, {windows} x {length} tokens, {precision}, {result['device']}, "
        f"torch {torch.__version__}, commit {(result['commit'] or 'none')[:10]}",
        "",
        "| method | step, s | tokens/s | MFU | state MB | transient MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "-" if row.mfu is None else f"{row.mfu:.1%}"
        lines.append(
            f"| {row.method} | {spread(row.seconds)} | {row.tokens / median(row.seconds):,.0f} | {share} "
            f"| {row.state_bytes / 1e6:.1f} | {row.transient_bytes / 1e6:.1f} |"
        )
    return "\n".join(lines)
