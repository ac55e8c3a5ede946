"""The tensors of a checkpoint that several ranks wrote, as if they were whole.

    index = {"model": {"embed.weight": {"shape": [512, 64], "pieces": [[start, stop, rank], ...]}, ...}, ...}

Nothing is read before it is asked for: safetensors maps a file into memory, so a rank that wants a hundredth of a
matrix reads a hundredth of it from the disk.
"""

import functools
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from thriftlab.data.errors import CheckpointError
from thriftlab.train.backends.pieces import TensorReader, gaps

FORMAT = 2  # of a checkpoint, in its state.json
Index = dict[str, dict[str, dict[str, Any]]]  # group -> key -> {"shape", "pieces"}


def file_name(group: str, rank: int) -> str:
    return f"{group}.{rank}.safetensors" if rank else f"{group}.safetensors"


def merge(indices: Iterable[Index]) -> Index:
    """The index of all ranks. CheckpointError unless every entry of every tensor is in exactly one piece."""
    merged: Index = {}
    for index in indices:
        for group, entries in index.items():
            keys = merged.setdefault(group, {})
            for key, entry in entries.items():
                first = keys.setdefault(key, {"shape": list(entry["shape"]), "pieces": []})
                first["pieces"] = sorted([*first["pieces"], *map(list, entry["pieces"])])
                if first["shape"] != list(entry["shape"]):
                    raise CheckpointError(f"{key!r} is {first['shape']} on one rank and {entry['shape']} on another")
    for entries in merged.values():
        for key, entry in entries.items():
            if wrong := gaps([tuple(piece[:2]) for piece in entry["pieces"]], torch.Size(entry["shape"]).numel()):
                raise CheckpointError(f"{key!r}: {wrong} on all ranks together")
    return merged


def index_fault(index: Any, files: Collection[str]) -> str | None:
    """What is wrong with an index that was read, of a checkpoint of these files; None if nothing is."""
    if not all(isinstance(entries, dict) for entries in (index, *(index.values() if isinstance(index, dict) else ()))):
        return "its index is damaged"
    for group, entries in index.items():
        for key, entry in entries.items():
            if wrong := entry_fault(entry, group, files):
                return f"its index of {key!r} {wrong}"
    return None


def entry_fault(entry: Any, group: str, files: Collection[str]) -> str | None:
    """What is wrong with one entry of an index."""
    shape, pieces = (entry.get("shape"), entry.get("pieces")) if isinstance(entry, dict) else (None, None)
    if shape is None or not are_counts(shape) or not pieces or not isinstance(pieces, list | tuple):
        return "is damaged"
    if not all(are_counts(piece) and len(piece) == 3 for piece in pieces):
        return "is damaged"
    if missing := next((name for *_, rank in pieces if (name := file_name(group, rank)) not in files), None):
        return f"names {missing}, which is not in its checksums"
    return gaps([(start, stop) for start, stop, _ in pieces], math.prod(shape))


def are_counts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(type(value) is int and value >= 0 for value in values)


class SavedTensors(TensorReader):
    """The tensors of one group. CheckpointError where a file does not hold what the index says."""

    def __init__(self, folder: Path, group: str, entries: dict[str, dict[str, Any]]):
        self.folder, self.group = folder, group
        self.shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
        self.pieces = {key: entry["pieces"] for key, entry in entries.items()}
        self.file = functools.cache(lambda rank: safe_open(folder / file_name(group, rank), "pt"))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries start to stop of a tensor, flat. CheckpointError where there is no such tensor."""
        if key not in self.shapes:
            raise CheckpointError(f"the checkpoint has no {key!r}; was it written for another model or method?")
        stop = torch.Size(self.shapes[key]).numel() if stop is None else stop
        if start == stop:
            return self.piece(key, *self.pieces[key][0])[:0]
        parts = [
            self.piece(key, first, last, rank)[max(start - first, 0) : stop - first]
            for first, last, rank in self.pieces[key]
            if start < last and first < stop or first == last
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def piece(self, key: str, first: int, last: int, rank: int) -> Tensor:
        """Entries first to last, as the file of a rank has them."""
        path = self.folder / file_name(self.group, rank)
        try:
            found = self.file(rank).get_tensor(key).view(-1)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {key!r} cannot be read ({error}); restore it from a copy") from error
        if len(found) != last - first:
            raise CheckpointError(f"{path}: {key!r} has {len(found)} entries and not {last - first}; restore it")
        return found
