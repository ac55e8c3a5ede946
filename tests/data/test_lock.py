"""One folder, one writer: who is refused, what it is told, and who is not in the way."""

import errno
import fcntl
import json
import os
import platform
import re
import subprocess
import sys

import pytest

from thriftlab.data.errors import UserError
from thriftlab.data.lock import claimed

# holds the folder, says so, and leaves a child behind if it is told to
HOLDER = """
import pathlib, subprocess, sys
from thriftlab.data.lock import claimed
with claimed(pathlib.Path(sys.argv[1])) as lock:
    if sys.argv[2:]:
        left = subprocess.Popen(["sleep", "600"], pass_fds=[lock], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        print(left.pid, flush=True)
    else:
        print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder, *words):
    command = [sys.executable, "-c", HOLDER, str(folder), *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def refusal(folder):
    with pytest.raises(UserError) as refused, claimed(folder):
        pass
    assert "\n" not in str(refused.value) and refused.value.code == 2
    return str(refused.value)


def test_the_second_is_told_who_is_at_work_and_a_killed_one_is_in_nobodys_way(tmp_path):
    process, _ = holder(tmp_path)
    who = f"process {process.pid} on {platform.node()} is at work in {tmp_path}, and a folder has one writer"
    assert refusal(tmp_path).startswith(who)
    process.kill()
    process.wait()
    with claimed(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


def test_children_that_a_killed_process_left_are_named(tmp_path):
    process, child = holder(tmp_path, "and a child")
    process.kill()
    process.wait()
    said = refusal(tmp_path)
    assert f"process {child} on {platform.node()}, left behind by process {process.pid}, which is gone," in said
    assert f"`kill {child}`" in said
    os.kill(int(child), 9)


def test_a_process_whose_launcher_was_killed_is_named_so(tmp_path):
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    command = [sys.executable, "-c", launcher, HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    left = json.loads((tmp_path / ".lock").read_text())["process"]
    assert re.search(rf"process {left} .*its parent is gone.*`kill {left}`", refusal(tmp_path))
    process.stdin.close()  # which ends it


@pytest.mark.parametrize("content", ["", '{"host', "[1]", '{"host": "node9", "process": 7, "parent": 1}'])
def test_what_the_lock_says_may_be_from_elsewhere_or_torn(tmp_path, content):
    with claimed(tmp_path):
        (tmp_path / ".lock").write_text(content)
        said = refusal(tmp_path)
    assert said.startswith("process 7 on node9 is" if "node9" in content else "another process is")


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(RuntimeWarning, match=f"{tmp_path}.* has no locks .No locks available"), claimed(tmp_path):
        pass
