"""Jobs on a real SLURM of two virtual nodes: they run, come back when pre-empted, and stay away when they should."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.tools import gang, slurm_cluster
from tests.tools.runs import assert_same, run_status, traces
from tests.tools.tiny import tiny_config
from tests.tools.waiting import before_step, until
from thriftlab.launch import cli
from thriftlab.train.records.record import read_record

pytestmark = pytest.mark.slow

NEEDED = os.environ.get("THRIFTLAB_NEEDS_SLURM") == "1"  # then a machine without SLURM is a failure
LONG = {"budget": {"tokens": 60 * 8 * 32}, "checkpoint": {"every": 20, "keep": 2}}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if absent := slurm_cluster.missing():
        (pytest.fail if NEEDED else pytest.skip)(f"no {', '.join(absent)} here; on Debian or Ubuntu: make slurm")
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            slurm_cluster.up(folder)
            yield
        finally:
            slurm_cluster.down(folder)


@pytest.fixture
def desk(slurm, tmp_path, monkeypatch):
    """Where jobs are submitted: a folder whose name needs quotes."""
    desk = tmp_path / "100% $lab"
    desk.mkdir()
    monkeypatch.chdir(desk)
    return desk


def submit(capsys, *argv):
    """Numbers of the jobs that `thriftlab submit` says it has submitted."""
    assert cli.main(["submit", *argv]) == 0, capsys.readouterr().err
    return re.findall(r"submitted job (\d+)", capsys.readouterr().out)


def write(config, name="run.json"):
    Path(name).write_text(json.dumps(config.model_dump(mode="json")))
    return ["--config", name]


def job(number):
    """What SLURM says of a job, or of each task of an array."""
    said = subprocess.run(["scontrol", "-o", "show", "job", number], capture_output=True, text=True, check=True)
    return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in said.stdout.splitlines()]


def states(number):
    return [task["JobState"] for task in job(number)]


def finish(number, *expected):
    until(lambda: not {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"} & set(states(number)), pause=0.1)
    assert states(number) == [*expected], logs()


def logs():
    return "\n".join(path.read_text() for path in sorted(Path.cwd().rglob("slurm-*.out")))


def ranks_of(number):
    """RANK -> process id of the trainers of a job."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(
                part.split(b"=", 1) for part in (folder / "environ").read_bytes().split(b"\0") if b"=" in part
            )
        except OSError:
            continue
        if variables.get(b"SLURM_JOB_ID") == number.encode() and b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(folder.name)
    return found


# ------------------------------------------------------------------------------------------------------------- runs


UNTIL_ASKED = """
while os.environ["attempt"] == "0" and not Path("broken/STOP").exists():
    time.sleep(0.01)
"""


def test_two_nodes_preempted_and_requeued_are_an_unbroken_run(tiny_data, desk, capsys):
    Path("where.py").write_text("import thriftlab.data.errors as e\nprint('code:', e.__file__)\n")
    plugins = ["where.py", before_step(Path("asked.py"), 30, UNTIL_ASKED)]
    whole, broken = (tiny_config(tiny_data, desk / name, plugins=plugins, **LONG) for name in ("whole", "broken"))
    (number,) = submit(capsys, "--nodes", "2", "--time", "30", *write(broken))
    until((desk / "broken" / "metrics.jsonl").exists)
    assert cli.main(["submit", *write(broken)]) == 2  # while it works
    assert f"job {number} is at work in {desk}/broken" in capsys.readouterr().err
    subprocess.run(["scancel", "--signal=USR1", "--batch", number], check=True)
    gang.ranks(2, run_status, whole.model_dump())
    finish(number, "COMPLETED")
    said = logs()
    assert "attempt 0, on n1 n2" in said and "attempt 1, on n1 n2" in said and "Traceback" not in said
    assert "the time is nearly up" in said and "the run is preempted" in said and "the run is done" in said
    assert set(re.findall("code: (.*)", said)) == {f"{desk}/broken/jobs/001/code/thriftlab/data/errors.py"}
    assert (desk / "broken" / "status").read_text() == "done\n" and not (desk / "broken" / "STOP").exists()
    assert_same(traces(desk / "broken"), traces(desk / "whole"))
    record, code = read_record(desk / "broken" / "record.json"), desk / "broken" / "jobs" / "001" / "code" / "thriftlab"
    assert (record["commit"], record["world"]) == ((code / "COMMIT").read_text() or None, 2)
    assert cli.main(["submit", *write(broken)]) == 2 and "is done" in capsys.readouterr().err


def test_a_cancelled_job_and_a_crashed_one_do_not_come_back(tiny_data, desk, capsys):
    longer = {**LONG, "budget": {"tokens": 30000 * 8 * 32}}
    (cancelled,) = submit(capsys, *write(tiny_config(tiny_data, desk / "cancelled", **longer)))
    (crashed,) = submit(capsys, "--processes", "2", *write(tiny_config(tiny_data, desk / "crashed", **longer)))
    until((desk / "cancelled" / "metrics.jsonl").exists)
    subprocess.run(["scancel", cancelled], check=True)
    until((desk / "crashed" / "metrics.jsonl").exists)
    os.kill(ranks_of(crashed)[1], signal.SIGKILL)
    finish(cancelled, "CANCELLED")
    finish(crashed, "FAILED")
    assert (desk / "cancelled" / "status").read_text() == "preempted\n"
    assert (desk / "crashed" / "status").read_text() == "failed\n"
    assert "another rank's connection closed: it crashed or was killed" in logs() and "back to the queue" not in logs()
    assert (states(cancelled), states(crashed)) == (["CANCELLED"], ["FAILED"])
    assert [task["Restarts"] for task in job(cancelled) + job(crashed)] == ["0", "0"]


# ---------------------------------------------------------------------------------------------------------- studies


def test_a_study_is_an_array_of_trials_and_one_of_runs(tiny_data, desk, capsys):
    common = tiny_config(tiny_data, desk).model_dump(
        mode="json", exclude={"out", "seed", "plugins"}, exclude_unset=True
    )
    Path("study.json").write_text(json.dumps(common))
    study = ["compare", "adamw", "signsgd", "adamw.lr=1e-3", "--lr-grid", "1e-4,1e-3", "--seeds", "1", "out=study"]
    trials, runs = submit(capsys, *study, "--config", "study.json")
    finish(trials, "COMPLETED", "COMPLETED")
    finish(runs, "COMPLETED", "COMPLETED")
    losses = {
        rate: read_record(desk / "study" / "trials" / "signsgd" / f"lr-{rate}" / "record.json")["results"]["loss"]
        for rate in ("0.0001", "0.001")
    }
    record = read_record(desk / "study" / "signsgd" / "seed-0" / "record.json")
    assert record["config"]["optim"]["lr"] == float(min(losses, key=losses.get))
    report = (desk / "study" / "report.md").read_text()
    assert "signsgd" in report and "adamw" in report and "pending" not in report
    assert cli.main(["submit", *study, "--config", "study.json"]) == 2
    assert "study is done" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ preparations


def prepared(folder):
    """All that lies in a prepared folder, but for when and how it was made."""
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop(Path("manifest.sha256"))
    manifest = json.loads(files.pop(Path("manifest.json")))
    return files, {key: value for key, value in manifest.items() if key != "made"}


NO_END = """
import os, sys, time

def hold(event, given):
    while event == "os.rename" and str(given[1]).endswith("many"):
        time.sleep(0.1)

if os.environ.get("attempt") == "0":
    sys.addaudithook(hold)
"""


def test_a_preparation_on_two_nodes_preempted_and_requeued_is_that_of_one_process(desk, capsys, monkeypatch):
    """Its first attempt does not come to its end, however fast the machine is."""
    pytest.importorskip("ray", reason="no ray here: pip install 'thriftlab[cluster]'")
    Path("site").mkdir()
    Path("site/sitecustomize.py").write_text(NO_END)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([f"{desk}/site", *filter(None, [os.environ.get("PYTHONPATH")])]))
    common = ["inputs.a.path=synthetic:documents=400", "piece_bytes=10000", "near.bands=14x8", "tokenizer=bytes"]
    many = ["prepare", "--nodes", "2", "--cpus", "2", "--memory", "2G", "engine=ray", "out=many", *common]
    (number,) = submit(capsys, *many)
    unfinished = desk / ".many.partial"
    until(lambda: any(unfinished.rglob("*.json")))  # of a finished piece
    subprocess.run(["scancel", "--signal=USR1", "--batch", number], check=True)
    (one,) = submit(capsys, "prepare", "workers=1", "out=one", *common)
    finish(one, "COMPLETED")
    finish(number, "COMPLETED")
    said = logs()
    assert "attempt 0, on n1 n2" in said and "attempt 1, on n1 n2" in said and "Traceback" not in said
    assert "the run is preempted" in said and "the run is done" in said
    assert prepared(desk / "many") == prepared(desk / "one")
    assert sorted(path.name for path in (desk / "many.job").iterdir()) == ["config.json", "jobs", "status"]
    assert cli.main(["submit", *many]) == 2 and "many is prepared already" in capsys.readouterr().err
    assert not [*Path("/tmp").glob(f"*-{number}")]
