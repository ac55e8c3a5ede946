"""Finds the newest whole checkpoint, verifies it and reads from it; writer.py says what one is made of."""

import os
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from thriftlab.data.errors import CheckpointError
from thriftlab.data.files import sha256, unseal
from thriftlab.train.backends.channel import ALONE, Channel
from thriftlab.train.checkpoints.codec import from_json
from thriftlab.train.checkpoints.index import FORMAT, Index, SavedTensors, index_fault


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Tensors are read from the disk, onto the CPU, when they are asked for."""

    step: int
    path: Path
    index: Index
    meta: dict[str, Any]

    def reader(self, group: str) -> SavedTensors:
        """The tensors of a group; none where it was not written."""
        return SavedTensors(self.path, group, self.index.get(group, {}))

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All of them, whole, by group."""
        return {group: dict(self.reader(group)) for group in self.index}


def latest(folder: Path, channel: Channel = ALONE) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where none was ever completed; one answer on all ranks.

    Warns about every broken one that it passes over. Raises CheckpointError if there are checkpoints and none is
    whole: starting anew is the user's decision.
    """
    broken: list[tuple[Path, str]] = []
    for _, path in channel.share(steps_in(Path(folder)))[0]:
        wrong = fault(path, channel)
        if wrong is None:
            for name, why in broken if channel.rank == 0 else []:
                message = f"the checkpoint {name} is broken ({why}); going on from the one before it, {path}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            return opened(path)
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
    return opened(Path(path))


def fault(path: Path, channel: Channel = ALONE) -> str | None:
    """What is wrong with a checkpoint, or None: every file is there, with its size and its sha256.

    The ranks of the channel share the work, and the answer.
    """
    try:
        sums = _sums(path)
    except FileNotFoundError:
        return _first_answer("checksums.json is missing", channel)
    except (OSError, ValueError) as error:
        return _first_answer(f"checksums.json: {error}", channel)
    world = len(channel.share(None))
    ours = list(sums.items())[channel.rank :: world]
    wrong = next((f"{name} {wrong}" for name, expected in ours if (wrong := _file_fault(path / name, expected))), None)
    if found := _first_answer(wrong, channel):
        return found
    return _state_fault(path, sums)


def _sums(path: Path) -> dict[str, dict[str, Any]]:
    """File -> {"bytes", "sha256"}, of those that a checkpoint has. ValueError where that is not what is there."""
    sums = unseal((path / "checksums.json").read_bytes()).get("files")
    if not isinstance(sums, dict) or "state.json" not in sums:
        raise ValueError("it does not list the files of a checkpoint")
    for name, entry in sums.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"} or Path(name).name != name:
            raise ValueError(f"{name!r} is no file of a checkpoint with its size and sha256")
    return sums


def _state_fault(path: Path, files: Collection[str]) -> str | None:
    """What is wrong with what state.json says, though it is the file that was written."""
    try:
        state = from_json((path / "state.json").read_bytes())
        step, format = state["step"], state.get("format", 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"state.json: {error}"
    if type(step) is not int or path.name != f"step-{step:08d}":
        return f"it holds step {step}: was it renamed?"
    if format != FORMAT:
        return None  # `opened` says what can be done
    if not isinstance(state.get("meta"), dict):
        return "state.json has no meta"
    return index_fault(state.get("index"), files)


def _first_answer(answer: str | None, channel: Channel) -> str | None:
    """The first answer of a rank that has one."""
    return next((said for said in channel.share(answer) if said), None)


def _file_fault(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"has {size} bytes instead of {expected['bytes']}"
        return None if sha256(path) == expected["sha256"] else "does not match its sha256"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        return f"cannot be read: {error}"


def opened(path: Path) -> Checkpoint:
    """A checkpoint, not verified."""
    state = from_json((path / "state.json").read_bytes())
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint {path} has format {state.get('format', 1)}, and this thriftlab reads format {FORMAT}; "
            "finish that run with the version that wrote it, or start anew in another folder"
        )
    return Checkpoint(state["step"], path, state["index"], state["meta"])


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of what calls itself a checkpoint, newest first."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"the checkpoints in {folder} cannot be read ({error.strerror}); repair that") from error
    found = [(re.fullmatch(r"step-(\d{8,})", name, re.ASCII), folder / name) for name in names]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)
