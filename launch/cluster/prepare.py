"""A preparation as a SLURM job: on one node with its cores, or on several with a Ray that lives as long as the job.

    OUT.job/  config.json  status  jobs/001/ ...

It lies beside OUT, which is made whole. A preparation may be killed at any moment and goes on where it was, so the
script ends it when the time is nearly up. Ray is neither `ray symmetric-run` nor `ray stop`, which end every Ray that
the user has on a node; here a node leaves when the first one no longer answers.
"""

import importlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from thriftlab.data.errors import ConfigError, UserError
from thriftlab.data.files import printable
from thriftlab.data.prepare.request import PrepareConfig
from thriftlab.launch.cluster.slurm import JobBatch, SubmitConfig, submit_batches
from thriftlab.train.config.parse import Settings, validate

# Its exit code says how it ended, unless OUT.job/STOP ended it.
RUN = """\
prepare() {
  echo running > "$run/status"
  "$@" &
  step=$!
  until [ -e "$run/STOP" ] || ! kill -0 $step 2> /dev/null; do sleep 1; done
  [ ! -e "$run/STOP" ] || scancel --signal=TERM "$SLURM_JOB_ID.0" # to its processes; srun would have them killed
  wait $step && end=done || { [ -e "$run/STOP" ] && end=preempted || end=failed; }
  rm -f "$run/.token"
  echo $end > "$run/status"
}
"""
TOKEN = """\
export RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 RAY_task_oom_retries=3
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$(realpath "$run")/.token"
(umask 077; @PYTHON -c 'import secrets; print(secrets.token_hex(), end="")' > "$RAY_AUTH_TOKEN_PATH")
"""
ON_A_NODE = """\
temporary="/tmp/ray-$SLURM_JOB_ID" spilled="${TMPDIR:-/tmp}/spilled-$SLURM_JOB_ID"
trap exit TERM
trap 'kill $(jobs -p) 2> /dev/null; wait; rm -rf "$temporary" "$spilled"' EXIT
ray=(@PYTHON -m ray.scripts.scripts start --block --node-ip-address="$(address_of "$SLURMD_NODENAME")"
  --num-cpus="$SLURM_CPUS_ON_NODE" --object-store-memory=$((SLURM_MEM_PER_NODE * 300000))
  --min-worker-port=0 --max-worker-port=0 --temp-dir="$temporary" --object-spilling-directory="$spilled")
answers() { (: > "/dev/tcp/${head%:*}/${head#*:}") 2> /dev/null; }
if [ "$SLURM_NODEID" = 0 ]; then
  "${ray[@]}" --head --port="${head#*:}" --include-dashboard=false > /dev/null &
  until answers || ! kill -0 $! 2> /dev/null; do sleep 1; done
  RAY_ADDRESS=$head @COMMAND
  code=$?
else
  until answers; do sleep 1; done
  "${ray[@]}" --address="$head" > /dev/null &
  while answers; do sleep 2; done
  code=0
fi
exit $code
"""


@dataclass(frozen=True)
class Preparation:
    config: PrepareConfig

    @property
    def folder(self) -> Path:
        return self.config.out.with_name(f"{self.config.out.name}.job")


def submit(c: SubmitConfig, settings: Settings) -> None:
    """Submit the preparation that `settings` describe. UserError for what can be seen to fail."""
    job = Preparation(validate(PrepareConfig, settings))
    refuse(c, job.config)
    on_ray = job.config.engine == "ray"
    batch = JobBatch(
        job.config.out.name, [job.folder], [job], command(job.config), before=RUN + (in_python(TOKEN) if on_ray else "")
    )
    submit_batches(c, job.folder, [batch])


def refuse(c: SubmitConfig, config: PrepareConfig) -> None:
    if c.processes or c.restarts:
        raise ConfigError("processes and restarts are for training; a preparation has --cpus and workers")
    if config.engine == "ray":
        importlib.import_module("thriftlab.data.prepare.engines.on_ray")  # refuses where Ray is missing
        if not c.memory:
            raise ConfigError("engine=ray needs --memory: without it Ray takes a share of all the memory of a node")
    elif c.nodes > 1:
        raise ConfigError(f"engine={config.engine} works on one node; for {c.nodes}: engine=ray")
    if (config.out / "manifest.json").exists() and not config.force:
        raise UserError(
            f"{printable(config.out)} is prepared already; choose another out, or replace it with force=true"
        )


def command(config: PrepareConfig) -> str:
    """How the script prepares: in one process, or in one on the first node, with a task of Ray on each."""
    workers = "" if config.workers else ' workers="$((SLURM_JOB_NUM_NODES * SLURM_CPUS_ON_NODE))"'
    prepare = f'{python()} -m thriftlab.launch prepare --config "$run/config.json"{workers}'
    if config.engine != "ray":
        return f"prepare srun {prepare}"
    return f"prepare srun --kill-on-bad-exit=0 bash -c {shlex.quote(in_python(ON_A_NODE).replace('@COMMAND', prepare))}"


def in_python(text: str) -> str:
    return text.replace("@PYTHON", python())


def python() -> str:
    return shlex.quote(sys.executable)
