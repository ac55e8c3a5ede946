"""Many runs as subprocesses, several side by side, one progress bar over all; stopped and resumed together.

A job is one `thriftlab train` in a folder of its own; what it prints goes to train.log there. The surprise: each job
leads its own process group. Otherwise it would get the terminal's Ctrl-C and the signal of the study, and the trainer
takes a second one for "at once".
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thriftlab.data.cores import usable_cores
from thriftlab.data.errors import UserError
from thriftlab.data.files import make_folder, write_json, writing
from thriftlab.train.backends.environment import OF_RANKS
from thriftlab.train.config.differences import differences
from thriftlab.train.config.schema import RunConfig, fingerprint
from thriftlab.train.records.progress import Progress
from thriftlab.train.records.record import read_record
from thriftlab.train.records.stop import stop_signals
from thriftlab.train.records.tracking import OF_ONE_RUN

TRAINER = (sys.executable, "-m", "thriftlab.launch", "train", "--config")
POLL_SECONDS = 0.3
TAIL_BYTES = 4096


class Unfinished(UserError):
    """Runs were stopped, or failed; the rest of the study stands. `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Job:
    """One run to be done. `tokens`: what its budget comes to, None where only the clock knows."""

    name: str
    config: RunConfig
    fingerprint: str
    tokens: int | None
    arm: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def record(self) -> dict[str, Any] | None:
        """The record of the finished run, None before. RecordError if it is damaged."""
        path = self.folder / "record.json"
        return read_record(path) if path.exists() else None

    def last(self, key: str) -> Any:
        """The newest value of `key` in metrics.jsonl, None before the first."""
        lines = tail(self.folder / "metrics.jsonl").split(b"\n")[:-1]
        return next((values[key] for line in reversed(lines) if key in (values := parsed(line))), None)


def tail(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read()
    except FileNotFoundError:
        return b""


def parsed(line: bytes) -> dict[str, Any]:
    """A line of metrics; the first one of a tail may have lost its beginning."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


# ---------------------------------------------------------------------------------------------------- whose folder


def refuse_other_run(job: Job, data_fingerprint: str) -> None:
    """UserError if the job's folder holds a run whose result would be another one."""
    past, path = job.record, job.folder / "config.json"
    if past:
        config, mark = past["config"], past["fingerprint"]
    elif path.exists():
        try:
            config = json.loads(path.read_bytes())
            mark = fingerprint(RunConfig.model_validate(config), data_fingerprint)
        except ValueError as error:
            raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); move {job.folder} away") from None
    else:
        return
    if mark != job.fingerprint:
        raise UserError(
            f"{job.folder} holds another run ({differences(config, job.config)}); "
            f"choose another out=, or move that folder away"
        )


# ------------------------------------------------------------------------------------------------------ where to run


def slots(jobs: int | None, threads: int | None, on_gpu: bool = True) -> list[dict[str, str]]:
    """What each place for a job adds to the environment; by default one place a GPU, or as many as the cores allow."""
    gpus = visible_gpus() if on_gpu else []
    count = jobs or len(gpus) or max(1, usable_cores() // (threads or 1))
    common = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
    return [{**common, **({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})} for i in range(count)]


def visible_gpus() -> list[str]:
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(i) for i in range(count)]


# ---------------------------------------------------------------------------------------------------------- running


def run_all(jobs: Sequence[Job], places: list[dict[str, str]], lock: int, bar: "Bar") -> dict[str, str]:
    """Run what is not finished yet, in this order. Returns {name: why} of the jobs that failed.

    Unfinished after SIGINT or SIGTERM: every job has been asked to stop and has saved.
    """
    waiting = [job for job in jobs if not job.record]
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    failures: dict[str, str] = {}
    with stop_signals() as received:
        asked = False
        try:
            while running or waiting and not received:
                for place in range(len(places)):
                    if place not in running and waiting and not received:
                        running[place] = start(waiting.pop(0), places[place], lock)
                if received and not asked:
                    asked = True
                    send(running.values(), signal.SIGTERM)
                bar.update([job for job, _ in running.values()])
                time.sleep(POLL_SECONDS)
                for place, (job, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[place]
                        bar.update([job])
                        if not received and not job.record:
                            failures[job.name] = why_failed(job, process.returncode)
        finally:
            send(running.values(), signal.SIGKILL)
            for _, process in running.values():
                process.wait()
    if received:
        raise Unfinished("stopped; what is finished stays, the rest is saved", 128 + received[0])
    return failures


def start(job: Job, place: dict[str, str], lock: int) -> tuple[Job, subprocess.Popen]:
    make_folder(job.folder)
    write_json(job.folder / "config.json", job.config.model_dump(mode="json"))
    with writing(job.folder / "train.log"), open(job.folder / "train.log", "ab") as log:
        return job, subprocess.Popen(
            [*TRAINER, str(job.folder / "config.json")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**of_many(os.environ), **place},
            pass_fds=[lock],
            start_new_session=True,
        )


def of_many(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a study without what is meant for one run."""
    return {name: value for name, value in variables.items() if name not in (*OF_ONE_RUN, *OF_RANKS)}


def send(running: Iterable[tuple[Job, subprocess.Popen]], number: int) -> None:
    """Send a signal to the process groups that still run."""
    for _, process in running:
        if process.poll() is None:
            os.killpg(process.pid, number)


def why_failed(job: Job, code: int) -> str:
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    lines = tail(job.folder / "train.log").decode(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"{how}: {said} (see {job.folder / 'train.log'})"


class Bar:
    """Tokens of all jobs of a study, and the latest loss of any of them."""

    def __init__(self, jobs: Sequence[Job], label: str):
        self.done = {job.name: job.last("tokens") or 0 for job in jobs}
        known = [job.tokens for job in jobs if job.tokens is not None]
        self.progress = Progress(sum(known) if len(known) == len(jobs) else None, sum(self.done.values()), label)

    def update(self, jobs: Sequence[Job]) -> None:
        losses = [loss for job in jobs if (loss := job.last("loss")) is not None]
        self.done |= {job.name: job.last("tokens") or 0 for job in jobs}
        self.progress.update(sum(self.done.values()), losses[-1] if losses else None)

    def close(self) -> None:
        self.progress.close()
