"""Several machines without SLURM: what runs on each, and a run on two of them that loses one and goes on."""

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tools import gang, namespaces
from tests.tools.runs import assert_same, run_status, traces
from tests.tools.tiny import tiny_config
from thriftlab.launch import cli

LAUNCH = """
from thriftlab.launch import cli
from thriftlab.launch.cluster import hosts
hosts.GRACE = 2.0
raise SystemExit(cli.main(["launch", "--config", "run.json"]))
"""
LONG = {"budget": {"tokens": 150 * 8 * 32}, "checkpoint": {"every": 10, "keep": 2}}


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("nodeA slots=2  # the first\n\nme@nodeB\n")
    return tmp_path


def test_what_runs_on_each_machine(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN; rm -rf /")
    assert cli.main(["launch", "--dry-run", "--restarts", "2", "train.batch_size=6", "optim.betas=[0.8, 0.9]"]) == 0
    first, second = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    assert (first[:5], second[4]) == (["ssh", "-tt", "-o", "BatchMode=yes", "nodeA"], "me@nodeB")
    there, program = first[5].split(" && ")
    program = shlex.split(program)
    assert shlex.split(there) == ["cd", os.getcwd()] and "NCCL_DEBUG=WARN; rm -rf /" in program
    assert {"--nnodes=2", "--nproc-per-node=2", "--max-restarts=2", "--rdzv-endpoint=nodeA:29400"} < {*program}
    assert program[-3:] == ["train", "train.batch_size=6", "optim.betas=[0.8, 0.9]"]
    assert "--nproc-per-node=1" in second[5] and "--local-addr=nodeB" in second[5] and "is_host=0" in second[5]


@pytest.mark.parametrize(
    "text, message",
    [
        ("nodeA slots=0", "hosts, line 1: 'nodeA slots=0'; write each machine once, as: node1 slots=8"),
        ("a\nb\na", "hosts, line 3: 'a'; write each machine once"),
        ("# none\n", "hosts names no machine; write one a line"),
        (None, "hosts: No such file or directory"),
        ("a slots=3", "train.batch_size = 32 is not a multiple of the 3 ranks"),
    ],
)
def test_mistakes_of_a_hostfile(text, message, capsys):
    Path("hosts").unlink() if text is None else Path("hosts").write_text(text)
    assert cli.main(["launch"]) == 2
    assert message in capsys.readouterr().err


def come(path, process):
    """Wait until there is such a file, or the process has ended."""
    while running(process) and not [*path.parent.glob(path.name)]:
        time.sleep(0.01)


def running(process):
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


@pytest.fixture
def fake_ssh(desk, monkeypatch):
    """A stand-in that runs these lines of bash for every machine; its name is $4 and its command $5."""

    def install(lines):
        (desk / "ssh").write_text(f"#!/bin/bash\n{lines}\n")
        (desk / "ssh").chmod(0o755)

    monkeypatch.setenv("PATH", f"{desk}:{os.environ['PATH']}")
    monkeypatch.setattr("thriftlab.launch.cluster.hosts.GRACE", 0.5)
    return install


@pytest.mark.slow
def launched(folder, *words):
    """Code and messages of a launch that has a process of its own."""
    os.chdir(folder)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return cli.main(["launch", *words]), said.getvalue()


def test_ctrl_c_becomes_a_stop_file_that_is_taken_back(desk, fake_ssh, capsys):
    (desk / "out").mkdir()
    fake_ssh("touch on-$4; for i in {1..300}; do [ -e out/STOP ] && exit 0; sleep 0.1; done; exit 1")
    process, answer = gang.start(launched, desk, "train.batch_size=6", "out=out", PATH=os.environ["PATH"])
    come(desk / "on-*nodeB", process)
    os.kill(process.pid, signal.SIGINT)
    code, said = answer.recv()
    assert code == 130 and "the same command resumes" in said and not (desk / "out" / "STOP").exists()
    (desk / "out" / "STOP").touch()
    assert cli.main(["launch", "train.batch_size=6", "out=out"]) == 2
    assert "out/STOP keeps this run from going on; remove it first" in capsys.readouterr().err


def test_a_machine_that_ssh_does_not_reach(fake_ssh, capsys):
    fake_ssh("[ $4 = nodeA ] && exec sleep 60; exit 255")
    assert cli.main(["launch", "train.batch_size=6"]) == 2
    assert "me@nodeB: ssh could not connect" in capsys.readouterr().err


@pytest.fixture
def machines(tmp_path):
    if why := namespaces.refused():
        pytest.skip(why)
    with namespaces.Machines(tmp_path / "lan") as machines:
        yield machines


@pytest.fixture(autouse=True)
def lan(tmp_path):
    (tmp_path / "lan").mkdir()


def launch(machines, config):
    Path("run.json").write_text(json.dumps(config.model_dump(mode="json")))
    Path("hosts").write_text("nodeA\nnodeB\n")
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH],
        env={**os.environ, "PATH": f"{machines.folder}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_machines_lose_one_and_go_on_as_if_unbroken(machines, tiny_data, desk):
    whole, broken = (
        tiny_config(tiny_data, desk / name, **LONG, backend={"timeout": 3.0}) for name in ("whole", "broken")
    )
    process = launch(machines, broken)
    come(desk / "broken" / "checkpoints" / "step-*", process)
    machines.pull_the_plug()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "rank 1 hangs, or its node is gone" in said or "rank 0 hangs, or its node is gone" in said
    assert "its torchrun ended with exit code 1, see above; the same command goes on" in said

    machines.plug_in()
    process = launch(machines, broken)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    gang.ranks(2, run_status, whole.model_dump())
    assert_same(traces(desk / "broken"), traces(desk / "whole"))
