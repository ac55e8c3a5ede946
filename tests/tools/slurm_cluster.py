"""A throw-away SLURM of two virtual nodes on this machine: real daemons, no service manager, all state in one folder.

Needs slurmctld, slurmd and their client (`make slurm`). One surprise: a requeued job starts only when its credential
has expired, two minutes by default; here the least that SLURM takes, five seconds.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.tools import waiting
from tests.tools.gang import free_port

CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
FirstJobId={first}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
KillWait=20
ReturnToService=2
JobRequeue=1
MailProg=/bin/true
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN\n"
PARTITION = "PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP\n"
DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def missing():
    """The programs that are not on this machine."""
    return [name for name in DAEMONS if not shutil.which(name)]


def up(folder: Path) -> Path:
    """Start the daemons; returns slurm.conf when both nodes are idle."""
    host, conf = socket.gethostname().split(".")[0], folder / "slurm.conf"
    # a job's ranks meet at a port that follows from its number: another suite's jobs have others
    first = 20 * (os.getpid() % 1000) + 1
    text = CONF.format(folder=folder, host=host, user=getpass.getuser(), port=free_port(), first=first)
    nodes = "".join(NODE.format(name=name, host=host, port=free_port()) for name in ("n1", "n2"))
    conf.write_text(text + nodes + PARTITION)
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    for daemon in (["slurmctld", "-c"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
        subprocess.run(daemon, env=environment, check=True, timeout=waiting.PATIENCE)
    idle = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
    waiting.until(lambda: subprocess.run(idle, env=environment, capture_output=True, text=True).stdout.strip() == "2")
    return conf


def down(folder: Path) -> None:
    """End what `up` started: the jobs, then the daemons, whose state nobody needs any more."""
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run(["scancel", "--me", "--signal=KILL", "--full"], env=environment, timeout=30)
    subprocess.run(["scancel", "--me"], env=environment, timeout=30)
    for _ in range(100):  # what does not end by then is killed with the daemons
        left = subprocess.run(["squeue", "-h"], env=environment, capture_output=True, timeout=30)
        if left.returncode or not left.stdout.strip():
            break
        time.sleep(0.1)
    for path in [*folder.glob("slurmd-*.pid"), *folder.glob("slurmctld.pid")]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)
