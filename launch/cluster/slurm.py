"""Runs and studies as SLURM jobs: a folder with a snapshot of the code, a script, and one call of sbatch.

    OUT/jobs/001/  code/  job.sbatch  id  slurm-123.out

The script asks the trainer to stop before the time is up, and goes back to the queue when the trainer says that it was
pre-empted, or was killed after a new checkpoint; a job that crashed or was cancelled does not come back. A study is an
array with one run to a task. The surprise: the signal goes to the script alone, which asks through a file OUT/STOP,
because a USR1 ends torchrun and may be caught by NCCL.
"""

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Annotated, Protocol

from pydantic import AfterValidator, Field

from thriftlab.data.errors import ConfigError, UserError
from thriftlab.data.files import make_folder, write_json
from thriftlab.data.prepare.request import PrepareConfig
from thriftlab.data.shards import open_dataset
from thriftlab.launch.studies.arms import is_method
from thriftlab.launch.studies.compare import CompareConfig
from thriftlab.launch.studies.jobs import Job, refuse_other_run
from thriftlab.launch.studies.written import StudyOptions
from thriftlab.train.config.choice import Plugins, Section
from thriftlab.train.config.help import keys, nearest
from thriftlab.train.config.parse import Settings, read, validate
from thriftlab.train.config.schema import Count, RunConfig, Steps, fingerprint, settled
from thriftlab.train.records import record

HOME = Path(__file__).resolve().parents[2]
CORES = 4  # of a process with a GPU: it queues work, a thread fetches batches, others write and talk
FLOORS = ("kernels", "data", "optim", "train", "launch")


def one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has to be one line")
    return text


Line = Annotated[str, AfterValidator(one_line)]


class SubmitConfig(Section):
    """Where a job runs, and for how long."""

    nodes: Count = Field(1, description="nodes of one run")
    gpus: Steps = Field(0, description="GPUs of one node, each with a process of its own; 0: on CPUs")
    processes: Count | None = Field(None, description="processes on one node; null: one a GPU, or one")
    cpus: Count | None = Field(
        None, description=f"cores of one process; null: {CORES} with a GPU, else what SLURM gives"
    )
    memory: Line | None = Field(None, description="of one node, as 64G; null: what SLURM gives")
    time: Line | None = Field(None, description="limit of one attempt, as 4:00:00; null: that of the partition")
    partition: Line | None = Field(None, description="null: SLURM's default")
    account: Line | None = Field(None, description="null: SLURM's default")
    constraint: Line | None = Field(None, description="features that a node must have; null: any node")
    notice: Count = Field(120, description="seconds before the end of the time in which the run stops and saves")
    requeues: Steps = Field(100, description="times that a pre-empted job goes back to the queue")
    restarts: Steps = Field(0, description="times that torchrun starts the ranks again after a crash")
    setup: str = Field("", description="shell commands before the run, as 'module load cuda'")
    sbatch: dict[str, Line | None] = Field(
        {}, description="more options, as --sbatch qos=high --sbatch exclusive; any number of times"
    )
    dry_run: bool = Field(False, description="--dry-run prints the script; writes and submits nothing")


def sbatch_lines(c: SubmitConfig, batch: "JobBatch", log: str) -> str:
    """The #SBATCH lines. ConfigError for a --sbatch that would undo one of them."""
    limit = f"%{batch.at_once}" if batch.at_once else ""
    cores = (c.cpus or CORES) * processes(c) if c.cpus or c.gpus else None
    own = {
        "job-name": batch.name,
        "nodes": c.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": c.gpus or None,
        "cpus-per-task": cores,
        "mem": c.memory,
        "time": c.time,
        "partition": c.partition,
        "account": c.account,
        "constraint": c.constraint,
        "array": f"0-{len(batch.runs) - 1}{limit}" if len(batch.runs) > 1 else None,
        "signal": f"B:USR1@{c.notice}",
        "requeue": "",
        "open-mode": "append",
        "output": log,
    }
    for key in c.sbatch:
        if key in own or not re.fullmatch("[a-z][a-z-]*", key):
            raise ConfigError(
                f"--sbatch {key} is not possible: it is no option, or thriftlab submit sets it (see its --help)"
            )
    given = {key: value for key, value in own.items() if value is not None}
    given |= {key: "" if value is None else value for key, value in c.sbatch.items()}
    return "\n".join(f"#SBATCH --{key}" + (f"={quoted(str(value))}" if value else "") for key, value in given.items())


def quoted(value: str) -> str:
    """As sbatch reads its lines."""
    return value if re.fullmatch(r"[\w@%+=:,./-]*", value) else '"' + value.replace('"', r"\"") + '"'


def processes(c: SubmitConfig) -> int:
    return c.processes or c.gpus or 1


def trainer_command(c: SubmitConfig) -> str:
    """How the script starts the trainer: one process, one torchrun, or one on each node, which meet at $head."""
    python, train = shlex.quote(sys.executable), '-m thriftlab.launch train --config "$run/config.json"'
    ranks = f"{python} -m torch.distributed.run --nproc-per-node={processes(c)} --max-restarts={c.restarts}"
    if c.nodes > 1:
        meet = '--rdzv-backend=c10d --rdzv-endpoint="$head" --rdzv-id="$SLURM_JOB_ID-$attempt"'
        ranks += f" --nnodes={c.nodes} {meet} --rdzv-conf=is_host=$((SLURM_NODEID == 0))"
        here = '--local-addr="$(address_of "$SLURMD_NODENAME")"'
        return f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(f'exec {ranks} {here} {train}')}"
    if processes(c) > 1 or c.restarts:
        return f"srun {ranks} --standalone {train}"
    return f"srun {python} {train}"


class Script(Template):
    """A template in which $ is the shell's."""

    delimiter = "@"


class Configured(Protocol):
    """What a job does, and the folder that it runs in."""

    @property
    def config(self) -> RunConfig | PrepareConfig: ...

    @property
    def folder(self) -> Path: ...


@dataclass(frozen=True)
class JobBatch:
    """What one call of sbatch submits: runs, the command of each, what comes `before` and `after` it in the script, and
    the jobs among them whose configuration is known by now."""

    name: str
    runs: Sequence[Path]
    known: Sequence[Configured]
    command: str
    at_once: int | None = None
    before: str = ""
    after: str = ""

    def script(self, c: SubmitConfig, home: Path) -> str:
        """The text of its script, which lies in the folder `home`."""
        several = len(self.runs) > 1
        return Script(Path(__file__).with_name("job.sbatch").read_text(encoding="utf-8")).substitute(
            options=sbatch_lines(
                c, self, f"{home}/".replace("%", "%%") + ("slurm-%A_%a.out" if several else "slurm-%j.out")
            ),
            folder=shlex.quote(str(Path.cwd())),
            setup=c.setup,
            runs=" ".join(shlex.quote(str(run)) for run in self.runs),
            code=shlex.quote(str(home / "code")),
            notice=c.notice,
            requeues=c.requeues,
            command=self.command,
            before=self.before,
            after=self.after,
        )


# ------------------------------------------------------------------------------------------------------- submitting


def read_options(argv: Sequence[str]) -> tuple[SubmitConfig, Settings]:
    """How to submit, and the rest of the command line."""
    settings = read([*normalized(argv)])
    rest = settings.drop([*SubmitConfig.model_fields])
    rest.words = settings.words
    refuse_unknown(rest)
    return validate(SubmitConfig, settings.pick([*SubmitConfig.model_fields])), rest


def refuse_unknown(rest: Settings) -> None:
    """ConfigError for a key that neither a job, a run nor a study has, with the nearest of all that could be meant."""
    validate(Plugins, rest.pick(["plugins"]))  # they may register methods, whose names are keys
    preparing = rest.words[:1] == ["prepare"]
    models = (SubmitConfig, PrepareConfig) if preparing else (SubmitConfig, StudyOptions, CompareConfig, RunConfig)
    known = [key for model in models for key, _ in keys(model, {})]
    for path, source in rest.origin.items():
        if not any(path[0] in model.model_fields for model in models) and not is_method(path[0]):
            key = ".".join(path)
            raise ConfigError(f"{source}: unknown key {key!r}{nearest(key, known) or '; --help lists all keys'}")


def normalized(argv: Sequence[str]) -> Iterator[str]:
    """--dry-run and --sbatch in the form that all other keys have."""
    words = iter(argv)
    for word in words:
        if word == "--sbatch":
            word = next(words, "")
            yield f"sbatch.{word}" if "=" in word else f"sbatch.{word}=null"
        else:
            yield "dry_run=true" if word == "--dry-run" else word


def submit(c: SubmitConfig, settings: Settings) -> None:
    """Submit the run that `settings` describe, or what is left of it. UserError for what can be seen to fail."""
    config = validate(RunConfig, settings)
    config = settled(config, "bf16" if c.gpus and config.backend.device != "cpu" else "fp32")
    config.train.rows_per_rank(c.nodes * processes(c))
    dataset = open_dataset(config.data.path, verify=False)
    job = Job(Path(config.out).name, config, fingerprint(config, dataset.fingerprint), None)
    refuse_other_run(job, dataset.fingerprint)
    if job.record:
        raise UserError(f"{config.out} is done; its record is {config.out}/record.json")
    submit_batches(c, Path(config.out), [JobBatch(job.name, [job.folder], [job], trainer_command(c))])


def submit_batches(c: SubmitConfig, out: Path, batches: Sequence[JobBatch]) -> None:
    """Render the batches and submit each after the one before it; or print them, with --dry-run."""
    home = Path.cwd() / next(path for i in itertools.count(1) if not (path := out / "jobs" / f"{i:03}").exists())
    scripts = [batch.script(c, home) for batch in batches]
    if c.dry_run:
        return print("\n".join(scripts), end="")
    refuse_busy(out, [run for batch in batches for run in batch.runs])
    make_folder(home)
    snapshot(home / "code")
    numbers: list[str] = []
    try:
        for batch, text in zip(batches, scripts, strict=True):
            for job in batch.known:
                job.folder.mkdir(parents=True, exist_ok=True)
                write_json(job.folder / "config.json", keep_plugins(job.config, home).model_dump(mode="json"))
            (home / f"{batch.name}.sbatch").write_text(text, encoding="utf-8")
            numbers.append(sbatch(home / f"{batch.name}.sbatch", numbers[-1:]))
            print(
                f"submitted job {numbers[-1]}: {batch.name}, {len(batch.runs)} run(s); log: {home}/slurm-{numbers[-1]}*"
            )
    finally:
        (home / "id").write_text("".join(f"{number}\n" for number in numbers))


def sbatch(path: Path, after: Sequence[str]) -> str:
    """The number of the job. UserError with SLURM's message where it refuses."""
    wait = [f"--dependency=afterany:{number}" for number in after]
    done = subprocess.run(["sbatch", "--parsable", *wait, str(path)], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"SLURM refused {path}: {' '.join(done.stderr.split()).removeprefix('sbatch: error: ')}")
    return done.stdout.strip().split(";")[0]


def refuse_busy(out: Path, runs: Sequence[Path]) -> None:
    """UserError where no job can be submitted, or where an earlier one still works in `out`, or a file STOP lies."""
    if not shutil.which("sbatch"):
        raise UserError(
            "no sbatch here: submit where SLURM is; --dry-run prints the script, `thriftlab launch` uses ssh"
        )
    queue = subprocess.run(["squeue", "--me", "--noheader", "--format=%F"], capture_output=True, text=True)
    if queue.returncode:
        raise UserError(f"SLURM does not answer: {' '.join(queue.stderr.split())}")
    earlier = {number for path in out.glob("jobs/*/id") for number in path.read_text().split()}
    if active := sorted(earlier & set(queue.stdout.split())):
        raise UserError(f"job {' and '.join(active)} is at work in {out}; wait for it, or: scancel {' '.join(active)}")
    for stop in (run / "STOP" for run in runs):
        if stop.exists() and not stop.read_text().startswith("job "):
            raise UserError(f"{stop} keeps this run from going on; remove it first")
        stop.unlink(missing_ok=True)  # of a job that is gone


def snapshot(target: Path) -> None:
    """A copy of this code, for the jobs to import: later edits do not reach a run that waits or is requeued."""
    for floor in FLOORS:
        shutil.copytree(HOME / floor, target / "thriftlab" / floor, ignore=shutil.ignore_patterns("__pycache__"))
    commit, diff = record.code()
    (target / "thriftlab" / "code.diff").write_bytes(diff)
    (target / "thriftlab" / "COMMIT").write_text(commit or "")


def keep_plugins(config: RunConfig | PrepareConfig, home: Path) -> RunConfig | PrepareConfig:
    """The same with copies of its plugins."""
    copies = [home / "code" / "plugins" / str(i) / Path(path).name for i, path in enumerate(config.plugins)]
    for path, copy in zip(config.plugins, copies, strict=True):
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return config.model_copy(update={"plugins": tuple(map(str, copies))})
