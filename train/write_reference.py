"""thriftlab reference: the losses of a finished run's model on every training window, for signals that compare.

They are kept in 16 bits. A loss of 4 nats is off by 0.002 at most, far below what one step changes.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm

from thriftlab.data.errors import UserError
from thriftlab.data.files import replace_atomically, seal, sha256, writing
from thriftlab.data.lock import claimed
from thriftlab.data.paths import FilePath
from thriftlab.data.shards import Dataset, open_dataset
from thriftlab.optim.core.hyper import Count
from thriftlab.train.backends.device import Device, choose_device
from thriftlab.train.backends.replicas import take_up
from thriftlab.train.build import make_model
from thriftlab.train.checkpoints.reader import latest
from thriftlab.train.config.choice import Section
from thriftlab.train.config.parse import Settings, validate
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.model import GPT
from thriftlab.train.records.record import Record, read_record
from thriftlab.train.signals.reference import NAME
from thriftlab.train.windows import autocast, document_ids, split_windows

LARGEST = float(np.finfo(np.float16).max)


class ReferenceConfig(Section):
    """Whose losses are written, and of which windows."""

    run: FilePath = Field(description="folder of the finished run; the losses are those of its last weights")
    data: FilePath | None = Field(None, description="folder that `thriftlab prepare` made; null: the data of that run")
    sequence_length: Count | None = Field(None, description="tokens of one window; null: as in that run")
    batch_size: Count = Field(32, description="windows of one forward; changes the speed and not the number")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N; auto: a GPU where torch sees one")
    out: FilePath = Field("runs/reference", min_length=1, description="folder for the losses")


def write_reference(asked: ReferenceConfig) -> Path:
    """Write OUT/reference.json and OUT/SOURCE.npy of every source; returns OUT. UserError for what cannot be."""
    entry, out = Record.from_json(read_record(Path(asked.run) / "record.json")), Path(asked.out)
    config = finished_config(entry.config)
    length = asked.sequence_length or config.data.sequence_length
    dataset = open_dataset(asked.data or config.data.path, verify=config.data.verify)
    refuse_other_tokenizer(dataset, config, asked)
    model = load_model(config, dataset, Path(asked.run), choose_device(asked.device))
    with claimed(out):
        (out / NAME).unlink(missing_ok=True)  # last written, so that what is half done cannot be taken for whole
        mask_delimiter = dataset.tokenizer.delimiter if config.data.document_mask else None
        files = {}
        for name in dataset.sources:
            windows, path = dataset.windows(name, "train", length), out / f"{name}.npy"
            losses = (
                token_losses(model, windows[rows], mask_delimiter, config.train.precision)
                for rows in batches_of(len(windows), asked.batch_size, name)
            )
            write_losses(path, losses, (len(windows), length))
            files[path.name] = sha256(path)
        about = {"data": dataset.fingerprint, "sequence_length": length, "run": entry.fingerprint, "files": files}
        replace_atomically(out / NAME, seal(about))
    return out


def write_losses(path: Path, losses: Iterable[np.ndarray], shape: tuple[int, int]) -> None:
    """A .npy file in 16 bits, row after row: on a full disk a file that is mapped to memory kills who fills it."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
    with writing(path), open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows in losses:
            file.write(rows.astype(np.float16).tobytes())
        file.flush()
        os.fsync(file.fileno())


def finished_config(tree: dict[str, Any]) -> RunConfig:
    settings = Settings()
    settings.put((), tree, "the run's record")
    return validate(RunConfig, settings)


def refuse_other_tokenizer(dataset: Dataset, config: RunConfig, asked: ReferenceConfig) -> None:
    if asked.data is None:
        return
    own = open_dataset(config.data.path, verify=False).manifest["tokenizer"]
    if own != dataset.manifest["tokenizer"]:
        raise UserError(
            f"{asked.run} was trained with the tokenizer of {config.data.path}, and {asked.data} has another; prepare "
            "one of them again with the tokenizer of the other"
        )


def load_model(config: RunConfig, dataset: Dataset, run: Path, device: str | torch.device = "cpu") -> GPT:
    """The model of a finished run with its last weights."""
    found, steps = latest(run / "checkpoints"), Record.from_json(read_record(run / "record.json")).budget.steps
    if found is None or found.step != steps:
        raise UserError(
            f"{run}/checkpoints has no whole checkpoint of the last step, {steps}; remove {run}/record.json and give "
            "the command of the run again, which makes both again"
        )
    model, _ = make_model(config, dataset)
    model.to_empty(device=device)
    model.tie()
    take_up(model, found.reader("model"), found.reader("buffers"))
    return model.eval()


def batches_of(count: int, size: int, name: str) -> Iterator[np.ndarray]:
    """The numbers below `count`, up to `size` at a time."""
    for start in tqdm(range(0, count, size), desc=name, unit="batch", disable=not sys.stderr.isatty()):
        yield np.arange(start, min(start + size, count))


@torch.no_grad()
def token_losses(model: GPT, windows: np.ndarray, mask_delimiter: int | None, precision: str) -> np.ndarray:
    """Losses [rows, seq] of windows [rows, seq + 1]."""
    device = next(model.parameters()).device
    inputs, targets = split_windows(torch.from_numpy(windows.astype(np.int64)).to(device))
    with autocast(device, precision):
        losses = model(inputs, targets, document_ids(inputs, mask_delimiter))
    return losses.float().clamp(max=LARGEST).cpu().numpy()
