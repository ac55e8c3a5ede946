"""Checks of whole runs: checkpoints, the loader and evaluation."""

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from thriftlab.data.files import write_json
from thriftlab.launch.gpu.setting import Finding, Setting
from thriftlab.launch.probe import batches_of, configured, opened, stepper
from thriftlab.launch.timing import wall_seconds
from thriftlab.train.checkpoints.writer import Writer
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.loop import measure, run

TRAIN = [sys.executable, "-m", "thriftlab.launch", "train", "--config"]
POLL = 0.01  # seconds


def checkpoint(setting: Setting) -> Iterator[Finding]:
    """How long training stands still for a checkpoint, and a run that is killed and resumed beside an unbroken one."""
    numbers: dict[str, Any] = {"copies": copies(setting)}
    yield Finding("", numbers)
    given = {
        "model": setting.model({"preset": "llama-130m"}), "out": str(setting.folder / "large"),
        "data": {"path": str(setting.text), "sequence_length": setting.size(256, 16)},
        "train": {"batch_size": 2}, "backend": {"device": str(setting.device)},
    }  # fmt: skip
    with opened(configured(given)) as parts:
        stepper(parts)()
        held = {"model": parts.backend.weights(), "optim": parts.backend.states()}
        size = sum(piece.tensor.nbytes for pieces in held.values() for piece in pieces.values())
        writer = Writer(setting.folder / "large", keep=1)
        blocked = wall_seconds(lambda: writer.save(1, held, {}), setting.device)
        written = wall_seconds(writer.wait, setting.device)
    numbers |= {"bytes": size, "blocked_seconds": blocked, "written_seconds": written}
    says = f"{size / 1e9:.2f} GB: training waits {blocked:.2f} s, on the disk after {written:.1f} s more"
    yield Finding(says, numbers)

    unbroken, broken = (small_run(setting, name) for name in ("unbroken", "broken"))
    run(unbroken)
    numbers["killed_at"] = killed(broken)
    run(broken)
    parts_of = [last_weights(config) for config in (unbroken, broken)]
    numbers["bitwise"] = same = all(torch.equal(parts_of[0][key], parts_of[1][key]) for key in parts_of[0])
    wrong = [] if same else ["a run that was killed and resumed has other weights than an unbroken one"]
    ended = f"killed after step {numbers['killed_at']}" if numbers["killed_at"] else "done before it could be killed"
    yield Finding(f"{says}; a run {ended}: {'the' if same else 'not the'} bits of an unbroken one", numbers, wrong)


def copies(setting: Setting) -> dict[str, float]:
    """Bytes a second from the device to memory of the host, pageable and pinned."""
    if not setting.on_gpu:
        return {}
    source = torch.zeros(2**28, device=setting.device)
    rates = {}
    for name, pinned in (("pageable", False), ("pinned", True)):
        target = torch.empty(source.shape, pin_memory=pinned).fill_(1)
        seconds = wall_seconds(partial(target.copy_, source, non_blocking=True), setting.device)
        rates[name] = source.nbytes / seconds
    return rates


def small_run(setting: Setting, name: str, **sections: Any) -> RunConfig:
    """A run of some hundred steps, or as `sections` have it, with deterministic kernels."""
    rows, length, steps = setting.size((8, 128, 400), (2, 16, 20))
    common = {
        "model": setting.model({"preset": "nano"}),
        "data": {"path": str(setting.text), "sequence_length": length},
        "train": {"batch_size": rows, "precision": "fp32", "deterministic": True},
        "budget": {"tokens": rows * length * steps},
        "eval": {"tokens": 1000},
        "checkpoint": {"every": max(1, steps // 10)},
        "backend": {"device": str(setting.device)},
        "log": {"every": 1, "progress": False},
        "out": str(setting.folder / name),
    }
    return configured(common, sections)


def written(config: RunConfig) -> Path:
    """The configuration as a file, for a process of its own."""
    path = Path(config.out).with_suffix(".json")
    write_json(path, config.model_dump(mode="json"))
    return path


def killed(config: RunConfig) -> int | None:
    """Starts the run and kills it after its first checkpoint; the step of that, None if the run was faster."""
    path = Path(config.out)
    process = subprocess.Popen([*TRAIN, str(written(config))], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if found := sorted((path / "checkpoints").glob("step-*")):
                return None if (path / "record.json").exists() else int(found[-1].name.removeprefix("step-"))
            time.sleep(POLL)
        return None
    finally:
        process.kill()
        process.wait()


def last_weights(config: RunConfig) -> dict[str, Tensor]:
    """Of the newest checkpoint of a run whose weights lie in one file."""
    newest = max((Path(config.out) / "checkpoints").glob("step-*"))
    return load_file(newest / "model.safetensors")


# --------------------------------------------------------------------------------------------------------------- rates


def rates(setting: Setting) -> Iterator[Finding]:
    """Tokens a second that the loader reads, that a step takes and that evaluation gets through."""
    rows, length = setting.size((32, 512), (2, 16))
    config = configured(
        {
            "model": setting.model({"preset": "llama-60m"}),
            "data": {"path": str(setting.text), "sequence_length": length},
            "train": {"batch_size": rows, "precision": setting.size("bf16", "fp32")},
            "eval": {"batch_size": rows, "tokens": setting.size(None, 200)},
            "backend": {"device": str(setting.device)},
            "out": str(setting.folder / "run"),
        }
    )
    with opened(config) as parts:
        read, count = batches_of(parts), setting.size(50, 2)
        loading = wall_seconds(lambda: [read(number) for number in range(count)], setting.device) / count
        step = stepper(parts)
        step()
        training = wall_seconds(step, setting.device)
        measure(parts)
        found: dict[str, Any] = {}
        evaluating = wall_seconds(lambda: found.update(measure(parts)), setting.device)
    per_step = rows * length
    numbers = {
        "loader": per_step / loading, "training": per_step / training, "evaluation": found["tokens"] / evaluating,
        "loss": found["loss"],
    }  # fmt: skip
    wrong = [] if math.isfinite(found["loss"]) else [f"held-out loss {found['loss']}"]
    if setting.on_gpu and numbers["loader"] < numbers["training"]:
        wrong.append("the loader is slower than training")
    says = ", ".join(f"{name} {numbers[name]:,.0f}" for name in ("loader", "training", "evaluation"))
    yield Finding(f"tokens/s: {says}", numbers, wrong)
