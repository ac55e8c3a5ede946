"""Several machines without SLURM: what runs on each, and a run on two of them that loses one and goes on."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tools import gang, namespaces
from tests.tools.runs import assert_same, run_status, traces
from tests.tools.tiny import tiny_config
from tests.tools.waiting import PATIENCE, before_step, until
from thriftlab.data.errors import ConfigError
from thriftlab.launch import cli
from thriftlab.launch.cluster import hosts

LAUNCH = """
from thriftlab.launch import cli
from thriftlab.launch.cluster import hosts
hosts.GRACE = 2.0
raise SystemExit(cli.main(["launch", "--config", "run.json"]))
"""
LONG = {"budget": {"tokens": 40 * 8 * 32}, "checkpoint": {"every": 10, "keep": 2}}


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


CARRIED = (
    "NCCL_IB_PKEY", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_DISTRIBUTED_DEBUG", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", "LD_LIBRARY_PATH", "WANDB_PROJECT", "WANDB_MODE",
    "OMP_NUM_THREADS",
)  # fmt: skip
LEFT = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "HOME_OF_NCCL_", "TORCHELASTIC_RUN_ID", "LD_LIBRARY_PATH_OLD")


def test_variables_that_count_are_taken_along_and_keys_are_not(capsys, monkeypatch):
    for name in (*CARRIED, *LEFT):
        monkeypatch.setenv(name, f"value of {name}")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # of a rank, which may not launch
    assert cli.main(["launch", "--dry-run", "train.batch_size=6"]) == 0
    said = capsys.readouterr().out
    assert [name for name in CARRIED if f"{name}=value of {name}" not in said] == []
    assert [name for name in LEFT if f"value of {name}" in said] == []
    assert not hosts.CARRIED.match("TORCHELASTIC_RUN_ID")


@pytest.mark.parametrize(
    "text, message",
    [
        ("nodeA slots=0", "hosts, line 1: 'nodeA slots=0'; write each machine once, as: node1 slots=8"),
        ("a\nb\na", "hosts, line 3: 'a'; write each machine once"),
        ("a\nme@A", "hosts, line 2: 'me@A'; write each machine once"),
        ("# none\n", "hosts names no machine; write one a line"),
        (None, "hosts: No such file or directory"),
        ("a slots=3", "train.batch_size = 32 is not a multiple of the 3 ranks"),
    ],
)
def test_mistakes_of_a_hostfile(text, message, capsys):
    Path("hosts").unlink() if text is None else Path("hosts").write_text(text)
    assert cli.main(["launch"]) == 2
    assert message in capsys.readouterr().err


FORMS = {
    "node1": ("node1", 1), "node1 slots=2": ("node1", 2), "node1:2": ("node1", 2), "10.0.0.7:4": ("10.0.0.7", 4),
    "me@node1\tslots=2": ("me@node1", 2), "me@node-1.a.b:16 # first": ("me@node-1.a.b", 16),
    "[fd00::1]": ("fd00::1", 1), "[fd00::1] slots=2": ("fd00::1", 2), "me@[fd00::1]:2": ("me@fd00::1", 2),
    "node1 slots=2 max_slots=4": ("node1", 2),
}  # fmt: skip


@pytest.mark.parametrize("line", FORMS)
def test_forms_of_a_hostfile(line):
    Path("hosts").write_text(f"\ufeff# mine\r\n\r\n  {line}  \r\n", encoding="utf-8")
    assert hosts.read_hosts(Path("hosts")) == dict([FORMS[line]])


@pytest.mark.parametrize(
    "line",
    ["node1:", "node1 2", "node1 slots=two", "node1 slots=0", "node1:0", "node1:2 slots=2", "fd00::1", "fd00::1:2",
     "[fd00::1", "-oProxyCommand=x", "a@-o", "-v@node1", "node1, node2", "node1;node2",
     "node1 slots=2 cores=3", "node1\u0662"],
)  # fmt: skip
def test_what_is_no_line_of_a_hostfile_is_refused_with_the_forms_that_are(line):
    Path("hosts").write_text(f"node0\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        hosts.read_hosts(Path("hosts"))
    assert f"hosts, line 2: {line!r}; " in str(caught.value) and "[fd00::1] slots=8" in str(caught.value)


@given(st.text("ab1:.[]@= -#\n\u0662slots", max_size=30) | st.binary(max_size=20))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
def test_any_hostfile_is_read_or_refused(desk, content):
    (desk / "hosts").write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        found = hosts.read_hosts(desk / "hosts")
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert all(count > 0 and name[0] not in "-[" for name, count in found.items())


def test_addresses_of_ipv6_and_paths_are_as_ssh_and_torchrun_want_them(capsys, monkeypatch, desk):
    monkeypatch.setenv("HOME", str(desk))
    Path("hosts").write_text("me@[fd00::1]\n[fd00::2]:1\n")
    (desk / "run.yaml").write_text("data: {path: ~/data}\ntrain: {batch_size: 6}\noptim: {include: [mlp$]}\n")
    assert cli.main(["launch", "--dry-run", "--config", "~/run.yaml", "out=~/x"]) == 0
    first, second = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    assert (first[4], second[4]) == ("me@fd00::1", "fd00::2")
    assert "'--rdzv-endpoint=[fd00::1]:29400'" in second[5] and "--local-addr=fd00::2" in second[5]
    assert shlex.split(second[5])[-4:] == [
        f"config={desk}/run.yaml", "out=~/x", f"data.path={desk}/data", f"out={desk}/x"
    ]  # fmt: skip


REFUSED = "echo 'ssh: connect to host x port 22: Connection refused' >&2; exit 1"
ENDS = {  # what runs in the place of ssh; $4 is the machine -> what is said of it
    "at once": (REFUSED, "nodeA: ssh could not connect.*exit code 1.: ssh: connect to host x port 22: Connection refu"),
    "the second alone": (f"[ $4 = nodeA ] && exit 0; {REFUSED}", "nodeB: ssh could not connect"),
    "later": (f"sleep 0.3; {REFUSED}", "node.: ssh could not connect"),
    "255": ("echo no route; exit 255", "nodeA: ssh could not connect, .*exit code 255.: no route; try: ssh node. true"),
    "an error": (
        "echo 'error: no data'; echo '======'; echo 'Connection to x closed.' >&2; exit 1",
        "nodeA: no data; its torchrun ended with exit code 1, see above; the same command",
    ),
    "silence": ("exit 3", "nodeA: it said nothing; its torchrun ended with exit code 3"),
    "a signal": ("echo started; kill -9 $$", "nodeA: started; its ssh was ended by signal 9"),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("several", [False, True])
def test_how_ssh_ends_is_how_the_launch_ends(how, several, fake_ssh, capsys):
    (script, message), several = ENDS[how], several or how == "the second alone"
    Path("hosts").write_text("nodeA\nnodeB\n" if several else "nodeA\n")
    fake_ssh(script)
    assert cli.main(["launch", "train.batch_size=6"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and re.search(message.replace("nodeA", "node.") if several else message, said[0])


def test_what_runs_there_passes_through(fake_ssh, capsys):
    Path("hosts").write_text("nodeA\n")
    fake_ssh("printf 'one\\ntwo \\xc2\\xb1\\n'; echo three >&2; exit 0")
    assert cli.main(["launch"]) == 0
    assert capsys.readouterr() == ("one\ntwo \xb1\n", "three\n")


def test_without_an_ssh_that_runs(desk, fake_ssh, capsys, monkeypatch):
    fake_ssh("")
    (desk / "ssh").write_bytes(b"\x7fELF")
    monkeypatch.setenv("PATH", str(desk))
    assert cli.main(["launch", "train.batch_size=6"]) == 2
    assert "nodeA: " in (said := capsys.readouterr().err) and "cannot be run: Exec format error" in said
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["launch", "train.batch_size=6"]) == 2
    assert "thriftlab launch needs ssh, and there is none here" in capsys.readouterr().err


@pytest.fixture
def fake_ssh(desk, monkeypatch):
    """A stand-in that runs these lines of bash for every machine; its name is $4 and its command $5."""

    def install(lines):
        (desk / "ssh").write_text(f"#!/bin/bash\n{lines}\n")
        (desk / "ssh").chmod(0o755)

    monkeypatch.setenv("PATH", f"{desk}:{os.environ['PATH']}")
    monkeypatch.setattr("thriftlab.launch.cluster.hosts.GRACE", 0.5)
    return install


def launched(folder, *words):
    """Code and messages of a launch that has a process of its own."""
    os.chdir(folder)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return cli.main(["launch", *words]), said.getvalue()


@pytest.mark.slow
def test_ctrl_c_becomes_a_stop_file_that_is_taken_back(desk, fake_ssh, capsys):
    (desk / "out").mkdir()
    fake_ssh("touch on-$4; for i in {1..6000}; do [ -e out/STOP ] && exit 0; sleep 0.1; done; exit 1")
    process, answer = gang.start(launched, desk, "train.batch_size=6", "out=out", PATH=os.environ["PATH"])
    until(lambda: answer.poll() or [*desk.glob("on-*nodeB")])
    os.kill(process.pid, signal.SIGINT)
    code, said = answer.recv()
    assert code == 130 and "the same command resumes" in said and not (desk / "out" / "STOP").exists()
    (desk / "out" / "STOP").touch()
    assert cli.main(["launch", "train.batch_size=6", "out=out"]) == 2
    assert "out/STOP keeps this run from going on; remove it first" in capsys.readouterr().err


def test_a_machine_that_ssh_does_not_reach(fake_ssh, capsys):
    fake_ssh("[ $4 = nodeA ] && exec sleep 600; exit 255")
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


UNTIL_PULLED = """
while not Path("pulled").exists():
    time.sleep(0.01)
"""
TOGETHER = """
if "TORCHELASTIC_RUN_ID" in os.environ:  # both have imported what they need
    Path("here-" + os.environ["RANK"]).touch()
    while len([*Path.cwd().glob("here-*")]) < 2:
        time.sleep(0.01)
"""


@pytest.mark.slow
def test_two_machines_lose_one_and_go_on_as_if_unbroken(machines, tiny_data, desk):
    plugin = Path(before_step(Path("held.py"), 14, UNTIL_PULLED))
    plugin.write_text(plugin.read_text() + TOGETHER)
    options = {**LONG, "backend": {"timeout": 6.0}, "plugins": [str(plugin)]}
    whole, broken = (tiny_config(tiny_data, desk / name, **options) for name in ("whole", "broken"))
    process = launch(machines, broken)
    until(lambda: [*desk.glob("broken/checkpoints/step-*")], process)
    machines.pull_the_plug()
    Path("pulled").touch()
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, said
    assert "rank 1 hangs, or its node is gone" in said or "rank 0 hangs, or its node is gone" in said
    assert "its torchrun ended with exit code 1, see above; the same command goes on" in said

    machines.plug_in()
    for file in desk.glob("here-*"):
        file.unlink()
    process = launch(machines, broken)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    gang.ranks(2, run_status, whole.model_dump())
    assert_same(traces(desk / "broken"), traces(desk / "whole"))
