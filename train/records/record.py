"""What a run leaves behind: metrics.jsonl while it trains, record.json when it is done, and where both come from.

record.json is sealed: it carries its own sha256 and those of the files beside it, so a flipped bit is found. nan and
inf are written as null, because JSON has no word for them; the key stays. `Record` is what is in it.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from thriftlab.data.errors import UserError
from thriftlab.data.files import (
    append,
    finite,
    make_folder,
    replace_atomically,
    seal,
    sha256,
    unseal,
    write_json,
    writing,
)
from thriftlab.train.records.machine import machine

__all__ = [
    "MetricsWriter", "Record", "RecordError", "provenance", "read_metrics", "read_record", "write_json", "write_record",
]  # fmt: skip


class RecordError(UserError):
    """A run's output is missing or damaged; the message names the file and the remedy."""


# ---------------------------------------------------------------------------------------------------------- metrics


class MetricsWriter:
    """Appends JSON lines, each of them on its way to the disk when `write` returns.

    Args:
        path: metrics.jsonl.
        resume_step: Keep the lines up to this step and drop what came after the checkpoint, a torn line included, so
            that an interrupted run has the lines of an unbroken one. None: start an empty file.
        history: sha256 of the lines that led to the checkpoint, where it is known: these are kept, whatever follows,
            be it of the same step. RecordError if the file does not begin with them.

    `last` is the newest line, None before the first.
    """

    def __init__(self, path: Path, resume_step: int | None = None, history: str | None = None):
        self.path = Path(path)
        lines = self.path.read_bytes().splitlines(keepends=True) if resume_step and self.path.exists() else []
        count = _lines_up_to(self.path, lines, resume_step or 0) if history is None else _lines_of(lines, history)
        if count is None:
            raise RecordError(
                f"{path} is not the history of the checkpoint at step {resume_step}: a line before it was changed or "
                f"is missing; restore it from a copy, or move {self.path.parent} away and start anew"
            )
        self.last: dict[str, Any] | None = json.loads(lines[count - 1]) if count else None
        with writing(self.path):
            self.file = open(path, "ab", buffering=0)
            self.file.truncate(sum(map(len, lines[:count])))

    def write(self, line: dict[str, Any]) -> None:
        self.last = line
        with writing(self.path):
            append(self.file, json.dumps(finite(line), allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        with writing(self.path), self.file:
            os.fsync(self.file.fileno())


def _lines_up_to(path: Path, lines: list[bytes], step: int) -> int:
    """How many leading lines are of a step that is at most `step`."""
    return sum(values["step"] <= step for values in _parse(path, lines))


def _lines_of(lines: list[bytes], history: str) -> int | None:
    """How many leading lines have this sha256 together; None if no number of them has."""
    digest = hashlib.sha256()
    for count, line in enumerate([b"", *lines]):
        digest.update(line)
        if digest.hexdigest() == history:
            return count
    return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. A torn last line is left out; any other damage raises RecordError."""
    if not Path(path).exists():
        raise RecordError(f"{path} is missing: the run has not started, or its folder was moved")
    return _parse(Path(path), Path(path).read_bytes().splitlines(keepends=True))


def _parse(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    if lines and not lines[-1].endswith(b"\n"):
        lines = lines[:-1]
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(json.loads(line))
            whole = type(metrics[-1]["step"]) is int
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if not whole:
            raise RecordError(f"{path}, line {number} is damaged; restore the file or delete that line")
    return metrics


# ----------------------------------------------------------------------------------------------------------- record


@dataclass(frozen=True)
class DataUsed:
    fingerprint: str
    plan: str  # fingerprint of the order
    tokenizer: str
    sources: dict[str, dict[str, int]] | None = None  # name -> unique training tokens, and tokens drawn


@dataclass(frozen=True)
class ModelUsed:
    parameters: int
    trained: int  # of these
    flops_per_token: int  # forward and backward
    layers: dict[str, Any]  # "converted": names of replaced Linears; "left": {name: why it was left}


@dataclass(frozen=True)
class Spent:
    steps: int
    tokens: int
    flops: int
    seconds: float  # of training steps, without evaluation and saving


@dataclass(frozen=True)
class Results:
    """Held out, but for `train_loss`."""

    loss: float | None  # nats a token, like the others None where it is not finite and was read from a file
    bits_per_byte: float | None
    tokens: int
    bytes: int
    sources: dict[str, dict[str, Any]]  # name -> the four above
    perplexity: float | None
    train_loss: float | None  # of the last step


@dataclass(frozen=True)
class Memory:
    """Bytes, of this rank."""

    parameter_bytes: int
    buffer_bytes: int
    state_bytes: int
    predicted_state_bytes: int
    peak_bytes: int  # of a CPU that of the process, of a GPU the highest phase's, the witness left out
    phases: dict[str, int] | None = None  # on a GPU the peak of each phase, see memory.py
    predicted: dict[str, dict[str, int]] | None = None  # "parts": bytes by part, see bill.py; None under DeepSpeed
    measured: dict[str, dict[str, int]] | None = None  # the same of the tensors


@dataclass(frozen=True)
class Throughput:
    tokens_per_second: float | None  # of all ranks; None where no step was timed
    mfu: float | None  # None where the device's peak is not known
    micro_batch_size: int | None = None  # windows of one forward on one rank


@dataclass(frozen=True)
class Record:
    """record.json, key by key and in its order: what a run was, what it spent and what came of it."""

    status: str
    method: str
    fingerprint: str
    seed: int
    config: dict[str, Any]
    started: float  # seconds since 1970
    commit: str | None
    diff_sha256: str | None
    versions: dict[str, str | None]
    machine: dict[str, Any]
    world: int
    data: DataUsed
    model: ModelUsed
    budget: Spent
    results: Results
    memory: Memory
    speed: Throughput
    skipped_steps: int
    signal: dict[str, Any]
    remarks: list[str]
    finished: float
    probes: dict[str, Any] | None = None  # None where nothing was asked for
    kernels: dict[str, list[str]] | None = None  # operation with a kernel -> what it ran by; None in older records
    files: dict[str, str] | None = None  # name -> sha256; set when it is written

    def to_json(self) -> dict[str, Any]:
        tree = asdict(self)
        for key in ("probes", "kernels", "files"):
            if tree[key] is None:
                del tree[key]
        if self.data.sources is None:  # in records that are older than it
            del tree["data"]["sources"]
        for key in ("phases", "predicted", "measured") if self.memory else ():  # likewise, and of a CPU
            if tree["memory"][key] is None:
                del tree["memory"][key]
        if self.speed and self.speed.micro_batch_size is None:  # likewise
            del tree["speed"]["micro_batch_size"]
        return tree

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Record":
        """What is not in a record, because it is older than the key, is None."""
        return _filled(cls, tree)


def _filled(kind: Any, tree: dict[str, Any]) -> Any:
    hints = get_type_hints(kind)
    values = {key: tree.get(key) for key in hints}
    return kind(**{key: _filled(hints[key], v) if is_dataclass(hints[key]) and v else v for key, v in values.items()})


BESIDE = ("metrics.jsonl", "config.json", "code.diff")  # what a record vouches for


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Atomically write OUT/record.json, sealed, with the sha256 of the run's other files."""
    files = {name: sha256(Path(out) / name) for name in BESIDE if (Path(out) / name).is_file()}
    replace_atomically(Path(out) / "record.json", seal({**finite(record), "files": files}))


def read_record(path: Path) -> dict[str, Any]:
    """The record at `path`. Raises RecordError if it, or a file beside it, is not what the run wrote."""
    path = Path(path)
    remedy = f"restore it from a copy, or move {path.parent} away and run again"
    try:
        record = unseal(path.read_bytes())
    except FileNotFoundError:
        raise RecordError(f"{path} is missing: the run has not finished; run it again to resume") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is damaged ({error}); {remedy}") from None
    files = record.get("files", {})
    if not isinstance(files, dict) or not files.keys() <= set(BESIDE):
        raise RecordError(f"{path} is damaged (it names other files than {', '.join(BESIDE)}); {remedy}")
    for name, expected in files.items():
        beside = path.with_name(name)
        if beside.exists() and sha256(beside) != expected:
            raise RecordError(f"{beside} is not the file that {path} was written with; {remedy}")
    return record


# ------------------------------------------------------------------------------------------------------- provenance

PACKAGES = (
    "thriftlab", "torch", "numpy", "triton", "deepspeed", "datasets", "tokenizers", "tiktoken", "safetensors",
    "pydantic", "scipy", "wandb", "transformers",
)  # fmt: skip


def provenance(out: Path | None = None) -> dict[str, Any]:
    """Which code ran, on what: {"commit", "diff_sha256", "versions", "machine"}.

    Uncommitted changes of the project's checkout, new Python files included, go to OUT/code.diff (where `out` is
    given). An installed package has no commit (None); its version stands for it.
    """
    commit, diff = code()
    if diff and out is not None:
        make_folder(Path(out))
        replace_atomically(Path(out) / "code.diff", diff)
    return {
        "commit": commit,
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": machine(),
    }


def code() -> tuple[str | None, bytes]:
    """The commit of this code, and what was changed since. A snapshot that `thriftlab submit` took carries both."""
    here = Path(__file__).resolve()
    if (snapshot := here.parents[2] / "COMMIT").exists():
        return snapshot.read_text() or None, snapshot.with_name("code.diff").read_bytes()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None, b""  # not the project's own checkout, though perhaps inside somebody else's
    root = Path(os.fsdecode((_git(here.parent, "rev-parse", "--show-toplevel") or b"").strip()))
    commit = (_git(root, "rev-parse", "HEAD") or b"").decode().strip() or None
    new = (_git(root, "ls-files", "-z", "--others", "--exclude-standard", "*.py") or b"").split(b"\0")
    diffs = [_git(root, "diff", "HEAD", "--binary")]
    diffs += [_git(root, "diff", "--no-index", "/dev/null", os.fsdecode(path)) for path in new if path]
    return commit, b"".join(diff or b"" for diff in diffs)


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git says, or None where there is no git, no repository, or no such thing."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-c", "core.quotepath=off", *arguments], cwd=folder, capture_output=True
        )
    except OSError:
        return None
    differs = "--no-index" in arguments and done.returncode == 1
    return done.stdout if done.returncode == 0 or differs else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
