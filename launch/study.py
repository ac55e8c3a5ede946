"""Methods x seeds under one budget, and before that, if a grid is given, the same short trials for every method.

Runs that share a seed share data order and initialisation. Methods take turns within a seed, so that a study that was
cut short still compares, and slow drift of the machine falls on all of them alike. Finished runs are skipped by
fingerprint. One surprise: the trials use a seed that is none of the study's, so nobody's learning rate is chosen on the
runs that then count.
"""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thriftlab.data.shards import Dataset, open_dataset
from thriftlab.launch.jobs import Bar, Job, Unfinished, claimed, refuse_other_run, run_all, slots
from thriftlab.launch.report import report, table
from thriftlab.launch.results import STUDY, read_study
from thriftlab.launch.summary import answers
from thriftlab.train.build import make_model, make_plan
from thriftlab.train.config import RunConfig, fingerprint
from thriftlab.train.errors import UserError
from thriftlab.train.files import replace_atomically, seal
from thriftlab.train.settings import Settings, build

TRIAL_SEED = 1_000_000
TRIAL_FRACTION = 0.25  # of the budget of a run
TRIAL_STEPS = 50  # at least, where the budget of a run has as many


@dataclass(frozen=True)
class Setting:
    """What all runs of a study have in common."""

    base: dict[str, Any]
    budget: dict[str, float]
    overrides: Mapping[str, dict[str, Any]]
    out: Path
    dataset: Dataset
    threads: int | None

    def job(self, name: str, method: str, seed: int, budget: dict[str, float], lr: float | None = None) -> Job:
        """One run, checked as far as that goes without training."""
        optim = {"name": method, **self.overrides.get(method, {}), **({} if lr is None else {"lr": lr})}
        own = {"seed": seed, "out": str(self.out / name), "optim": optim, "budget": budget}
        train = {**self.base.get("train", {}), "threads": self.threads}
        log = {"group": self.out.name, **drop_nones(self.base.get("log", {})), "progress": False}
        settings = Settings()
        settings.put((), {**self.base, **own, "train": train, "log": log}, "study")
        config = build(RunConfig, settings)
        steps = self.steps(config)
        make_plan(config, self.dataset, steps)
        tokens = steps and steps * tokens_per_step(config)
        return Job(name, config, fingerprint(config, self.dataset.fingerprint), tokens)

    def steps(self, config: RunConfig) -> int | None:
        """Steps that the budget allows; None under a budget of seconds."""
        model, _ = make_model(config, self.dataset)
        flops_per_token = model.flops_per_token(config.data.sequence_length)
        return config.budget.horizon(tokens_per_step(config), flops_per_token).steps


def tokens_per_step(config: RunConfig) -> int:
    return config.train.batch_size * config.data.sequence_length


def drop_nones(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if value is not None}


def compare(
    methods: Sequence[str],
    base: dict[str, Any],
    budget: dict[str, float],
    seeds: int,
    lr_grid: Sequence[float] | None,
    jobs: int | None,
    out: Path,
    method_overrides: Mapping[str, dict[str, Any]],
) -> Path:
    """Run a study, or what is left of it, print its table and write its report.

    Args:
        methods: names of optim.METHODS, the baseline first.
        base: keys of RunConfig that all runs share; its seed, out, optim and budget are not looked at.
        budget: of one run, {"tokens": n} or {"flops": n} or {"seconds": n}.
        seeds: runs of each method, seeds 0 ... seeds - 1.
        lr_grid: learning rates that every method tries first, unless its lr is in `method_overrides`; None: no trials.
        jobs: runs side by side; None: one a GPU, or as many as the usable cores bear.
        out: folder of the study; resumed if it holds this very one.
        method_overrides: method -> hyper-parameters that were set for it.

    Returns:
        The page OUT/report.html.

    Errors: UserError for what the user can mend, before anything runs; Unfinished (`code` 130 after Ctrl-C, 1 if runs
    failed, then with the report of the others).
    """
    grid = checked_grid(lr_grid)
    setting = make_setting(base, budget, method_overrides, Path(out), torch.cuda.is_available())
    with claimed(Path(out)) as lock:
        try:
            failures = run_study(setting, methods, range(seeds), grid, slots(jobs, setting.threads), lock)
        except Unfinished as stopped:
            raise Unfinished(f"{stopped}\nresume with: {command()}", stopped.code) from None
        page = report(Path(out))
    study = read_study(Path(out))
    print("", table(study), "", *answers(study.rows), "", f"report: {page}", sep="\n")
    if failures:
        lines = [f"{name} failed, {words}" for name, words in failures.items()]
        raise Unfinished("\n".join([*lines, f"try the failed runs again with: {command()}"]), 1)
    return page


def make_setting(
    base: dict[str, Any], budget: dict[str, float], overrides: Mapping[str, dict[str, Any]], out: Path, on_gpu: bool
) -> Setting:
    dataset = open_dataset(base.get("data", {}).get("path") or RunConfig().data.path, verify=False)
    threads = base.get("train", {}).get("threads") or (None if on_gpu else 1)
    return Setting(base, drop_nones(budget), overrides, out, dataset, threads)


def run_study(
    setting: Setting, methods: Sequence[str], seeds: range, grid: list[float], places: list[dict[str, str]], lock: int
) -> dict[str, str]:
    """Trials, then runs; keeps study.json up to date. Returns {name: last words} of the runs that failed."""
    trials, runs, lr = draft(setting, methods, seeds, grid)
    tuned = take_turns([trials[method] for method in methods])
    write_plan(setting, methods, seeds, lr, len(places), {})
    bar = Bar([*tuned, *take_turns(list(runs.values()))], " ".join(methods))
    try:
        lost = run_all(tuned, places, lock, bar)
        for method in methods:
            if trials[method]:
                lr[method] = choose(trials[method], lost)
                runs[method] = make_runs(setting, method, seeds, lr[method]["lr"]) if lr[method]["lr"] else []
        write_plan(setting, methods, seeds, lr, len(places), {})
        for job in (job for method in methods for job in runs[method]):
            refuse_other_run(job, setting.dataset.fingerprint)
        failures = run_all(take_turns([runs[method] for method in methods]), places, lock, bar)
    finally:
        bar.close()
    for method in methods:
        if not runs[method]:
            failures |= {f"{method}/seed-{seed}": "not run: every trial of its learning rate failed" for seed in seeds}
    write_plan(setting, methods, seeds, lr, len(places), failures)
    return failures


def draft(
    setting: Setting, methods: Sequence[str], seeds: range, grid: list[float]
) -> tuple[dict[str, list[Job]], dict[str, list[Job]], dict[str, dict[str, Any]]]:
    """Trials, runs and learning rates of each method, as far as they are known before anything has run."""
    runs = {method: make_runs(setting, method, seeds) for method in methods}
    trials = {method: make_trials(setting, method, grid, runs[method][0]) for method in methods}
    for method in methods:
        for job in trials[method] or runs[method]:
            refuse_other_run(job, setting.dataset.fingerprint)
    lr = {method: untuned(setting, method, runs[method][0], pending=bool(trials[method])) for method in methods}
    return trials, runs, lr


def make_runs(setting: Setting, method: str, seeds: range, lr: float | None = None) -> list[Job]:
    return [setting.job(f"{method}/seed-{seed}", method, seed, setting.budget, lr) for seed in seeds]


def take_turns(columns: list[list[Job]]) -> list[Job]:
    """The first of every column, the second of every column ...; shorter columns end early."""
    longest = max(map(len, columns), default=0)
    return [column[i] for i in range(longest) for column in columns if i < len(column)]


# ------------------------------------------------------------------------------------------------------------ tuning


def checked_grid(lr_grid: Sequence[float] | None) -> list[float]:
    grid = sorted(set(lr_grid or []))
    if len(grid) == 1:
        raise UserError(f"lr_grid has one value, {grid[0]:g}; give two or more, or set optim.lr={grid[0]:g} by hand")
    return grid


def make_trials(setting: Setting, method: str, grid: list[float], run: Job) -> list[Job]:
    """One run for each learning rate, shorter than `run`; none for a method whose rate was set by hand."""
    if "lr" in setting.overrides.get(method, {}):
        return []
    budget = trial_budget(setting.budget, run.tokens and run.tokens // tokens_per_step(run.config))
    return [setting.job(f"trials/{method}/lr-{lr:g}", method, TRIAL_SEED, budget, lr) for lr in grid]


def trial_budget(budget: dict[str, float], steps: int | None) -> dict[str, float]:
    """TRIAL_FRACTION of the budget of a run of so many steps, at least TRIAL_STEPS steps, at most the whole."""
    ((kind, amount),) = budget.items()
    share = amount * min(1.0, max(TRIAL_FRACTION, TRIAL_STEPS / steps if steps else 0.0))
    return {kind: math.ceil(share) if kind == "tokens" else share}


def untuned(setting: Setting, method: str, run: Job, pending: bool) -> dict[str, Any]:
    how = "pending" if pending else "hand" if "lr" in setting.overrides.get(method, {}) else "default"
    lr = None if pending else run.config.optim.hyperparameters().get("lr")
    return {"how": how, "lr": lr, "edge": None, "trials": []}


def choose(trials: list[Job], lost: dict[str, str]) -> dict[str, Any]:
    """The learning rate with the lowest final held-out loss, and what the trials cost. lr is None if all failed."""
    outcomes = [outcome(job, lost.get(job.name, "")) for job in trials]
    finished = [trial for trial in outcomes if trial["loss"] is not None]
    best = min(finished, key=lambda trial: trial["loss"], default={"lr": None})["lr"]
    edge = {outcomes[0]["lr"]: "lower", outcomes[-1]["lr"]: "upper"}.get(best)
    return {"how": "tuned" if finished else "failed", "lr": best, "edge": edge, "trials": outcomes}


def outcome(job: Job, problem: str) -> dict[str, Any]:
    record = job.record
    loss = record["results"]["loss"] if record else None
    if record and loss is None:
        problem = "its final loss is not finite"
    spent = {"tokens": job.last("tokens"), "seconds": job.last("seconds")}
    return {"lr": job.config.optim.hyperparameters()["lr"], "loss": loss, **spent, "problem": problem}


# ------------------------------------------------------------------------------------------------------------- plan


def write_plan(
    setting: Setting,
    methods: Sequence[str],
    seeds: range,
    lr: dict[str, dict[str, Any]],
    jobs: int | None,
    failures: dict[str, str],
) -> None:
    """OUT/study.json: what was asked for, sealed."""
    plan = {
        "format": 1,
        "command": command(),
        "methods": list(methods),
        "seeds": list(seeds),
        "budget": setting.budget,
        "overrides": dict(setting.overrides),
        "trial_seed": TRIAL_SEED,
        "lr": lr,
        "jobs": jobs,
        "threads": setting.threads,
        "failures": failures,
    }
    replace_atomically(setting.out / STUDY, seal(plan))


def command() -> str:
    """What was typed, or as good as that."""
    program = {"__main__.py": ["python", "-m", "thriftlab.launch"]}.get(Path(sys.argv[0]).name, [sys.argv[0]])
    return shlex.join([*program, *sys.argv[1:]])
