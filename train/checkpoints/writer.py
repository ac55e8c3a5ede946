"""Writes checkpoints: safetensors and JSON, whole or not at all.

    FOLDER/step-00000100/  model.safetensors  optim.safetensors  state.json  checksums.json

Every rank writes the pieces that it saves: rank 3 `model.3.safetensors`, rank 0 the names above, and whole tensors in
their shape. state.json says where each piece lies, so that a run of any other backend and world size can read them
(index.py). A checkpoint is written under a temporary name, synced and renamed, so that a kill at any moment
leaves the one before it untouched. Nothing is ever pickled.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from thriftlab.data.errors import CheckpointError
from thriftlab.data.files import make_folder, seal, sha256, sync, write_synced
from thriftlab.train.backends.channel import ALONE, Channel
from thriftlab.train.backends.pieces import Piece, Pieces, whole
from thriftlab.train.checkpoints.codec import to_json
from thriftlab.train.checkpoints.index import FORMAT, Index, file_name, merge
from thriftlab.train.checkpoints.reader import fault, steps_in
from thriftlab.train.late import landing_place, mark

Named = dict[str, Tensor] | Pieces


class Writer:
    """Writes checkpoints into one folder, which one run owns, and keeps the newest `keep`.

    Args:
        folder: Where the `step-*` folders go, seen by all ranks; made if missing. What dead writers left is removed.
        keep: How many checkpoints stay, at least 1.
        background: Copy the tensors at once and write them in a thread, which waits for what a GPU copies. A failure
            surfaces at the next `save` or `wait` as CheckpointError, on every rank; the checkpoint before it stays.
        channel: How the ranks that write together talk, and nobody else in it.
    """

    def __init__(self, folder: Path, keep: int, background: bool = True, channel: Channel = ALONE):
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, not {keep}")
        self.folder, self.keep, self.background, self.channel = Path(folder), keep, background, channel
        make_folder(self.folder)
        self.thread: Thread | None = None
        self.failure: BaseException | None = None
        if channel.rank == 0:
            _remove_leftovers(self.folder)

    def save(self, step: int, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write `step-{step}`, all ranks together; the tensors may change as soon as this returns.

        A step that is already there and whole is left alone: a state is a function of (config, step).

        Args:
            tensors: {"model": {name: tensor or piece}, ...}: each group becomes one safetensors file of this rank. Over
                the ranks every entry is there exactly once. Tied weights go in once.
            meta: JSON values, tuples, torch dtypes, and floats of any value; all come back equal. The first rank's.
        """
        self.wait()
        copies = {group: _snapshot(named) for group, named in tensors.items()}
        copied = mark()
        to_json(meta)  # what cannot be written is refused here and not in the thread
        if not self.background:
            return self._write(step, copies, meta, copied)
        self.thread = Thread(target=self._write_noting_failure, args=(step, copies, meta, copied), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Return once everything is on the disk. Raises what went wrong in the background."""
        if self.thread is not None:
            self.thread.join()
        self.thread, failure, self.failure = None, self.failure, None
        if failure is not None:
            raise failure

    def _write_noting_failure(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            self.failure = error

    def _write(self, step: int, groups: dict[str, Pieces], meta: dict[str, Any], copied: Callable[[], None]) -> None:
        """When all is copied the first rank opens the folder, all fill it, the first one closes it."""
        copied()
        target, temporary = self.folder / f"step-{step:08d}", None
        try:
            temporary = self.channel.first(lambda: _begin(target))
            if temporary is not None:
                indices, sums = zip(
                    *self.channel.together(lambda: _fill(temporary, self.channel.rank, groups)), strict=True
                )
                self.channel.first(lambda: _commit(temporary, target, merge(indices), sums, step, meta))
            self.channel.first(lambda: _keep_newest(self.folder, step, self.keep))
        except (OSError, SafetensorError) as error:
            if temporary and self.channel.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}. The checkpoints before "
                "it are untouched; make room or repair the disk, and run the same command to resume"
            ) from error


def _snapshot(named: Named) -> Pieces:
    """Copies on the CPU, with no memory in common; those from a GPU are under way, see `mark`."""
    first: dict[tuple, str] = {}
    pieces = {name: value if isinstance(value, Piece) else whole(value) for name, value in named.items()}
    for name, (_, _, tensor) in pieces.items():
        place = (tensor.device, tensor.data_ptr())
        if tensor.numel() and first.setdefault(place, name) != name:
            raise CheckpointError(f"{first[place]!r} and {name!r} share memory (tied weights?): save one of them, once")
    return {name: piece._replace(tensor=_copy(piece.tensor)) for name, piece in pieces.items()}


def _copy(tensor: Tensor) -> Tensor:
    """From a GPU to pinned memory, which it writes while it goes on; what changes the tensor later waits for that."""
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    return landing_place(tensor).copy_(tensor, non_blocking=True)


def _begin(target: Path) -> Path | None:
    """An empty folder to write into; None where the checkpoint is there already."""
    if target.exists() and fault(target) is None:
        return None
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def _fill(folder: Path, rank: int, groups: dict[str, Pieces]) -> tuple[Index, dict[str, Any]]:
    """Writes one rank's files. Returns where its pieces are, and the sums of its files."""
    index: Index = {}
    sums = {}
    for group, pieces in groups.items():
        index[group] = {key: {"shape": p.shape, "pieces": [(p.start, p.stop, rank)]} for key, p in pieces.items()}
        if pieces or rank == 0:
            path = folder / file_name(group, rank)
            save_file({key: p.tensor.view(p.shape) if p.is_whole else p.tensor for key, p in pieces.items()}, path)
            path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
            sums[path.name] = _sums(path)
    return index, sums


def _sums(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _commit(temporary: Path, target: Path, index: Index, sums: Any, step: int, meta: dict[str, Any]) -> None:
    """Writes what binds the files together, and gives the folder its name."""
    text = to_json({"format": FORMAT, "step": step, "index": index, "meta": meta})
    write_synced(temporary / "state.json", text.encode())
    files = {name: entry for of_rank in sums for name, entry in of_rank.items()}
    files["state.json"] = _sums(temporary / "state.json")
    write_synced(temporary / "checksums.json", seal({"files": files}))
    sync(temporary)
    _remove(target)  # a broken one of the same step, if any
    os.rename(temporary, target)
    sync(target.parent)


def _keep_newest(folder: Path, step: int, keep: int) -> None:
    for older in [path for at, path in steps_in(folder) if at < step][keep - 1 :]:
        _remove(older)


def _remove(target: Path) -> None:
    """Out of sight first, so that a kill leaves no half of it under its name."""
    if target.exists():
        hidden = target.with_name(f".{target.name}.removed.{os.getpid()}.tmp")
        os.rename(target, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Of writers that are gone; what others have put there is theirs."""
    for path in folder.iterdir():
        ours = re.fullmatch(r"\.step-\d{8,}(?:\.removed)?\.(\d+)\.tmp", path.name)
        if ours and (int(ours[1]) == os.getpid() or not _alive(int(ours[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
