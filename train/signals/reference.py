"""Reference losses: what another model makes of every token of every training window, computed once.

    FOLDER/reference.json   what it is of: data, window length, the run of that model; sha256 of every file; sealed
    FOLDER/SOURCE.npy       float16 [windows, seq], in the order of the windows of that source

Windows are named by source and number and not by their id in a mixture, so one folder serves every mixture of its
sources.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thriftlab.data.errors import UserError
from thriftlab.data.files import sha256, unseal
from thriftlab.data.loader import Batch
from thriftlab.data.mixture import Plan
from thriftlab.data.shards import Dataset

NAME = "reference.json"


class ReferenceLossError(UserError):
    """Reference losses are missing, damaged, or of other data."""


def read_reference(folder: str | Path) -> dict[str, Any]:
    """The content of reference.json. ReferenceLossError if there is none or it was changed."""
    path = Path(folder) / NAME
    try:
        return unseal(path.read_bytes())
    except FileNotFoundError:
        raise ReferenceLossError(
            f"{path} is missing; write it with: thriftlab reference run=FOLDER_OF_A_FINISHED_RUN out={folder}"
        ) from None
    except (OSError, ValueError) as error:
        raise ReferenceLossError(f"{path} is damaged ({error}); write it again with thriftlab reference") from None


def open_reference(folder: str | Path, dataset: Dataset, plan: Plan, verify: bool = True) -> Callable[[Batch], Tensor]:
    """A function of a batch of the plan: the reference losses of its rows, fp32 [rows, seq], on the CPU.

    ReferenceLossError where they are of other data or windows. verify=False leaves the hashes of the files unread.
    """
    folder, entry = Path(folder), read_reference(folder)
    for key, asked in (("data", dataset.fingerprint), ("sequence_length", plan.sequence_length)):
        if entry[key] != asked:
            raise ReferenceLossError(
                f"{folder} has the reference losses of {key} {entry[key]}, and this run has {asked}; write others with "
                "thriftlab reference"
            )
    if not plan.fixed:
        raise ReferenceLossError(
            f"{folder} has the reference losses of fixed windows, and this run cuts others from the documents; leave "
            "data.reshuffle and data.repetition.unit out, or use another signal"
        )
    for source in plan.sources:
        if source.where:
            raise ReferenceLossError(
                f"{folder} has the reference losses of all windows, and data.sources.{source.name}.where makes others; "
                "leave where out, or use another signal"
            )
    losses = []
    for source, windows in zip(plan.sources, plan.windows, strict=False):  # a pool has none of its own
        path = folder / f"{source.name}.npy"
        losses.append(open_losses(path, (len(windows), plan.sequence_length), entry["files"] if verify else None))

    def look_up(batch: Batch) -> Tensor:
        sources, windows = plan.located(batch.sample.numpy())
        found = np.empty((len(sources), plan.sequence_length), np.float32)
        for p in np.unique(sources):
            rows = np.flatnonzero(sources == p)
            found[rows] = losses[p][windows[rows]]
        return torch.from_numpy(found)

    return look_up


def open_losses(path: Path, shape: tuple[int, int], files: dict[str, str] | None) -> np.ndarray:
    """The losses of one source, mapped; held against the hashes of `files`, if they are given."""
    try:
        whole = files is None or sha256(path) == files.get(path.name)
        losses = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ReferenceLossError(f"{path} cannot be read ({error}); write it again with thriftlab reference") from None
    if not whole or losses.shape != shape:
        raise ReferenceLossError(f"{path} does not match {NAME}; write it again with thriftlab reference")
    return losses
