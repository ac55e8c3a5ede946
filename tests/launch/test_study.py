"""Studies over a stand-in trainer, and one small study with the real one."""

import builtins
import errno
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.tools.moments import before_each_write, put_back, state_of, states_of
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import UserError
from thriftlab.data.lock import claimed
from thriftlab.launch.cli import main
from thriftlab.launch.report import page
from thriftlab.launch.report.results import read_plan, read_study
from thriftlab.launch.studies import jobs
from thriftlab.launch.studies import run as study
from thriftlab.launch.studies.arms import Arm, StudyRequest
from thriftlab.launch.studies.jobs import Unfinished, slots, usable_cores
from thriftlab.launch.studies.run import TRIAL_SEED, take_turns, trial_budget
from thriftlab.train.config.schema import SEAMS, RunConfig

STAND_IN = Path(__file__).parents[1] / "tools" / "stand_in_trainer.py"

STEP = 256  # tokens


def stand_in_fingerprint(config, data_fingerprint):
    return json.dumps([config.optim.model_dump(mode="json"), config.seed, config.budget.model_dump(mode="json")])


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in in the place of the trainer."""
    monkeypatch.setattr(jobs, "TRAINER", (sys.executable, str(STAND_IN)))
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(jobs, "fingerprint", stand_in_fingerprint)
    monkeypatch.setattr(study, "fingerprint", stand_in_fingerprint)
    monkeypatch.setattr(page, "pictures", lambda study: [])  # test_report.py and the real trainer below have them


@pytest.fixture
def run(tmp_path, tiny_data, stand_in):
    """A study over the stand-in trainer; keyword arguments replace the defaults."""

    def run(methods=("adamw", "frugal"), budget=200 * STEP, seeds=2, lr_grid=(), jobs=2, trial_seeds=1, **overrides):
        base = tiny_config(tiny_data, tmp_path, train={"threads": None}).model_dump(mode="json")
        base = {key: value for key, value in base.items() if key not in SEAMS}
        grid = tuple(sorted(lr_grid))
        many = seeds if isinstance(seeds, dict) else dict.fromkeys(methods, seeds)
        arms = [Arm(m, {"optim": {"name": m, **overrides.get(m, {})}}, many[m], grid) for m in methods]
        return study.run_study(
            StudyRequest(arms, base, {"tokens": budget}, str(tmp_path), jobs, trial_seeds=trial_seeds)
        )

    return run


def events(folder, word):
    path = folder / "events.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split() for line in lines if line.startswith(word)]


def order(folder, *lines):
    (folder / "orders.txt").write_text("\n".join(lines))


def await_event(path, word):
    while not events(path, word):
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.slow
def test_methods_take_turns_and_share_their_seeds(run, tmp_path, capsys):
    page = run(jobs=1)
    assert page == tmp_path / "report.html" and page.exists() and (tmp_path / "report.md").exists()
    started = {folder: float(events(folder, "start")[0][4]) for folder in tmp_path.glob("*/seed-*")}
    order = [str(folder.relative_to(tmp_path)) for folder in sorted(started, key=started.get)]
    assert order == ["adamw/seed-0", "frugal/seed-0", "adamw/seed-1", "frugal/seed-1"]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in order]
    assert [c["seed"] for c in configs] == [0, 0, 1, 1]
    assert [c["optim"]["name"] for c in configs] == ["adamw", "frugal"] * 2
    assert all(c["train"]["threads"] == 1 and c["budget"]["tokens"] == 200 * STEP for c in configs)
    assert all(events(tmp_path / name, "start")[0][3] == "1" for name in order)  # OMP_NUM_THREADS
    assert all(str(tmp_path / ".lock") in events(tmp_path / name, "start")[0][5] for name in order)  # inherited
    out = capsys.readouterr().out
    assert "difference, 95 % CI" in out and "0.01" in out and str(page) in out


@pytest.mark.slow
def test_the_same_command_skips_what_a_written_study_has_done(tmp_path, tiny_data, stand_in, capsys):
    tiny = tiny_config(tiny_data, tmp_path).model_dump(mode="json")
    mine = {
        "question": "Which?", "base": {key: tiny[key] for key in ("data", "model")}, "seeds": 2,
        "arms": {"adamw": {}, "split": {"optim": {"name": "frugal"}, "seeds": 3}},
        "contrasts": [{"name": "splitting", "arms": ["split", "adamw"]}],
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    out = tmp_path / "out"
    argv = ["study", str(tmp_path / "mine.json"), "--out", str(out), "train.batch_size=8", f"budget.tokens={20 * STEP}"]
    assert main(argv) == 0
    assert "Splitting: split ends 0.0100 nats/token above adamw" in capsys.readouterr().out
    assert main(argv) == 0
    folders = [*out.glob("*/seed-*")]
    assert len(folders) == 5 and all(len(events(folder, "start")) == 1 for folder in folders)
    config = json.loads((out / "split/seed-2/config.json").read_text())
    assert (config["optim"]["name"], config["train"]["batch_size"], config["log"]["group"]) == ("frugal", 8, "out")
    assert main([*argv, "optim.weight_decay=0.5"]) == 2  # other runs: nothing is overwritten
    assert "holds another run (optim.weight_decay:" in capsys.readouterr().err


@pytest.mark.slow
def test_trials_come_first_and_arms_with_more_seeds_go_on(run, tmp_path):
    run(jobs=1, seeds={"adamw": 1, "frugal": 3}, lr_grid=[1e-3, 3e-3])
    started = {path.parent: float(events(path.parent, "start")[0][4]) for path in tmp_path.rglob("events.txt")}
    order = [str(folder.relative_to(tmp_path)) for folder in sorted(started, key=started.get)]
    trials = [f"trials/{arm}/lr-{lr}" for lr in (0.001, 0.003) for arm in ("adamw", "frugal")]
    assert order == [*trials, "adamw/seed-0", "frugal/seed-0", "frugal/seed-1", "frugal/seed-2"]
    adamw, frugal = read_study(tmp_path).rows
    assert (len(adamw.done), len(frugal.done), frugal.difference.n, frugal.difference.dropped) == (1, 3, 1, 0)


@pytest.mark.slow
def test_finished_runs_are_skipped_and_a_study_grows(run, tmp_path):
    run()
    run(seeds=3)
    assert all(len(events(folder, "start")) == 1 for folder in tmp_path.glob("*/seed-*"))
    assert len(list(tmp_path.glob("*/seed-*"))) == 6
    assert [arm["seeds"] for arm in read_plan(tmp_path)["arms"].values()] == [3, 3]


def test_overrides_belong_to_their_method(run, tmp_path):
    run(frugal={"density": 0.5, "lr": 0.01}, seeds=1)
    config = json.loads((tmp_path / "frugal/seed-0/config.json").read_text())
    assert config["optim"]["density"] == 0.5 and config["optim"]["lr"] == 0.01
    assert [read_plan(tmp_path)["lr"][method]["how"] for method in ("adamw", "frugal")] == ["default", "hand"]


def test_another_run_in_the_folder_is_refused(run, tmp_path):
    run(seeds=1)
    with pytest.raises(UserError, match=r"frugal/seed-0 holds another run \(optim.density: .* there, 0.5 now\)"):
        run(seeds=1, frugal={"density": 0.5})
    (tmp_path / "adamw/seed-0/record.json").unlink()  # not finished: config.json tells
    with pytest.raises(UserError, match=r"adamw/seed-0 holds another run \(budget.tokens: 51200 there, 76800 now\)"):
        run(seeds=1, budget=300 * STEP)


def test_damage_is_found_before_anything_runs(run, tmp_path):
    run(seeds=1)
    path = tmp_path / "adamw/seed-0/record.json"
    path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(UserError, match="record.json is damaged"):
        run(seeds=2)
    assert not (tmp_path / "adamw/seed-1").exists()


def test_mistakes_are_found_before_anything_runs(run, tmp_path):
    with pytest.raises(UserError, match="budget.tokens = 10 is less"):
        run(budget=10)
    with pytest.raises(UserError, match="one value"):
        run(lr_grid=[1e-3])
    with pytest.raises(UserError, match="optim.gap"):
        run(adamw={"gap": 3})
    assert not list(tmp_path.glob("*/seed-*"))


# ------------------------------------------------------------------------------------------------------------ tuning


def test_every_method_gets_the_same_trials_and_its_best_rate(run, tmp_path):
    run(lr_grid=[1e-2, 1e-3, 3e-3], seeds=1)
    plan = read_plan(tmp_path)
    for method in ("adamw", "frugal"):
        trials = sorted((tmp_path / "trials" / method).iterdir())
        assert [folder.name for folder in trials] == ["lr-0.001", "lr-0.003", "lr-0.01"]
        configs = [json.loads((folder / "config.json").read_text()) for folder in trials]
        assert {(c["seed"], c["budget"]["tokens"]) for c in configs} == {(TRIAL_SEED, 50 * STEP)}
        rate = plan["lr"][method]
        assert (rate["how"], rate["lr"], rate["edge"]) == ("tuned", 3e-3, None)
        assert [trial["tokens"] for trial in rate["trials"]] == [50 * STEP] * 3
        assert json.loads((tmp_path / method / "seed-0/config.json").read_text())["optim"]["lr"] == 3e-3
    assert all(TRIAL_SEED >= arm["seeds"] for arm in plan["arms"].values())
    assert "38,400 tokens" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_trials_under_several_seeds_decide_by_their_mean(run, tmp_path):
    run(("adamw",), lr_grid=[1e-3, 3e-3], seeds=1)
    run(("adamw",), lr_grid=[1e-3, 3e-3], seeds=1, trial_seeds=2)  # those of the first seed stay
    folders = sorted((tmp_path / "trials/adamw").iterdir())
    assert [folder.name for folder in folders] == ["lr-0.001", "lr-0.001-again-1", "lr-0.003", "lr-0.003-again-1"]
    records = [json.loads((folder / "record.json").read_text()) for folder in folders]
    assert [record["seed"] for record in records] == [TRIAL_SEED, TRIAL_SEED + 1] * 2
    first, *_ = read_plan(tmp_path)["lr"]["adamw"]["trials"]
    assert first["loss"] == pytest.approx(sum(record["results"]["loss"] for record in records[:2]) / 2)
    assert first["tokens"] == 2 * 50 * STEP and len(events(folders[0], "start")) == 1


@pytest.mark.slow
def test_a_rate_that_fails_under_one_seed_is_not_chosen(run, tmp_path):
    (tmp_path / "trials").mkdir()
    order(tmp_path / "trials", f"adamw {TRIAL_SEED + 1} diverge 0.003")
    run(("adamw",), lr_grid=[1e-3, 3e-3], seeds=1, trial_seeds=2)
    rate = read_plan(tmp_path)["lr"]["adamw"]
    assert rate["lr"] == 1e-3 and [trial["problem"] for trial in rate["trials"]] == ["", "its final loss is not finite"]


@pytest.mark.slow
def test_edges_hand_set_rates_and_lost_trials(run, tmp_path):
    (tmp_path / "trials").mkdir()
    order(tmp_path / "trials", f"signsgd {TRIAL_SEED} fail")
    with pytest.raises(Unfinished) as failed:
        run(("adamw", "frugal", "signsgd"), lr_grid=[1e-4, 1e-3], frugal={"lr": 1e-2}, seeds=1)
    assert failed.value.code == 1 and "every trial" in str(failed.value)
    rates = read_plan(tmp_path)["lr"]
    assert (rates["adamw"]["lr"], rates["adamw"]["edge"]) == (1e-3, "upper")
    assert rates["frugal"]["how"] == "hand" and not (tmp_path / "trials/frugal").exists()
    assert rates["signsgd"]["how"] == "failed" and "told to fail" in rates["signsgd"]["trials"][0]["problem"]
    assert not (tmp_path / "signsgd").exists()
    assert "every trial of its learning rate failed" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_trial_that_diverged_is_not_chosen(run, tmp_path):
    (tmp_path / "trials").mkdir()
    order(tmp_path / "trials", f"frugal {TRIAL_SEED} diverge")
    with pytest.raises(Unfinished):
        run(lr_grid=[1e-3, 3e-3], seeds=1)
    assert [t["problem"] for t in read_plan(tmp_path)["lr"]["frugal"]["trials"]] == ["its final loss is not finite"] * 2


@pytest.mark.parametrize(
    ("budget", "steps", "expected"),
    [
        ({"tokens": 40_000}, 1000, {"tokens": 10_000}),
        ({"tokens": 4_000}, 100, {"tokens": 2_000}),  # 50 steps are more than a quarter
        ({"tokens": 1_000}, 20, {"tokens": 1_000}),  # never more than the whole
        ({"seconds": 60.0}, None, {"seconds": 15.0}),
        ({"flops": 1e12}, 1000, {"flops": 2.5e11}),
    ],
)
def test_trial_budget(budget, steps, expected):
    assert trial_budget(budget, steps, 0.25) == expected


def test_take_turns():
    assert take_turns([[1, 2, 3], [4], [5, 6]]) == [1, 4, 5, 2, 6, 3]


# ----------------------------------------------------------------------------------------------- failing and stopping


@pytest.mark.slow
def test_a_failing_run_does_not_take_the_others_along(run, tmp_path):
    order(tmp_path, "frugal 0 fail")
    with pytest.raises(Unfinished, match="frugal/seed-0 failed, exit code 1: error: .* told to fail") as failed:
        run()
    assert failed.value.code == 1
    assert len(list(tmp_path.glob("*/seed-*/record.json"))) == 3
    (problem,) = [result.problem for result in read_study(tmp_path).results if not result.record]
    assert "told to fail" in problem
    order(tmp_path, "")
    run()  # the same again mends it
    assert all(result.record for result in read_study(tmp_path).results)


@pytest.mark.slow
def test_ctrl_c_stops_each_job_once_and_the_same_command_resumes(run, tmp_path):
    order(tmp_path, "adamw 0 slow", "frugal 0 slow")
    folders = [tmp_path / "adamw/seed-0", tmp_path / "frugal/seed-0"]

    def interrupt():
        for folder in folders:
            await_event(folder, "start")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Unfinished, match="resume with: ") as stopped:
        run()
    assert stopped.value.code == 130
    for folder in folders:
        ((_, pid, group, *_),) = events(folder, "start")
        assert pid == group  # its own process group: the terminal's Ctrl-C does not reach it
        assert len(events(folder, "signal")) == 1 and not events(folder, "done")
    assert not (tmp_path / "adamw/seed-1").exists()

    order(tmp_path, "")
    run()
    for folder in folders:
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == [*range(1, 201), 200]  # went on where it stopped


def test_a_second_ctrl_c_kills(run, tmp_path):
    order(tmp_path, "adamw 0 hang", "frugal 0 hang")
    folder = tmp_path / "adamw/seed-0"

    def interrupt():
        await_event(folder, "start")
        os.kill(os.getpid(), signal.SIGINT)
        await_event(folder, "signal")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run()
    ((_, pid, *_),) = events(folder, "start")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_run_left_behind_keeps_its_folder(tmp_path):
    with claimed(tmp_path) as lock:
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock])
        with pytest.raises(UserError, match="at work in"), claimed(tmp_path):
            pass
    with pytest.raises(UserError, match="at work in"), claimed(tmp_path):
        pass
    left.kill()
    left.wait()
    with claimed(tmp_path):
        pass


class InProcess:
    """Stands in for subprocess.Popen: the stand-in trainer, at once and in this process; what it writes is its own."""

    pid = 0

    def __init__(self, command, **_):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("open", "mkdir", "replace", "unlink", "rename"):
                patch.setattr(os, name, PLAIN[name])
            patch.setattr(builtins, "open", PLAIN["builtin"])
            patch.setattr(io, "open", PLAIN["builtin"])
            patch.setattr(signal, "signal", lambda *_: None)
            patch.setattr(sys, "argv", command[1:])
            runpy.run_path(command[1])

    def poll(self):
        return 0


PLAIN = {name: getattr(os, name) for name in ("open", "mkdir", "replace", "unlink", "rename")} | {"builtin": open}


@pytest.mark.slow
def test_a_study_that_is_killed_at_any_write_or_out_of_room_goes_on(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(jobs.subprocess, "Popen", InProcess)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    asked = {"methods": ("adamw", "frugal"), "budget": 3 * STEP, "seeds": 1, "lr_grid": (1e-3, 3e-3), "jobs": 1}
    asked["frugal"] = {"lr": 1e-3}  # one arm with trials, one without

    def end():
        state = state_of(tmp_path)
        return {name: state[name] for name in state if not name.endswith(("events.txt", "train.log", ".lock"))}

    states = states_of(tmp_path, lambda: run(**asked))
    whole, names = end(), {name for state in states for name in state}
    assert len(states) > 25 and {"study.json", "report.html", "trials/adamw/lr-0.001/config.json"} <= names
    for state in states:
        put_back(tmp_path, state)
        run(**asked)
        assert end() == whole

    for last in ("study.json", "adamw", "config.json", "train.log", "report.html"):
        put_back(tmp_path, {})

        def write(label, last=last):
            if last in label:
                raise OSError(errno.ENOSPC, "No space left on device")

        with before_each_write(write), pytest.raises(UserError, match="No space left on device.*make room") as refused:
            run(**asked)
        assert refused.value.code == 2 and "\n" not in str(refused.value)
        run(**asked)
        assert end() == whole


def test_last_value_survives_a_cut_off_tail_and_a_torn_line(tmp_path, tiny_data):
    job = jobs.Job("a", tiny_config(tiny_data, tmp_path), "", None)
    assert job.last("loss") is None
    lines = [json.dumps({"step": i, "tokens": 256 * i, "loss": 1 / (i + 1), "pad": "x" * 50}) for i in range(200)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 200, "eval": {}, "tokens": 51200}', '{"ste']))
    assert job.last("tokens") == 51200 and job.last("loss") == 1 / 200


def test_usable_cores_are_what_the_process_may_use():
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_slots_follow_threads_and_gpus(monkeypatch):
    monkeypatch.setattr(jobs, "visible_gpus", lambda: [])
    monkeypatch.setattr(jobs, "usable_cores", lambda: 8)
    assert slots(None, 1) == [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}] * 8
    assert len(slots(None, 3)) == 2 and len(slots(None, 16)) == 1 and len(slots(5, 1)) == 5
    monkeypatch.setattr(jobs, "visible_gpus", lambda: ["2", "5"])
    assert slots(None, None) == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in slots(3, None)] == ["2", "5", "2"]


# ----------------------------------------------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_a_small_study_with_the_real_trainer(tiny_data, tmp_path, capsys):
    settings = tmp_path / "base.json"
    base = tiny_config(tiny_data, tmp_path, checkpoint={"every": 0}).model_dump(mode="json")
    settings.write_text(json.dumps({key: base[key] for key in ("data", "model", "train", "budget", "log", "eval")}))
    out = tmp_path / "study"
    assert main(["compare", "adamw", "frugal", "--config", str(settings), "--seeds", "2", "--out", str(out)]) == 0
    adamw, frugal = read_study(out).rows
    assert len(adamw.done) == len(frugal.done) == 2 and frugal.difference.n == 2
    assert frugal.state_bytes < adamw.state_bytes
    plans = {(r.seed, r.record["data"]["plan"]) for r in [*adamw.done, *frugal.done]}
    assert len(plans) == 2  # one order of the data a seed, for both methods
    first = {r.seed: [line["loss"] for line in r.metrics if line["step"] == 1][0] for r in adamw.done}
    for result in frugal.done:  # same weights, same batch: the first loss is equal to the bit
        assert [line["loss"] for line in result.metrics if line["step"] == 1][0] == first[result.seed]
    assert "95 % CI" in capsys.readouterr().out


def test_a_study_gives_each_run_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert study.device_of_studies(RunConfig()) == "cuda"
    assert study.device_of_studies(RunConfig(backend={"device": "cpu"})) == "cpu"
    assert len(slots(None, None)) == 2 and "CUDA_VISIBLE_DEVICES" not in slots(2, 1, on_gpu=False)[0]
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1"):
        study.device_of_studies(RunConfig(backend={"device": "cuda:1"}))


def test_what_is_meant_for_one_run_is_not_handed_on(tmp_path, monkeypatch):
    """An id in wandb, or a rank: with it, all runs of a study would be one run, or wait for each other."""
    code = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + '.env', 'w'))"
    monkeypatch.setattr(jobs, "TRAINER", (sys.executable, "-c", code))
    kept = {"WANDB_PROJECT": "p", "WANDB_RUN_GROUP": "g", "WANDB_MODE": "offline", "WANDB_API_KEY": "k"}
    for name in ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM",
                 "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "RANK",
                 "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # fmt: skip
        monkeypatch.setenv(name, "1")
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    job = jobs.Job("a", RunConfig(out=str(tmp_path / "a")), "", None)
    with claimed(tmp_path) as lock:
        assert jobs.start(job, {"OMP_NUM_THREADS": "1"}, lock)[1].wait() == 0
    found = json.loads((tmp_path / "a" / "config.json.env").read_text())
    ours = {key: value for key, value in found.items() if key.startswith("WANDB_") or "RANK" in key or "MASTER" in key}
    assert ours == kept and "WORLD_SIZE" not in found and found["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("line", [b"7", b"null", b"[1]", b"[" * 100_000, b"\xff", b'"loss"'])
def test_progress_passes_over_lines_that_are_no_lines_of_metrics(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.5}\n' + line[-100:] + b"\n" + line + b"\n")
    job = jobs.Job("a", RunConfig(out=str(tmp_path)), "", None)
    assert job.last("loss") == (2.5 if len(line) < 99 else None)
