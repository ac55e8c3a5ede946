"""`thriftlab check gpu`: every check a process with a limit and one line, whatever becomes of it."""

import inspect
import json
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.tools.waiting import until
from thriftlab.launch import cli, messages
from thriftlab.launch.gpu import check, one
from thriftlab.launch.gpu.setting import Finding, NotBuilt, Setting, Skipped

SAYS_OK = """print('{"status": "ok", "says": "fine", "numbers": {"a": 1}, "wrong": []}')"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with a stand-in for the process of a check; returns exit code and the lines of the file."""
    monkeypatch.setattr(check, "made_up_text", lambda folder, documents: folder)

    def run(script, *words):
        code = "import json, os, subprocess, sys, time\nbody, device, size, text, folder = sys.argv[1:]\n"
        (tmp_path / "child.py").write_text(code + textwrap.dedent(script))
        monkeypatch.setattr(check, "ONE", (sys.executable, str(tmp_path / "child.py")))
        out = tmp_path / "found.json"
        code = cli.main(["check", "gpu", "--out", str(out), *words])
        return code, [json.loads(line) for line in out.read_text().splitlines()]

    return run


REHEARSAL = ("--device", "cpu", "--small")


def test_there_are_thirteen_and_they_end_in_eight_minutes():
    assert [c.number for c in check.CHECKS] == list(range(1, 14))
    assert sum(c.limit for c in check.CHECKS) <= 480
    bodies = [pkgutil.resolve_name(f"thriftlab.launch.gpu.{c.body}") for c in check.CHECKS]
    assert all(map(inspect.isgeneratorfunction, bodies)) and len(set(bodies)) == 13


def test_every_check_has_one_line_and_one_row(run, capsys):
    code, lines = run(SAYS_OK, *REHEARSAL)
    assert code == 0 and [line["check"] for line in lines] == list(range(1, 14))
    assert {line["status"] for line in lines} == {"ok"} and lines[0]["numbers"] == {"a": 1}
    printed = capsys.readouterr().out
    assert sum(row.count("| ok") for row in printed.splitlines()) == 13 and "| 6 speed, MFU" in printed


def test_what_a_process_is_told(run, tmp_path):
    script = "print(json.dumps({'status': 'ok', 'says': ' '.join([body, device, size, text, folder])}))"
    _, [line] = run(script, *REHEARSAL, "--only", "6")
    body, device, size, text, folder = line["says"].split()
    assert (body, device, size) == ("model:speed", "cpu", "small")
    assert text.endswith("/text") and folder.endswith("/6") and not Path(folder).exists(), "nothing is left"


def test_some_of_them(run):
    assert [line["check"] for line in run(SAYS_OK, *REHEARSAL, "--only", "9,3")[1]] == [3, 9]


@pytest.mark.parametrize(("words", "message"), [
    (["check"], "thriftlab check gpu"),
    (["check", "gpu", "--only", "3,14"], "there is no check 14; they are 1 to 13"),
    (["check", "gpu", "--device", "cpu"], "cpu for a rehearsal with --small"),
    (["check", "gpu", "--device", "auto", "--small"], "it takes cuda"),
    (["check", "gpu", "--limit", "3"], "limit"),
])  # fmt: skip
def test_mistakes(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_runs_to_its_end_and_says_what_it_skipped(run, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, lines = run(SAYS_OK)
    assert code == 0 and len(lines) == 13
    done = [line["check"] for line in lines if line["status"] == "ok"]
    assert done == [1, 10]
    skipped = [line for line in lines if line["status"] == "skipped"]
    assert len(skipped) == 11 and all("torch" in line["says"] for line in skipped)
    assert "| skipped" in capsys.readouterr().out


def test_a_check_that_takes_too_long_is_killed_with_its_children_and_keeps_what_it_found(run, tmp_path, monkeypatch):
    ready, limits = tmp_path / "ready", []

    class Process(subprocess.Popen):
        def wait(self, limit=None):
            """Its time begins when it has said what it has to say."""
            if limit is not None:
                until(ready.exists, self)
                ready.unlink()
                limits.append(limit)
                limit = 0.01
            return super().wait(limit)

    monkeypatch.setattr(check.subprocess, "Popen", Process)
    script = f"""
        print('{{"status": "running", "says": "half", "numbers": {{"done": [1]}}, "wrong": []}}', flush=True)
        print('{{"status": "running", "says": "tor', end="", flush=True)
        child = subprocess.Popen(["sleep", "3600"])
        with open({str(tmp_path / "pid")!r}, "w") as file:
            file.write(str(child.pid))
        open({str(ready)!r}, "w").close()
        time.sleep(3600)
    """
    code, lines = run(script, *REHEARSAL, "--only", "1,2")
    assert code == 1 and limits == [150, 250]
    assert [line["status"] for line in lines] == ["timeout", "timeout"], "the next one had its turn"
    assert lines[0]["says"] == "half" and lines[0]["numbers"] == {"done": [1]} and lines[0]["limit"] == 150
    until(lambda: gone(int((tmp_path / "pid").read_text())))


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def test_a_check_that_dies_says_its_last_words(run, capsys):
    script = """
        print('{"status": "running", "says": "half", "numbers": {}, "wrong": []}', flush=True)
        sys.exit("CUDA error: an illegal memory access was encountered")
    """
    code, [line] = run(script, *REHEARSAL, "--only", "5")
    assert (code, line["status"], line["says"]) == (1, "failed", "half")
    assert "exit code 1" in line["error"] and "illegal memory access" in line["error"]
    assert "not as it should be: 5; docs/gpu.md says" in capsys.readouterr().err
    assert run("pass", *REHEARSAL, "--only", "5")[1][0]["status"] == "failed", "it said nothing at all"


def test_the_last_line_counts_among_what_libraries_print(run):
    script = """
        print('{"status": "running", "says": "half", "numbers": {}, "wrong": ["x"]}')
        print("[W1130] a library")
        print('{"status": "wrong", "says": "all", "numbers": {}, "wrong": ["a loss | is far"]}')
        print("destroyed")
        sys.stdout.flush()
        os.abort()
    """
    code, [line] = run(script, *REHEARSAL, "--only", "5")
    assert (code, line["status"], line["says"], line["wrong"]) == (1, "wrong", "all", ["a loss | is far"])
    assert check.table([line]).splitlines()[2].count("|") == 5, "no cell breaks the table"


def test_a_finished_check_is_in_the_file_before_the_next_begins(run, tmp_path):
    script = f"""
        text = open({str(tmp_path / "found.json")!r}).read()
        print(json.dumps({{"status": "ok", "says": str(text.count(chr(10)))}}))
    """
    assert [line["says"] for line in run(script, *REHEARSAL, "--only", "2,3,4")[1]] == ["0", "1", "2"]


def test_a_file_that_cannot_be_written_is_one_line(capsys, tmp_path):
    assert cli.main(["check", "gpu", "--out", str(tmp_path), "--only", "1"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_python_that_lacks_a_package_and_has_thriftlab_not_installed_is_one_line(monkeypatch):
    def unknown(name):
        raise messages.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(messages.metadata, "requires", unknown)
    said = messages.missing_extra(ModuleNotFoundError("", name="yaml.nodes"))
    assert said == f"this command needs the package pyyaml, and {sys.executable} has none; pip install pyyaml"


# ------------------------------------------------------------------------------------------------ how one check ends


def lines_of(*steps):
    def body(setting):
        for step in steps:
            if isinstance(step, Exception):
                raise step
            yield step

    return list(one.lines(body, Setting(torch.device("cpu"), True, Path(), Path())))


def test_how_a_check_ends():
    half, whole = Finding("half", {"a": 1}), Finding("whole", {"a": 2})
    assert [line["status"] for line in lines_of(half, whole)] == ["running", "running", "ok"]
    assert lines_of(half, whole)[-1]["numbers"] == {"a": 2}
    assert lines_of(Finding("", wrong=["it is"]))[-1]["status"] == "wrong"
    assert lines_of(half, ValueError("no"))[-1] | {"wrong": []} == {
        "status": "failed", "says": "half", "numbers": {"a": 1}, "wrong": [], "error": "ValueError: no",
    }  # fmt: skip
    assert (end := lines_of(half, Skipped("too little"))[-1])["status"] == "skipped" and end["says"] == "too little"
    assert lines_of(NotBuilt("not yet"))[-1]["status"] == "not built"


def test_a_number_that_json_cannot_say(capsys, monkeypatch, tmp_path):
    found = Finding("", {"a": float("nan")})
    monkeypatch.setattr(one.pkgutil, "resolve_name", lambda name: lambda setting: iter([found]))
    one.main("a:b", "cpu", "small", str(tmp_path), str(tmp_path))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["numbers"] == {"a": None}
