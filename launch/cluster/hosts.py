"""One run on several machines over ssh: a torchrun on each of them, which meet at the first. For those without SLURM.

    thriftlab launch --hostfile hosts optim.lr=1e-3 out=runs/big        # hosts: one line a machine, as `node1 slots=8`

All machines see the same folders and the same Python, and ssh needs no password. The surprise: Ctrl-C is not forwarded.
It becomes a file OUT/STOP, which the trainer obeys at the end of a step, and which is removed afterwards.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import Field

from thriftlab.data.errors import ConfigError, UserError
from thriftlab.data.paths import FilePath
from thriftlab.launch.studies.jobs import Unfinished
from thriftlab.train.config.choice import Section
from thriftlab.train.config.parse import read, split, validate
from thriftlab.train.config.schema import Count, RunConfig, Steps
from thriftlab.train.records.stop import stop_file, stop_signals

SSH = ("ssh", "-tt", "-o", "BatchMode=yes")  # -tt: what runs there ends with the connection
CARRIED = re.compile("NCCL_|GLOO_|OMP_|PYTHONPATH$")  # variables that count on every machine
GRACE = 10.0  # seconds in which the other machines may end by themselves
POLL = 0.2


class LaunchConfig(Section):
    """Which machines, and how."""

    hostfile: FilePath = Field("hosts", description="one line a machine: its name, and slots=N for N processes")
    port: Count = Field(29400, description="free port of the first machine")
    restarts: Steps = Field(0, description="times that torchrun starts the ranks again after a crash")
    dry_run: bool = Field(False, description="--dry-run prints what would run on each machine, and runs nothing")


def launch(argv: Sequence[str]) -> None:
    """Run `thriftlab train` on the machines of a hostfile. UserError if one of them fails, Unfinished if stopped."""
    argv = ["dry_run=true" if word == "--dry-run" else word for word in argv]
    settings = read(argv)
    c = validate(LaunchConfig, settings.pick([*LaunchConfig.model_fields]))
    config = validate(RunConfig, settings.drop([*LaunchConfig.model_fields]))
    hosts = read_hosts(Path(c.hostfile))
    config.train.rows_per_rank(sum(hosts.values()))
    out = Path(config.out)
    if stop_file(out):
        raise UserError(f"{out}/STOP keeps this run from going on; remove it first")
    words = [f"{key}={value}" for key, value in split(argv)[0] if key not in LaunchConfig.model_fields]
    meeting = uuid.uuid4().hex[:8]  # no other run's
    commands = {host: remote_command(c, hosts, host, meeting, words) for host in hosts}
    if c.dry_run:
        return print("\n".join(shlex.join([*SSH, host, words]) for host, words in commands.items()))
    with stop_signals() as received:
        started = {host: start(host, words) for host, words in commands.items()}
        try:
            failed = watch(started, out, received)
        finally:
            end(started.values())
            if received:
                (out / "STOP").unlink(missing_ok=True)
    if received:
        raise Unfinished(f"stopped; {out}/status says how far it came, and the same command resumes", 128 + received[0])
    if failed:
        raise UserError(f"{failed}; the same command goes on from the newest checkpoint in {out}")


def read_hosts(path: Path) -> dict[str, int]:
    """Name of each machine -> its processes, in the order of the file."""
    hosts: dict[str, int] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\w[\w.:@-]*)(?:\s+slots=([1-9]\d*))?", line)
        if line and (not match or match[1] in hosts):
            raise ConfigError(f"{path}, line {number}: {line!r}; write each machine once, as: node1 slots=8")
        if match:
            hosts[match[1]] = int(match[2] or 1)
    if not hosts:
        raise ConfigError(f"{path} names no machine; write one a line, as: node1 slots=8")
    return hosts


def remote_command(c: LaunchConfig, hosts: dict[str, int], host: str, meeting: str, words: Sequence[str]) -> str:
    """What a shell on that machine runs."""
    first, name = next(iter(hosts)), host.rpartition("@")[2]
    carried = [f"{key}={value}" for key, value in sorted(os.environ.items()) if CARRIED.match(key)]
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={len(hosts)}", f"--nproc-per-node={hosts[host]}", f"--max-restarts={c.restarts}"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={first.rpartition('@')[2]}:{c.port}", f"--rdzv-id={meeting}"),
        *(f"--rdzv-conf=is_host={int(host == first)}", f"--local-addr={name}"),
    ]
    trainer = ["-m", "thriftlab.launch", "train", *words]
    return f"cd {shlex.quote(str(Path.cwd()))} && exec env {shlex.join([*carried, *torchrun, *trainer])}"


def start(host: str, words: str) -> subprocess.Popen:
    """In a session of its own, where Ctrl-C does not reach it."""
    return subprocess.Popen([*SSH, host, words], stdin=subprocess.DEVNULL, start_new_session=True)


def watch(started: dict[str, subprocess.Popen], out: Path, received: list[int]) -> str:
    """Returns when all have ended, or GRACE seconds after the first failure; says what failed first."""
    failed, deadline = "", float("inf")
    while any(process.poll() is None for process in started.values()) and time.monotonic() < deadline:
        if received and out.exists() and not stop_file(out):
            (out / "STOP").write_text("launch\n")
        for host, process in started.items():
            if process.poll() and not failed:
                failed, deadline = why_failed(host, process.returncode), time.monotonic() + GRACE
        time.sleep(POLL)
    return failed


def why_failed(host: str, code: int) -> str:
    if code == 255:
        return f"{host}: ssh could not connect, or the connection broke (exit code 255); try: ssh {host} true"
    return f"{host}: its torchrun ended with exit code {code}, see above"


def end(processes: Collection[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
