"""Checkpoints: safetensors and JSON, written whole or not at all, and verified before they are used.

    FOLDER/step-00000100/  model.safetensors  optim.safetensors  state.json  checksums.json

A checkpoint is written under a temporary name, synced and renamed, so that a kill at any moment leaves the one before
it untouched. Nothing is ever unpickled. The surprise: the state of an optimizer goes around torch's
`load_state_dict`, which casts it to the dtype of the parameters, and comes back bit for bit.
"""

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from thriftlab.train.files import seal, sha256, sync, unseal, write_synced
from thriftlab.train.optim_state import CheckpointError, pack_optimizer, unpack_optimizer

__all__ = ["Checkpoint", "CheckpointError", "Writer", "fault", "latest", "load", "pack_optimizer", "unpack_optimizer"]

Tensors = dict[str, dict[str, Tensor]]


# ---------------------------------------------------------------------------------------------------------- writing


class Writer:
    """Writes checkpoints into one folder, which one process owns, and keeps the newest `keep`.

    Args:
        folder: Where the `step-*` folders go; made if missing. What dead writers left half done is removed.
        keep: How many checkpoints stay, at least 1.
        background: Copy the tensors at once and write them in a thread. A failure surfaces at the next `save` or
            `wait` as CheckpointError; the checkpoint before it stays.
    """

    def __init__(self, folder: Path, keep: int, background: bool = True):
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, not {keep}")
        self.folder, self.keep, self.background = Path(folder), keep, background
        self.folder.mkdir(parents=True, exist_ok=True)
        self.thread: Thread | None = None
        self.failure: BaseException | None = None
        _remove_leftovers(self.folder)

    def save(self, step: int, tensors: Tensors, meta: dict[str, Any]) -> None:
        """Write `step-{step}`; the tensors may change as soon as this returns.

        A step that is already there and whole is left alone: a state is a function of (config, step).

        Args:
            tensors: {"model": {name: tensor}, ...}: each group becomes one safetensors file. Tied weights go in once.
            meta: JSON values, tuples, torch dtypes, and floats of any value; all come back equal.
        """
        self.wait()
        copies = {group: _snapshot(named) for group, named in tensors.items()}
        text = to_json({"step": step, "groups": list(tensors), "meta": meta})
        if not self.background:
            return _write(self.folder, step, copies, text, self.keep)
        self.thread = Thread(target=self._write, args=(step, copies, text), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Return once everything is on the disk. Raises what went wrong in the background."""
        if self.thread is not None:
            self.thread.join()
        self.thread, failure, self.failure = None, self.failure, None
        if failure is not None:
            raise failure

    def _write(self, step: int, tensors: Tensors, state: str) -> None:
        try:
            _write(self.folder, step, tensors, state, self.keep)
        except BaseException as error:
            self.failure = error


def _snapshot(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, with no memory in common."""
    first: dict[tuple, str] = {}
    for name, tensor in named.items():
        place = (tensor.device, tensor.data_ptr())
        if tensor.numel() and first.setdefault(place, name) != name:
            raise CheckpointError(f"{first[place]!r} and {name!r} share memory (tied weights?): save one of them, once")
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in named.items()
    }


def _write(folder: Path, step: int, tensors: Tensors, state: str, keep: int) -> None:
    target = folder / f"step-{step:08d}"
    if target.exists() and fault(target) is None:
        return
    temporary = _temporary(target)
    try:
        _fill(temporary, tensors, state)
        _remove(target)  # a broken one of the same step, if any
        os.rename(temporary, target)
        sync(folder)
        for older in [path for at, path in _steps(folder) if at < step][keep - 1 :]:
            _remove(older)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder}: {error}. The checkpoints before it are "
            "untouched; make room or repair the disk, and run the same command to resume"
        ) from error


def _fill(folder: Path, tensors: Tensors, state: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_synced(folder / "state.json", state.encode())
    for group, named in tensors.items():
        path = folder / f"{group}.safetensors"
        save_file(named, path)
        shutil.copymode(folder / "state.json", path)  # safetensors makes files that only their owner can read
        sync(path)
    sums = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    write_synced(folder / "checksums.json", seal({"files": sums}))
    sync(folder)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _remove(target: Path) -> None:
    """Out of sight first, so that a kill leaves no half of it under its name."""
    if target.exists():
        hidden = target.with_name(f".{target.name}.removed.{os.getpid()}.tmp")
        os.rename(target, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".step-*.tmp"):
        owner = int(path.name.split(".")[-2])
        if owner == os.getpid() or not _alive(owner):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `tensors` are read from the disk, onto the CPU, when first asked for."""

    step: int
    path: Path
    groups: tuple[str, ...]
    meta: dict[str, Any]

    @cached_property
    def tensors(self) -> Tensors:
        return {group: load_file(self.path / f"{group}.safetensors") for group in self.groups}


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where none was ever completed.

    Warns about every broken one that it passes over. Raises CheckpointError if there are checkpoints and none is
    whole: starting anew is the user's decision.
    """
    broken: list[tuple[Path, str]] = []
    for _, path in _steps(Path(folder)):
        wrong = fault(path)
        if wrong is None:
            for name, why in broken:
                message = f"the checkpoint {name} is broken ({why}); going on from the one before it, {path}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            return _open(path)
        broken.append((path, wrong))
    if broken:
        found = "; ".join(f"{path.name}: {why}" for path, why in broken)
        raise CheckpointError(
            f"no checkpoint in {folder} is whole ({found}). Restore one from a copy, or move the "
            "folder away to start anew"
        )
    return None


def load(path: Path) -> Checkpoint:
    """The checkpoint at `path`, verified. Raises CheckpointError if anything in it has changed."""
    if wrong := fault(Path(path)):
        raise CheckpointError(f"the checkpoint {path} is broken ({wrong}); use another one, or restore it from a copy")
    return _open(Path(path))


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file is there, with its size and its sha256."""
    try:
        sums = unseal((path / "checksums.json").read_bytes())["files"]
    except FileNotFoundError:
        return "checksums.json is missing"
    except (OSError, ValueError, KeyError) as error:
        return f"checksums.json: {error}"
    for name, expected in sums.items():
        if wrong := _file_fault(path / name, expected):
            return f"{name} {wrong}"
    state = from_json((path / "state.json").read_text())
    return None if path.name == f"step-{state['step']:08d}" else f"it holds step {state['step']}: was it renamed?"


def _file_fault(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"has {size} bytes instead of {expected['bytes']}"
        return None if sha256(path) == expected["sha256"] else "does not match its sha256"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error}"


def _open(path: Path) -> Checkpoint:
    state = from_json((path / "state.json").read_text())
    return Checkpoint(state["step"], path, tuple(state["groups"]), state["meta"])


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of what calls itself a checkpoint, newest first."""
    found = [(re.fullmatch(r"step-(\d{8,})", path.name), path) for path in folder.glob("step-*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


# ------------------------------------------------------------------------------------------------------------- JSON

DECODERS: dict[str, Callable[[Any], Any]] = {
    "__float__": float,
    "__tuple__": tuple,
    "__dtype__": lambda name: getattr(torch, name),
}


def to_json(value: Any) -> str:
    """JSON that `from_json` turns back into an equal value: tuples, torch dtypes, nan and inf included."""
    return json.dumps(_tag(value, "meta"), indent=1, allow_nan=False)


def from_json(text: str) -> Any:
    return json.loads(text, object_hook=_untag)


def _tag(value: Any, where: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"__dtype__": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"__tuple__": _tag(list(value), where)}
    if isinstance(value, list):
        return [_tag(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _tag(item, f"{where}.{key}") for key, item in value.items()}
    raise CheckpointError(f"{where} is {value!r}, which JSON cannot hold: use numbers, text, lists, tuples and dicts")


def _untag(value: dict[str, Any]) -> Any:
    (key, content), *rest = value.items() or [("", None)]
    return DECODERS[key](content) if key in DECODERS and not rest else value
