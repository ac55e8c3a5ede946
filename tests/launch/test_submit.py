"""What `thriftlab submit` renders, and what its script does when a run ends; SLURM's programs are stand-ins here."""

import json
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.tools.tiny import tiny_config
from tests.tools.waiting import until
from thriftlab.data.shards import open_dataset
from thriftlab.launch import cli
from thriftlab.train.config.schema import RunConfig, fingerprint
from thriftlab.train.records.record import write_record

PROGRAMS = {
    "scontrol": '[ $1 = requeue ] && echo "$2" > requeued\n[ "$2" = hostnames ] && echo n1\necho NodeAddr=127.0.0.1',
    "srun": 'echo $$ > step; eval "$TRAINER"',
    "scancel": "kill $(cat step)",
    "squeue": "cat queue",
    "sbatch": 'echo "$@" > submitted; [ -z "$REFUSED" ] && echo 7 || { echo "sbatch: error: $REFUSED" >&2; exit 1; }',
}


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch, tiny_data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    (tmp_path / "queue").touch()
    config = tiny_config(tiny_data, Path("out")).model_dump(mode="json")
    (tmp_path / "run.json").write_text(json.dumps(config))
    return tmp_path


def submit(*argv):
    return cli.main(["submit", "--config", "run.json", *argv])


# --------------------------------------------------------------------------------------------------------- rendering


def test_dry_run_prints_the_script_and_writes_nothing(desk, capsys):
    before = sorted(desk.rglob("*"))
    assert submit("--dry-run", "--nodes", "2", "--gpus", "4", "--cpus", "8", "--time", "4:00:00", "--partition", "gpu",
                  "--sbatch", "qos=high", "--sbatch", "exclusive", "--sbatch", 'comment=a "b" $c') == 0  # fmt: skip
    script = capsys.readouterr().out
    assert sorted(desk.rglob("*")) == before
    for line in ("nodes=2", "gpus-per-node=4", "cpus-per-task=32", "time=4:00:00", "partition=gpu", "qos=high",
                 "signal=B:USR1@120", "requeue", "exclusive", r'comment="a \"b\" $c"'):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script, line
    assert "--nnodes=2" in script and "--nproc-per-node=4" in script and "--rdzv-backend=c10d" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_auto_is_settled_for_the_machine_that_will_run(desk, capsys):
    for argv, expected in (([], "fp32"), (["--gpus", "1"], "bf16"), (["--gpus", "1", "backend.device=cpu"], "fp32")):
        assert submit(*argv) == 0
        assert json.loads((desk / "out" / "config.json").read_text())["train"]["precision"] == expected
        shutil.rmtree(desk / "out")
    study = ["submit", "compare", "adamw", "--seeds", "1", "out=study", "--config", "study.json"]
    run = json.loads((desk / "run.json").read_text())
    (desk / "study.json").write_text(json.dumps({key: run[key] for key in ("data", "model", "train", "budget")}))
    for argv, expected in (([], "fp32"), (["--gpus", "1"], "bf16")):
        assert cli.main([*study, *argv]) == 0
        written = json.loads((desk / "study/adamw/seed-0/config.json").read_text())
        assert written["train"]["precision"] == expected
        shutil.rmtree(desk / "study")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--sbatch time=3", "--sbatch time is not possible"),
        ("--sbatch array=0-3", "--sbatch array is not possible"),
        ("--nodes 0", "command line: nodes = '0' is not possible; it takes integer >= 1"),
        ("--gpus 3", "train.batch_size = 8 is not a multiple of the 3 ranks"),
        ("--nodez 2", "unknown key 'nodez'; did you mean 'nodes'?"),
        ("data.path=nowhere", "nowhere"),
    ],
)
def test_a_mistake_is_seen_before_anything_is_submitted(argv, message, capsys, desk):
    assert submit(*shlex.split(argv)) == 2
    assert message in capsys.readouterr().err and not (desk / "submitted").exists()


def test_values_stay_on_their_line(capsys):
    assert submit("--partition", "gpu\n#SBATCH --uid=0") == 2
    assert "partition" in capsys.readouterr().err


def test_slurms_own_refusal_is_passed_on_and_leaves_nothing_in_the_way(desk, capsys, monkeypatch):
    monkeypatch.setenv("REFUSED", "invalid partition specified: gpu")
    assert submit() == 2
    assert "job.sbatch: invalid partition specified: gpu" in capsys.readouterr().err.replace("out.sbatch", "job.sbatch")
    monkeypatch.delenv("REFUSED")
    assert submit() == 0 and "submitted job 7" in capsys.readouterr().out


def test_what_slurm_says_over_several_lines_becomes_one(desk, capsys):
    (desk / "bin" / "squeue").write_text(
        "#!/bin/bash\nprintf 'squeue: error: no server\\nsqueue: fatal: gone\\n' >&2; exit 1\n"
    )
    assert submit() == 2
    assert capsys.readouterr().err == "error: SLURM does not answer: squeue: error: no server squeue: fatal: gone\n"


def test_a_folder_with_a_job_at_work_or_a_stop_file_is_refused(desk, capsys):
    assert submit() == 0
    (desk / "queue").write_text("5\n7\n")
    assert submit() == 2 and "job 7 is at work in out; wait for it, or: scancel 7" in capsys.readouterr().err
    (desk / "queue").write_text("")
    (desk / "out" / "STOP").touch()
    assert submit() == 2 and "out/STOP keeps this run from going on" in capsys.readouterr().err
    (desk / "out" / "STOP").write_text("job 7\n")  # of the job that is gone
    assert submit() == 0 and not (desk / "out" / "STOP").exists()
    assert (desk / "out" / "jobs" / "002" / "code" / "thriftlab" / "train" / "loop.py").exists()


# -------------------------------------------------------------------------------------------------------- the script


def script(capsys, *argv):
    assert submit("--dry-run", *argv) == 0
    Path("job.sh").write_text(capsys.readouterr().out)
    Path("out").mkdir()


def run(trainer, send=None, **environment):
    """Exit code of the script with a trainer that does this; whether it asked SLURM to requeue the job."""
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "TRAINER": trainer, **environment}
    process = subprocess.Popen(["bash", "job.sh"], env={**os.environ, **variables}, stdout=subprocess.DEVNULL)
    if send:
        until(Path("out/started").exists)
        process.send_signal(send)
        Path("out/told").touch()
    until(Path("requeued").exists, process)
    requeued = Path("requeued").exists() and Path("requeued").read_text() == "7\n"
    if requeued:
        process.kill()  # as SLURM does
    return process.wait(), requeued


ENDS = {
    "done": ("echo done > out/status", 0, False),
    "done before": ("echo done > out/status; touch out/record.json; TRAINER=true bash job.sh", 0, False),
    "failed": ("echo failed > out/status; exit 1", 1, False),
    "died without a word": ("exit 3", 1, False),
    "killed": ("echo running > out/status; exit 137", 1, False),
    "killed, with an old checkpoint": ("mkdir -p out/checkpoints; echo running > out/status; exit 137", 1, False),
    "killed after a new checkpoint": (
        "mkdir -p out/checkpoints/step-00000003; echo running > out/status; exit 134",
        -9,
        True,
    ),
    "failed after a new checkpoint": (
        "mkdir -p out/checkpoints/step-00000003; echo failed > out/status; exit 1",
        1,
        False,
    ),
    "preempted by SLURM": ("echo preempted > out/status; exit 1", -9, True),
    "stopped by hand": ("touch out/STOP; echo preempted > out/status", 0, False),
}


@pytest.mark.parametrize("name", ENDS)
def test_only_what_the_trainer_calls_preempted_goes_back_to_the_queue(name, capsys):
    trainer, code, requeued = ENDS[name]
    script(capsys)
    Path("out/status").write_text("preempted\n")  # of an earlier attempt
    if "checkpoint" in name:
        Path("out/checkpoints/step-00000002").mkdir(parents=True)
    assert run(trainer) == (code, requeued)


def test_a_step_of_the_job_gets_the_cores_that_the_job_has(capsys):
    script(capsys, "--gpus", "2", "train.batch_size=8")
    assert "#SBATCH --cpus-per-task=8\n" in Path("job.sh").read_text(), "four a process, and one task on a node"
    trainer = "echo $SRUN_CPUS_PER_TASK > cores; echo done > out/status"
    for cores, said in (("8", "8"), ("", "")):
        assert run(trainer, SLURM_CPUS_PER_TASK=cores) == (0, False)
        assert Path("cores").read_text().strip() == said


def waits(file):
    """A trainer that goes on until there is such a file, and then stops before its end."""
    return f"touch out/started; until [ -e out/{file} ]; do sleep 0.05; done; echo preempted > out/status"


def test_usr1_asks_through_a_stop_file_and_takes_it_back(capsys):
    script(capsys)
    assert run(waits("STOP"), send=signal.SIGUSR1) == (-9, True)
    assert not Path("out/STOP").exists()


def test_a_cancelled_job_stays_away(capsys):
    script(capsys)
    assert run(waits("told"), send=signal.SIGTERM) == (1, False)


def test_the_number_of_requeues_is_bounded(capsys):
    script(capsys, "--requeues", "2")
    assert run(ENDS["preempted by SLURM"][0], SLURM_RESTART_COUNT="2") == (1, False)


def test_a_stop_of_an_attempt_that_slurm_ended_does_not_stop_the_next(capsys):
    script(capsys)
    Path("out/STOP").write_text("job 7\n")
    assert run("[ ! -e out/STOP ] && echo done > out/status") == (0, False)


# ------------------------------------------------------------------------------------------------------------ studies

MINE = """
question: Does the layer pay?
base: {BASE}
seeds: 1
lr_grid: [1.0e-3, 1.0e-2]
trial_fraction: 1.0
arms:
  dense: {}
  layer+rule: {layer: {name: lost, rank: 4}, optim: {name: frugal}}
contrasts:
  - {name: the layer, arms: [layer+rule, dense]}
"""


def test_a_study_is_two_arrays_and_its_runs_take_the_rate_of_their_trials(desk, capsys):
    run = json.loads(Path("run.json").read_text())
    base = {key: run[key] for key in ("model", "data", "train", "budget", "eval")} | {"checkpoint": {"every": 0}}
    Path("mine.yaml").write_text(MINE.replace("{BASE}", json.dumps(base)))
    assert cli.main(["submit", "study", "mine.yaml", "--out", "study", "--jobs", "2"]) == 0
    assert capsys.readouterr().out.count("submitted job 7") == 2
    trials, runs = (Path(f"study/jobs/001/{name}.sbatch").read_text() for name in ("trials", "runs"))
    assert "study/trials/layer+rule/lr-0.01" in trials and "array=0-3%2" in trials
    assert "study/layer+rule/seed-0" in runs and "thriftlab.launch settle" in runs
    assert "\nunset WANDB_RUN_ID " in trials and "\nunset WANDB_RUN_ID " in runs
    request, target = "study/jobs/request.json", Path("study/layer+rule/seed-0")
    assert cli.main(["settle", request, str(target)]) == 2
    assert "no trial of layer+rule has finished" in capsys.readouterr().err
    losses = {}
    for trial in sorted(Path("study/trials/layer+rule").iterdir()):
        assert cli.main(["train", "--config", f"{trial}/config.json"]) == 0
        losses[float(trial.name[3:])] = json.loads((trial / "record.json").read_text())["results"]["loss"]
    target.mkdir(parents=True)
    assert cli.main(["settle", request, str(target)]) == 0
    config = json.loads((target / "config.json").read_text())
    assert (config["layer"]["rank"], config["optim"]["name"]) == (4, "frugal")
    assert config["optim"]["lr"] == min(losses, key=losses.get)


def test_methods_of_parts_are_submitted(capsys):
    argv = ["compare", "adamw", "lost+fira", "lost+fira.layer.rank=4", "--seeds", "1", "--dry-run", "out=study"]
    data = json.loads(Path("run.json").read_text())["data"]["path"]
    assert cli.main(["submit", *argv, f"data.path={data}", "model.preset=nano", "data.sequence_length=32"]) == 0
    assert "study/lost+fira/seed-0" in capsys.readouterr().out


@pytest.fixture
def tuned(desk, capsys):
    """Submits a study of two arms whose trials are done, with the losses {arm: [at each of two rates]}."""
    run = json.loads(Path("run.json").read_text())
    base = {key: run[key] for key in ("model", "data", "train", "budget", "eval")}
    Path("mine.yaml").write_text(MINE.replace("{BASE}", json.dumps(base)))

    def submit_study(losses):
        assert cli.main(["submit", "study", "mine.yaml", "--out", "study"]) == 0
        for arm, values in losses.items():
            for rate, loss in zip(("0.001", "0.01"), values, strict=True):
                folder = Path("study/trials", arm, f"lr-{rate}")
                config = json.loads((folder / "config.json").read_text())
                mark = fingerprint(RunConfig.model_validate(config), open_dataset(run["data"]["path"]).fingerprint)
                write_record(folder, {"config": config, "fingerprint": mark, "results": {"loss": loss}})
        capsys.readouterr()
        return cli.main(["submit", "study", "mine.yaml", "--out", "study"])

    return submit_study


def test_the_runs_of_an_arm_whose_trials_all_diverged_are_not_submitted(tuned, capsys):
    assert tuned({"dense": [4.0, 3.0], "layer+rule": [None, None]}) == 0
    out, err = capsys.readouterr()
    assert out.count("submitted job 7: runs, 1 run(s)") == 1 and "trials" not in out
    assert err == "left out: every trial of layer+rule failed; choose other learning rates (lr_grid)\n"
    assert "study/layer+rule/seed-0" not in Path("study/jobs/002/runs.sbatch").read_text()
    assert json.loads(Path("study/dense/seed-0/config.json").read_text())["optim"]["lr"] == 0.01
    failures = json.loads(Path("study/study.json").read_text())["failures"]
    assert failures == {"layer+rule/seed-0": "not run: every trial of its learning rate failed"}
    assert cli.main(["settle", "study/jobs/request.json", "study/layer+rule/seed-0"]) == 2
    assert "no trial of layer+rule ended with a finite loss" in capsys.readouterr().err


def test_a_study_whose_trials_all_diverged_submits_nothing(tuned, capsys):
    assert tuned({"dense": [None, None], "layer+rule": [None, None]}) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: study is done, but every trial of dense, layer+rule failed; choose other")
    assert err.count("\n") == 1 and not Path("study/jobs/002").exists()


# ------------------------------------------------------------------------------------------------------ preparations

ALLOCATED = {"SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "2"}


def prepare(*argv):
    return cli.main(["submit", "prepare", "out=made", "inputs.a.path=synthetic:documents=9", *argv])


def test_a_preparation_on_one_node_is_a_plain_job(capsys):
    assert prepare("--dry-run", "--cpus", "8", "--time", "30") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --cpus-per-task=8\n" in script and "runs=(made.job)" in script and "ray" not in script
    assert prepare("--cpus", "8", "near.bands=14x8") == 0
    config = json.loads(Path("made.job/config.json").read_text())
    assert (config["out"], config["near"]["bands"]) == ("made", "14x8")
    assert Path("made.job/jobs/001/code/thriftlab/data/prepare/engines/base.py").exists() and not Path("made").exists()


def test_a_preparation_on_four_nodes_has_a_ray_that_others_cannot_use(capsys):
    pytest.importorskip("ray")
    assert prepare("--dry-run", "--nodes", "4", "--cpus", "32", "--memory", "128G", "engine=ray") == 0
    script = capsys.readouterr().out
    for line in ("nodes=4", "cpus-per-task=32", "mem=128G"):
        assert f"#SBATCH --{line}\n" in script, line
    assert "RAY_AUTH_MODE=token" in script and "umask 077" in script and "ray stop" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--nodes 2", "engine=processes works on one node; for 2: engine=ray"),
        ("engine=ray", "engine=ray needs --memory"),
        ("--processes 2", "processes and restarts are for training"),
        ("--memori 2G", "unknown key 'memori'; did you mean 'memory'?"),
        ("near.bandz=14x8", "unknown key"),
        ("optim.lr=1", "unknown key 'optim.lr'"),
        ("more", "'more' has no value"),
    ],
)
def test_a_mistake_in_a_preparation_is_seen_before_anything_is_submitted(argv, message, capsys, desk):
    if "ray" in argv:
        pytest.importorskip("ray")
    assert prepare(*shlex.split(argv)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (desk / "submitted").exists()


def test_a_finished_preparation_is_not_submitted_again(capsys):
    Path("made").mkdir()
    Path("made/manifest.json").touch()
    assert prepare() == 2 and "made is prepared already" in capsys.readouterr().err
    assert prepare("force=true") == 0


@pytest.mark.parametrize("code, word, ended", [(0, "done", (0, False)), (2, "failed", (1, False))])
def test_how_a_preparation_ends_is_its_exit_code(code, word, ended, capsys, monkeypatch):
    monkeypatch.setenv("CODE", str(code))
    assert prepare("--dry-run") == 0
    Path("job.sh").write_text(capsys.readouterr().out)
    assert run("exit $CODE", **ALLOCATED) == ended and Path("made.job/status").read_text() == f"{word}\n"


def test_a_preparation_is_ended_when_the_time_is_up_and_goes_back_to_the_queue(capsys):
    assert prepare("--dry-run") == 0
    Path("job.sh").write_text(capsys.readouterr().out)
    Path("out").mkdir()
    assert run("touch out/started; exec sleep 600", send=signal.SIGUSR1, **ALLOCATED) == (-9, True)
    assert Path("made.job/status").read_text() == "preempted\n" and not Path("made.job/STOP").exists()
