"""thriftlab check gpu: thirteen checks on this machine's GPU, each a process of its own with a time limit.

Every check leaves one line of JSON in the file, whatever becomes of it: `ok`, `wrong` (it found something), `failed`
(it raised), `timeout`, `skipped` or `not built`, the last three with what it had found or the reason. The limits sum to
eight minutes, so that a machine rented for a quarter of an hour is enough. Nothing is installed. A rehearsal,
`--device cpu --small`, executes the same code on a CPU with small sizes; its numbers mean nothing.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from thriftlab.data.errors import ConfigError, UserError
from thriftlab.data.files import append, finite, make_folder, writing
from thriftlab.data.paths import FilePath
from thriftlab.data.prepare.request import split_commas
from thriftlab.launch.probe import made_up_text
from thriftlab.train.backends.device import Device, choose_device, why_no_gpu
from thriftlab.train.config.choice import Section


class Check(NamedTuple):
    number: int
    name: str
    limit: int  # seconds
    body: str  # module:function, imported where it runs
    anywhere: bool = False  # whether it has something to say without a GPU


CHECKS = (
    Check(1, "versions and device", 15, "machine:machine", anywhere=True),
    Check(2, "layers", 25, "methods:layers"),
    Check(3, "methods, no waiting", 45, "methods:methods"),
    Check(4, "GPU against CPU", 40, "agree:agree"),
    Check(5, "launches of a step", 40, "methods:launches"),
    Check(6, "speed, MFU", 65, "model:speed"),
    Check(7, "attention kernels", 40, "model:attention"),
    Check(8, "memory at 1B", 45, "model:memory"),
    Check(9, "refresh at 1B", 25, "methods:refresh"),
    Check(10, "Triton kernels", 35, "kernels:kernels", anywhere=True),
    Check(11, "checkpoint, resume", 40, "runs:checkpoint"),
    Check(12, "ranks", 45, "ranks:ranks"),
    Check(13, "loader, evaluation", 20, "runs:rates"),
)
REHEARSAL = 10  # times the limit: it is about the code and not about time
ONE = (sys.executable, "-m", "thriftlab.launch.gpu.one")
BAD = ("wrong", "failed", "timeout")


def known(numbers: tuple[int, ...]) -> tuple[int, ...]:
    there = [check.number for check in CHECKS]
    if unknown := [number for number in numbers if number not in there]:
        raise ValueError(f"there is no check {unknown[0]}; they are {there[0]} to {there[-1]}")
    return numbers


class CheckOptions(Section):
    """What is checked, and where."""

    out: FilePath = Field("gpu-check.json", min_length=1, description="file of results, one line of JSON a check")
    only: Annotated[tuple[int, ...], BeforeValidator(split_commas), AfterValidator(known)] = Field(
        (), description="numbers of checks with commas between them; empty: all"
    )
    device: Device = Field("cuda", description="cuda or cuda:N; cpu: for a rehearsal, with small=true")
    small: bool = Field(False, description="--small takes small sizes: a rehearsal, whose numbers mean nothing")


def check_gpu(options: CheckOptions) -> list[dict[str, Any]]:
    """Run the checks, print their table and return their lines. UserError with code 1 if one of them is bad."""
    if options.device == "auto" or options.device == "cpu" and not options.small:
        raise ConfigError(f"device = {options.device}: it takes cuda or cuda:N, or cpu for a rehearsal with --small")
    reason = why_not(options.device)
    out, lines = Path(options.out), []
    make_folder(out.parent)
    with writing(out), open(out, "wb", buffering=0) as file, tempfile.TemporaryDirectory(prefix="thriftlab-") as folder:
        text = made_up_text(Path(folder) / "text", documents=150 if options.small or reason else 2000)
        for check in CHECKS:
            if options.only and check.number not in options.only:
                continue
            check = check._replace(limit=check.limit * (REHEARSAL if options.small else 1))
            print(f"{check.number:2} {check.name} ...", file=sys.stderr, flush=True)
            if reason and not check.anywhere:
                line = result(check, 0.0, {"status": "skipped", "says": reason})
            else:
                line = run_check(check, options, text, Path(folder) / str(check.number))
            lines.append(line)
            append(file, json.dumps(finite(line)).encode() + b"\n")
    print(table(lines), f"written to {out}", sep="\n\n")
    if bad := [str(line["check"]) for line in lines if line["status"] in BAD]:
        error = UserError(f"not as it should be: {', '.join(bad)}; docs/gpu.md says where to send {out}")
        error.code = 1
        raise error
    return lines


def why_not(asked: str) -> str | None:
    """Why there is no GPU to check, if so. BackendError for a number that no GPU has."""
    if asked != "cpu" and not torch.cuda.is_available():
        return why_no_gpu()
    choose_device(asked)
    return None


def run_check(check: Check, options: CheckOptions, text: Path, folder: Path) -> dict[str, Any]:
    """One check in a process of its own, which is killed with all its children when its time is over."""
    folder.mkdir()
    words = [check.body, options.device, "small" if options.small else "whole", str(text), str(folder)]
    begin, late = time.monotonic(), False
    with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
        process = subprocess.Popen(
            [*ONE, *words], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            process.wait(check.limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = last_line(folder / "stdout")
    if said.get("status", "running") == "running":  # it ended before it could say how
        why = {"status": "timeout"} if late else {"status": "failed", "error": died(process.returncode, folder)}
        said |= why
    return result(check, time.monotonic() - begin, said)


def result(check: Check, seconds: float, said: dict[str, Any]) -> dict[str, Any]:
    named = {"check": check.number, "name": check.name, "seconds": round(seconds, 1), "limit": check.limit}
    return {**named, "status": "failed", "says": "", "numbers": {}, "wrong": [], "error": None, **said}


def last_line(path: Path) -> dict[str, Any]:
    """The newest line of JSON that a check printed, among what libraries print; a torn one does not count."""
    for line in reversed(path.read_text(errors="replace").splitlines()):
        with suppress(ValueError):
            if line.startswith('{"status": '):
                return json.loads(line)
    return {}


def died(code: int, folder: Path) -> str:
    lines = [line.strip() for line in (folder / "stderr").read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {' | '.join(lines[-3:]) or 'nothing was printed'}"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """For people, and for a page in Markdown."""
    rows = [("check", "result", "seconds", "found")]
    for line in lines:
        said = "; ".join(filter(None, [line["error"], *line["wrong"][:3], line["says"]])).replace("|", "/")
        rows.append((f"{line['check']} {line['name']}", line["status"], f"{line['seconds']} of {line['limit']}", said))
    wide = [max(len(row[column]) for row in rows) for column in range(3)] + [0]
    shown = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, wide, strict=True))} |" for row in rows]
    shown.insert(1, "|" + "---|" * 4)
    return "\n".join(shown)
