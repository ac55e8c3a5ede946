"""The check of several ranks: every backend beside one process, and what only a pair of ranks can show."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from thriftlab.launch.gpu.pair import started_pairs
from thriftlab.launch.gpu.runs import TRAIN, small_run, written
from thriftlab.launch.gpu.setting import Finding, Setting
from thriftlab.train.backends import BACKENDS
from thriftlab.train.backends.base import Backend
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.loop import run
from thriftlab.train.records.record import read_metrics


def ranks(setting: Setting) -> Iterator[Finding]:
    """Two steps of every backend under torchrun beside one process; on two GPUs where there are two, which the witness
    then compares as well, and of which one is killed, and sums are timed."""
    world = min(2, torch.cuda.device_count()) if setting.on_gpu else 1
    tokens = {"budget": {"tokens": 2 * setting.size(8 * 128, 2 * 16)}, "checkpoint": {"every": 0}}
    run(single := small_run(setting, "single", **tokens))
    right = losses_of(single)
    pairs = started_pairs(setting) if world == 2 or setting.small else []
    cases = [case for case in backend_cases() if not setting.small or case["name"] == "owned"]
    started = {}
    for case in cases:  # all at once: most of their time is that of starting
        name = " ".join(map(str, case.values()))
        config = small_run(setting, name.replace(" ", "-"), **tokens, backend={**case, "timeout": 30})
        started[name] = config, torchrun(config, world, setting.folder)
    rows: dict[str, Any] = {}
    numbers: dict[str, Any] = {"world": world, "backends": rows, "single": right}
    wrong: list[str] = []
    says = ""
    for name, (config, process) in started.items():
        code = process.wait()
        if code:
            log = (Path(config.out).with_suffix(".log")).read_text(errors="replace").strip().splitlines()
            wrong.append(f"{name}: exit code {code}: {' | '.join(log[-2:])}")
            continue
        losses = losses_of(config)
        far = max(abs(a - b) for a, b in zip(losses, right, strict=True))
        rows[name] = {"losses": losses, "far": far}
        if not far < 1e-4:
            wrong.append(f"{name}: a loss is {far:.1e} nats from one process's")
        says = f"{len(rows)} backends on {world} GPU(s) as one process" if setting.on_gpu else f"{len(rows)} on the CPU"
        yield Finding(says, numbers, wrong)
    for end in pairs:
        found = end()
        says, numbers = "; ".join(filter(None, [says, found.says])), numbers | found.numbers
        wrong += found.wrong
        yield Finding(says, numbers, wrong)
    if not rows:
        yield Finding(says, numbers, wrong)


def backend_cases() -> Iterator[dict[str, Any]]:
    """Every backend of several ranks, and every stage of one that has stages."""
    for name, backend in BACKENDS.items():
        if name != Backend.name:
            stages = (1, 2, 3) if "stage" in inspect.signature(backend).parameters else (None,)
            yield from ({"name": name, **({"stage": stage} if stage else {})} for stage in stages)


def torchrun(config: RunConfig, world: int, folder: Path) -> subprocess.Popen:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), "-m", *TRAIN[2:]]
    with open(Path(config.out).with_suffix(".log"), "wb") as log:
        return subprocess.Popen([sys.executable, *words, str(written(config))], stdout=log, stderr=subprocess.STDOUT)


def losses_of(config: RunConfig) -> list[float]:
    lines = read_metrics(Path(config.out) / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]
