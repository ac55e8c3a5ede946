"""Arms x seeds under one budget, and before that, if a grid is given, as many short trials for every arm.

Runs that share a seed share data order and initialisation. Arms take turns within a seed, so that a study that was
cut short still compares, and slow drift of the machine falls on all of them alike. Finished runs are skipped by
fingerprint. One surprise: the trials use a seed that is none of the study's, so nobody's learning rate is chosen on the
runs that then count.
"""

import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thriftlab.data.files import replace_atomically, seal
from thriftlab.data.shards import Dataset, open_dataset
from thriftlab.launch.report.page import report, table
from thriftlab.launch.report.results import STUDY, read_study
from thriftlab.launch.report.words import answers
from thriftlab.launch.studies.arms import Arm, Request
from thriftlab.launch.studies.jobs import Bar, Job, Unfinished, claimed, refuse_other_run, run_all, slots
from thriftlab.train.build import make_model, make_plan
from thriftlab.train.config.parse import Settings, validate
from thriftlab.train.config.schema import RunConfig, fingerprint

TRIAL_SEED = 1_000_000  # and those after it
TRIAL_STEPS = 50  # at least, where the budget of a run has as many


@dataclass(frozen=True)
class Setting:
    """What all runs of a study have in common."""

    base: dict[str, Any]
    budget: dict[str, float]
    out: Path
    dataset: Dataset
    threads: int | None
    trial_fraction: float
    trial_seeds: int

    def job(self, name: str, arm: Arm, seed: int, budget: dict[str, float], lr: float | None = None) -> Job:
        """One run, checked as far as that goes without training."""
        own = {"seed": seed, "out": str(self.out / name), "budget": budget}
        settings = Settings()
        settings.put((), {**self.base, **own}, "study")
        for key in arm.tree.keys() - own.keys():
            settings.put((key,), arm.tree[key], arm.name)
        if lr is not None:
            settings.put(("optim", "lr"), lr, "study")
        settings.put(("train", "threads"), self.threads, "study")
        log = {"group": self.out.name, **drop_nones(settings.tree.get("log", {})), "progress": False}
        settings.put(("log",), log, "study")
        config = validate(RunConfig, settings)
        steps = self.steps(config)
        make_plan(config, self.dataset, steps)
        tokens = steps and steps * tokens_per_step(config)
        return Job(name, config, fingerprint(config, self.dataset.fingerprint), tokens, arm.name)

    def steps(self, config: RunConfig) -> int | None:
        """Steps that the budget allows; None under a budget of seconds."""
        model, _ = make_model(config, self.dataset)
        flops_per_token = model.flops_per_token(config.data.sequence_length)
        return config.budget.horizon(tokens_per_step(config), flops_per_token).steps


def tokens_per_step(config: RunConfig) -> int:
    return config.train.batch_size * config.data.sequence_length


def drop_nones(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if value is not None}


def run(request: Request) -> Path:
    """Run a study, or what is left of it, print its table and write its report.

    Jobs of None are one a GPU, or as many as the usable cores bear.

    Returns:
        The page OUT/report.html.

    Errors: UserError for what the user can mend, before anything runs; Unfinished (`code` 130 after Ctrl-C, 1 if runs
    failed, then with the report of the others).
    """
    setting, out = make_setting(request, torch.cuda.is_available()), Path(request.out)
    with claimed(out) as lock:
        try:
            failures = run_study(setting, request, slots(request.jobs, setting.threads), lock)
        except Unfinished as stopped:
            raise Unfinished(f"{stopped}\nresume with: {command()}", stopped.code) from None
        page = report(out)
    study = read_study(out)
    print("", table(study), "", *answers(study), "", f"report: {page}", sep="\n")
    if failures:
        lines = [f"{name} failed, {words}" for name, words in failures.items()]
        raise Unfinished("\n".join([*lines, f"try the failed runs again with: {command()}"]), 1)
    return page


def make_setting(request: Request, on_gpu: bool) -> Setting:
    base = request.base
    dataset = open_dataset(base.get("data", {}).get("path") or RunConfig().data.path, verify=False)
    threads = base.get("train", {}).get("threads") or (None if on_gpu else 1)
    return Setting(
        base, drop_nones(request.budget), Path(request.out), dataset, threads, request.trial_fraction,
        request.trial_seeds,
    )  # fmt: skip


def run_study(setting: Setting, request: Request, places: list[dict[str, str]], lock: int) -> dict[str, str]:
    """Trials, then runs; keeps study.json up to date. Returns {name: last words} of the runs that failed."""
    arms = request.arms
    trials, runs, lr = draft(setting, arms)
    tuned = take_turns([trials[arm.name] for arm in arms])
    write_plan(setting, request, lr, len(places), {})
    bar = Bar([*tuned, *take_turns(list(runs.values()))], setting.out.name)
    try:
        failed = run_all(tuned, places, lock, bar)
        for arm in arms:
            if trials[arm.name]:
                lr[arm.name] = choose(trials[arm.name], failed)
                rate = lr[arm.name]["lr"]
                runs[arm.name] = make_runs(setting, arm, rate) if rate else []
        write_plan(setting, request, lr, len(places), {})
        for job in (job for jobs in runs.values() for job in jobs):
            refuse_other_run(job, setting.dataset.fingerprint)
        failures = run_all(take_turns([*runs.values()]), places, lock, bar)
    finally:
        bar.close()
    for arm in arms:
        if not runs[arm.name]:
            why = "not run: every trial of its learning rate failed"
            failures |= {f"{arm.name}/seed-{seed}": why for seed in range(arm.seeds)}
    write_plan(setting, request, lr, len(places), failures)
    return failures


def draft(
    setting: Setting, arms: Sequence[Arm]
) -> tuple[dict[str, list[Job]], dict[str, list[Job]], dict[str, dict[str, Any]]]:
    """Trials, runs and learning rates of each arm, as far as they are known before anything has run."""
    runs = {arm.name: make_runs(setting, arm) for arm in arms}
    trials = {arm.name: make_trials(setting, arm, runs[arm.name][0]) for arm in arms}
    for arm in arms:
        for job in trials[arm.name] or runs[arm.name]:
            refuse_other_run(job, setting.dataset.fingerprint)
    lr = {arm.name: untuned(arm, runs[arm.name][0], pending=bool(trials[arm.name])) for arm in arms}
    return trials, runs, lr


def make_runs(setting: Setting, arm: Arm, lr: float | None = None) -> list[Job]:
    return [setting.job(f"{arm.name}/seed-{seed}", arm, seed, setting.budget, lr) for seed in range(arm.seeds)]


def take_turns(columns: list[list[Job]]) -> list[Job]:
    """The first of every column, the second of every column ...; shorter columns end early."""
    longest = max(map(len, columns), default=0)
    return [column[i] for i in range(longest) for column in columns if i < len(column)]


# ------------------------------------------------------------------------------------------------------------ tuning


def make_trials(setting: Setting, arm: Arm, run: Job) -> list[Job]:
    """Runs for each learning rate, shorter than `run`; none for an arm whose rate was set by hand."""
    if not arm.tuned:
        return []
    steps = run.tokens and run.tokens // tokens_per_step(run.config)
    budget = trial_budget(setting.budget, steps, setting.trial_fraction)
    return [
        setting.job(f"trials/{arm.name}/lr-{lr:g}" + (f"-again-{i}" if i else ""), arm, TRIAL_SEED + i, budget, lr)
        for i in range(setting.trial_seeds)
        for lr in arm.lr_grid
    ]


def trial_budget(budget: dict[str, float], steps: int | None, fraction: float) -> dict[str, float]:
    """A fraction of the budget of a run of so many steps, at least TRIAL_STEPS steps, at most the whole."""
    ((kind, amount),) = budget.items()
    share = amount * min(1.0, max(fraction, TRIAL_STEPS / steps if steps else 0.0))
    return {kind: math.ceil(share) if kind == "tokens" else share}


def untuned(arm: Arm, run: Job, pending: bool) -> dict[str, Any]:
    how = "pending" if pending else "default" if arm.lr is None else "hand"
    lr = None if pending else rate_of(run.config)
    return {"how": how, "lr": lr, "edge": None, "trials": []}


def choose(trials: list[Job], failed: dict[str, str]) -> dict[str, Any]:
    """The learning rate with the lowest final held-out loss, the mean over seeds, and what the trials cost. A rate that
    has failed under one seed is not chosen; lr is None if all have."""
    outcomes: dict[float | None, list[dict[str, Any]]] = {}
    for job in trials:
        outcomes.setdefault(rate_of(job.config), []).append(outcome(job, failed.get(job.name, "")))
    rates = [{"lr": lr, **together(found)} for lr, found in outcomes.items()]
    finished = [rate for rate in rates if rate["loss"] is not None]
    best = min(finished, key=lambda rate: rate["loss"], default={"lr": None})["lr"]
    edge = {rates[0]["lr"]: "lower", rates[-1]["lr"]: "upper"}.get(best)
    return {"how": "tuned" if finished else "failed", "lr": best, "edge": edge, "trials": rates}


def outcome(job: Job, problem: str) -> dict[str, Any]:
    record = job.record
    loss = record["results"]["loss"] if record else None
    if record and loss is None:
        problem = "its final loss is not finite"
    return {"loss": loss, "tokens": job.last("tokens"), "seconds": job.last("seconds"), "problem": problem}


def together(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """The outcomes of one learning rate under several seeds: mean loss, None if one has none, and what all spent."""
    losses = [found["loss"] for found in outcomes]
    return {
        "loss": None if None in losses else statistics.fmean(losses),
        "tokens": sum(found["tokens"] or 0 for found in outcomes),
        "seconds": sum(found["seconds"] or 0 for found in outcomes),
        "problem": next((found["problem"] for found in outcomes if found["problem"]), ""),
    }


def rate_of(config: RunConfig) -> float | None:
    """The learning rate, of a method that has one."""
    return config.optim.hyperparameters().get("lr")


# ------------------------------------------------------------------------------------------------------------- plan


def write_plan(
    setting: Setting, request: Request, lr: dict[str, dict[str, Any]], jobs: int | None, failures: dict[str, str]
) -> None:
    """OUT/study.json: what was asked for, sealed."""
    asked = request.to_json()
    plan = {
        "format": 2,
        "command": command(),
        "question": request.question,
        "arms": {arm.pop("name"): arm for arm in asked["arms"]},
        "contrasts": asked["contrasts"],
        "base": request.base,
        "budget": setting.budget,
        "trial_seed": TRIAL_SEED,
        "trial_fraction": request.trial_fraction,
        "trial_seeds": request.trial_seeds,
        "lr": lr,
        "jobs": jobs,
        "threads": setting.threads,
        "failures": failures,
    }
    replace_atomically(setting.out / STUDY, seal(plan))


def command() -> str:
    """What was typed, or as good as that."""
    program = Path(sys.argv[0]).name
    return shlex.join(
        [*(["python", "-m", "thriftlab.launch"] if program == "__main__.py" else [program]), *sys.argv[1:]]
    )
