"""One run on several machines over ssh: a torchrun on each of them, which meet at the first. For those without SLURM.

    thriftlab launch --hostfile hosts optim.lr=1e-3 out=runs/big        # hosts: one line a machine, as `node1 slots=8`

All machines see the same folders and the same Python, and ssh needs no password. The surprise: Ctrl-C is not forwarded.
It becomes a file OUT/STOP, which the trainer obeys at the end of a step, and which is removed afterwards.
"""

import functools
import os
import re
import shlex
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from thriftlab.data.errors import ConfigError, UserError
from thriftlab.data.paths import FilePath, typed_path
from thriftlab.launch.cluster import ssh
from thriftlab.launch.studies.jobs import Unfinished
from thriftlab.train.config.choice import Section
from thriftlab.train.config.help import text
from thriftlab.train.config.parse import Settings, read, split, validate
from thriftlab.train.config.schema import RunConfig, Steps
from thriftlab.train.records.stop import stop_file, stop_signals

CARRIED = re.compile(  # variables that count on every machine; a key of an account is on no command line
    "NCCL_|GLOO_|OMP_|MKL_|CUDA_|TORCH_|PYTORCH_|WANDB_(?!.*(KEY|TOKEN))|PYTHONPATH$|LD_LIBRARY_PATH$"
)
GRACE = 10.0  # seconds in which the other machines may end by themselves


class LaunchConfig(Section):
    """Which machines, and how."""

    hostfile: FilePath = Field("hosts", description="one line a machine: its name, and slots=N for N processes")
    port: int = Field(29400, ge=1, le=65535, description="free port of the first machine")
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
    pairs = [(key, value) for key, value in split(argv)[0] if key not in LaunchConfig.model_fields]
    words = [f"{key}={typed_path(value) if key == 'config' else value}" for key, value in pairs]
    words += expanded_here(settings, config)
    meeting = uuid.uuid4().hex[:8]  # no other run's
    commands = {host: remote_command(c, hosts, host, meeting, words) for host in hosts}
    if c.dry_run:
        return print("\n".join(shlex.join([*ssh.SSH, host, words]) for host, words in commands.items()))
    with stop_signals() as received:

        def hand_on() -> None:
            if received and out.exists() and not stop_file(out):
                (out / "STOP").write_text("launch\n")

        try:
            failed = ssh.run_all(commands, GRACE, hand_on)
        finally:
            if received:
                (out / "STOP").unlink(missing_ok=True)
    said = why_failed(failed) if failed else ""
    if received:
        how = f" ({said})" if said else ""
        raise Unfinished(
            f"stopped{how}; {out}/status says how far it came, and the same command resumes", 128 + received[0]
        )
    if failed:
        raise UserError(f"{said}; the same command goes on from the newest checkpoint in {out}")


HOST = re.compile(r"(?:\w[\w.-]*@)?(?:\w[\w.-]*|\[[\da-fA-F:.]+\])", re.ASCII)
COUNT = re.compile(r"(?::|\s+slots=)([1-9]\d{0,5})(?:\s+max[_-]slots=\d+)?", re.ASCII)
ADDRESS = re.compile(r"(?:[\w.-]+@)?(?:[\da-fA-F]*:){2,}[\da-fA-F.]*", re.ASCII)
FORMS = "node1 slots=8, node1:8, me@node1 slots=8 or [fd00::1] slots=8"


def read_hosts(path: Path) -> dict[str, int]:
    """Name of each machine -> its processes, in the order of the file. The forms are those of mpirun, DeepSpeed and
    Horovod; an IPv6 address has brackets there, and none in what is returned."""
    hosts: dict[str, int] = {}
    named: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if line:
            host, count = read_host(line) or ("", 0)
            name = host.rpartition("@")[2].lower()  # ssh and DNS ignore case
            if not host or name in named:
                raise ConfigError(
                    f"{path}, line {number}: {line!r}; write each machine once, as: node1 slots=8"
                    f"{'' if host else f' (the forms are {FORMS})'}"
                )
            hosts[host] = count
            named.add(name)
    if not hosts:
        raise ConfigError(f"{path} names no machine; write one a line, as: node1 slots=8")
    return hosts


def read_host(line: str) -> tuple[str, int] | None:
    """Name and processes of one line; None for what cannot be read."""
    name = HOST.match(line)
    count = COUNT.fullmatch(line, name.end()) if name else None
    if ADDRESS.fullmatch(line.split()[0]) or not name or not (count or name.end() == len(line)):
        return None  # of an address without brackets nobody knows whether it ends in a count
    return name[0].replace("[", "").replace("]", ""), int(count[1]) if count else 1


def expanded_here(settings: Settings, config: RunConfig) -> Iterator[str]:
    """Paths with ~ or $NAME as they are on this machine: all of them see the same folders."""
    found = config.model_dump(mode="json")
    for path in settings.origin:
        given = functools.reduce(dict.__getitem__, path, settings.tree)
        if path[0] in found and re.search(r"[~$]", str(given)):
            now: Any = found
            for key in path:
                now = now.get(key) if isinstance(now, dict) else None
            if now is not None and now != given:
                yield f"{'.'.join(path)}={text(now)}"


def remote_command(c: LaunchConfig, hosts: dict[str, int], host: str, meeting: str, words: Sequence[str]) -> str:
    """What a shell on that machine runs."""
    first, name = next(iter(hosts)).rpartition("@")[2], host.rpartition("@")[2]
    meet = f"[{first}]" if ":" in first else first
    carried = [f"{key}={value}" for key, value in sorted(os.environ.items()) if CARRIED.match(key)]
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={len(hosts)}", f"--nproc-per-node={hosts[host]}", f"--max-restarts={c.restarts}"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={meet}:{c.port}", f"--rdzv-id={meeting}"),
        *(f"--rdzv-conf=is_host={int(host == next(iter(hosts)))}", f"--local-addr={name}"),
    ]
    trainer = ["-m", "thriftlab.launch", "train", *words]
    return f"cd {shlex.quote(str(Path.cwd()))} && exec env {shlex.join([*carried, *torchrun, *trainer])}"


def why_failed(remote: ssh.Remote) -> str:
    host, code, words = remote.host, remote.process.returncode, remote.last_words
    if code == 255 or words.startswith("ssh: "):
        return (
            f"{host}: ssh could not connect, or the connection broke (exit code {code}): {words}; try: ssh {host} true"
        )
    if code < 0:
        return f"{host}: {words}; its ssh was ended by signal {-code}"
    return f"{host}: {words}; its torchrun ended with exit code {code}, see above"
