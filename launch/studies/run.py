"""Arms x seeds under one budget, and before that, if a grid is given, as many short trials for every arm.

Runs that share a seed share data order and initialisation. Arms take turns within a seed, so that a study that was
cut short still compares, and slow drift of the machine falls on all of them alike. Finished runs are skipped by
fingerprint. The trials use seeds that are none of the study's, so that no learning rate is chosen on the runs that
then count.
"""

import math
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from thriftlab.data.errors import BackendError
from thriftlab.data.files import replace_atomically, seal
from thriftlab.data.lock import claimed
from thriftlab.data.shards import Dataset, open_dataset
from thriftlab.launch.report.page import write_report
from thriftlab.launch.report.results import STUDY, Trial, Tuning, read_study
from thriftlab.launch.report.words import answers, table
from thriftlab.launch.studies.arms import Arm, StudyRequest
from thriftlab.launch.studies.jobs import Bar, Job, Unfinished, refuse_other_run, run_all, slots
from thriftlab.train.backends.device import best_precision, choose_device, warn_of_idle_gpu
from thriftlab.train.build import make_model, make_plan
from thriftlab.train.config.parse import Settings, validate
from thriftlab.train.config.schema import RunConfig, fingerprint, settled

TRIAL_SEED = 1_000_000  # and those after it
TRIAL_STEPS = 50  # at least, where the budget of a run has as many


def run_study(request: StudyRequest) -> Path:
    """Run a study, or what is left of it, print its table and write its report.

    Jobs of None are one a GPU, or as many as the usable cores allow.

    Returns:
        The page OUT/report.html.

    Errors: UserError for what the user can correct, before anything runs; Unfinished (`code` 130 after Ctrl-C, 1 if
    runs failed, then with the report of the others).
    """
    config = shared_config(request.base)
    device = device_of_studies(config)
    on_gpu = device == "cuda"
    setting = make_setting(request, on_gpu, best_precision(torch.device(device)))
    with claimed(setting.out) as lock:
        try:
            failures = run_arms(setting, request, slots(request.jobs, setting.threads, on_gpu), lock)
        except Unfinished as stopped:
            raise Unfinished(f"{stopped}\nresume with: {typed_command()}", stopped.code) from None
        study = read_study(setting.out)
        page = write_report(study)
    print("", table(study), "", *answers(study), "", f"report: {page}", sep="\n")
    if failures:
        lines = [f"{name} failed, {why}" for name, why in failures.items()]
        raise Unfinished("\n".join([*lines, f"try the failed runs again with: {typed_command()}"]), 1)
    return page


def run_arms(setting: "Setting", request: StudyRequest, places: list[dict[str, str]], lock: int) -> dict[str, str]:
    """Trials, then runs; keeps study.json up to date. Returns {name: why} of the runs that failed."""
    drafts = make_drafts(setting, request.arms)
    write_plan(setting, request, drafts, len(places), {})
    trials = take_turns([draft.trials for draft in drafts])
    bar = Bar([*trials, *take_turns([draft.runs for draft in drafts])], setting.out.name)
    try:
        failed = run_all(trials, places, lock, bar)
        drafts = [tune(setting, draft, failed) for draft in drafts]
        write_plan(setting, request, drafts, len(places), {})
        runs = [draft.runs for draft in drafts if draft.tuning.how != "failed"]
        for job in (job for jobs in runs for job in jobs):
            refuse_other_run(job, setting.dataset.fingerprint)
        failures = run_all(take_turns(runs), places, lock, bar)
    finally:
        bar.close()
    failures |= without_rate(drafts)
    write_plan(setting, request, drafts, len(places), failures)
    return failures


def without_rate(drafts: Iterable["Draft"]) -> dict[str, str]:
    """{name: why} of the runs of arms that have no learning rate."""
    why = "not run: every trial of its learning rate failed"
    return {job.name: why for draft in drafts if draft.tuning.how == "failed" for job in draft.runs}


# -------------------------------------------------------------------------------------------------------------- jobs


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
    precision: str  # what auto is where the runs will be

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
        config = settled(config, "fp32" if config.backend.device == "cpu" else self.precision)
        steps = self.steps(config)
        plan = make_plan(config, self.dataset, steps)
        tokens = steps and plan.fitting(steps) * tokens_per_step(config)
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


def shared_config(base: dict[str, Any]) -> RunConfig:
    """What the runs of a study share, as that of a run."""
    settings = Settings()
    for key, value in base.items():
        settings.put((key,), value, "study")
    return validate(RunConfig, settings)


def device_of_studies(config: RunConfig) -> str:
    """cuda, where each run gets a GPU of its own, or cpu. BackendError for one GPU by its number."""
    asked = config.backend.device
    if ":" in asked:
        raise BackendError(
            f"backend.device = {asked} is one GPU, and each run of a study gets its own; use backend.device=cuda, and "
            f"CUDA_VISIBLE_DEVICES={asked.partition(':')[2]} to have no other used"
        )
    warn_of_idle_gpu(asked)
    return choose_device(asked).type


def make_setting(request: StudyRequest, on_gpu: bool, precision: str) -> Setting:
    base = request.base
    dataset = open_dataset(shared_config(base).data.path, verify=False)
    threads = base.get("train", {}).get("threads") or (None if on_gpu else 1)
    return Setting(
        base, drop_nones(request.budget), Path(request.out), dataset, threads, request.trial_fraction,
        request.trial_seeds, precision,
    )  # fmt: skip


@dataclass(frozen=True)
class Draft:
    """The jobs of an arm and how it comes by its learning rate, which `runs` have as soon as it is known."""

    arm: Arm
    trials: list[Job]
    runs: list[Job]
    tuning: Tuning


def make_drafts(setting: Setting, arms: Sequence[Arm]) -> list[Draft]:
    """What is known of each arm before anything has run."""
    drafts = []
    for arm in arms:
        runs = make_runs(setting, arm)
        trials = make_trials(setting, arm, runs[0])
        for job in trials or runs:
            refuse_other_run(job, setting.dataset.fingerprint)
        drafts.append(Draft(arm, trials, runs, untuned(arm, runs[0], pending=bool(trials))))
    return drafts


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


def untuned(arm: Arm, run: Job, pending: bool) -> Tuning:
    if pending:
        return Tuning("pending", None)
    return Tuning("default" if arm.lr is None else "hand", run.config.optim.hyperparameters().get("lr"))


def tune(setting: Setting, draft: Draft, failed: dict[str, str]) -> Draft:
    """The same arm with the learning rate that its trials have chosen. `failed`: {name: why} of those that failed."""
    if not draft.trials:
        return draft
    tuning = choose(draft.trials, failed)
    runs = draft.runs if tuning.lr is None else make_runs(setting, draft.arm, tuning.lr)
    return replace(draft, runs=runs, tuning=tuning)


def choose(trials: list[Job], failed: dict[str, str]) -> Tuning:
    """The learning rate with the lowest final held-out loss, the mean over seeds, and what the trials cost. A rate that
    has failed under one seed is not chosen; lr is None if all have."""
    by_rate: dict[float, list[Job]] = {}
    for job in trials:
        by_rate.setdefault(job.config.optim.hyperparameters()["lr"], []).append(job)
    tried = tuple(make_trial(lr, jobs, failed) for lr, jobs in by_rate.items())
    losses = {trial.lr: trial.loss for trial in tried if trial.loss is not None}
    if not losses:
        return Tuning("failed", None, None, tried)
    best = min(losses, key=lambda lr: losses[lr])
    edge = {tried[0].lr: "lower", tried[-1].lr: "upper"}.get(best)
    return Tuning("tuned", best, edge, tried)


def make_trial(lr: float, jobs: list[Job], failed: dict[str, str]) -> Trial:
    """What the runs of one learning rate say together."""
    outcomes = [outcome(job, failed.get(job.name, "")) for job in jobs]
    losses = [loss for loss, _ in outcomes if loss is not None]
    return Trial(
        lr,
        loss=statistics.fmean(losses) if len(losses) == len(jobs) else None,
        tokens=sum(job.last("tokens") or 0 for job in jobs),
        seconds=sum(job.last("seconds") or 0 for job in jobs),
        problem=next((problem for _, problem in outcomes if problem), ""),
    )


def outcome(job: Job, problem: str) -> tuple[float | None, str]:
    """Final held-out loss of a trial, and why it has none. `problem`: why it failed, if it did."""
    record = job.record
    if record is None:
        return None, problem
    loss = record["results"]["loss"]
    return loss, "its final loss is not finite" if loss is None else problem


# ------------------------------------------------------------------------------------------------------------- plan


def write_plan(
    setting: Setting, request: StudyRequest, drafts: Sequence[Draft], jobs: int | None, failures: dict[str, str]
) -> None:
    """OUT/study.json: what was asked for, sealed."""
    asked = request.to_json()
    plan = {
        "format": 2,
        "command": typed_command(),
        "question": request.question,
        "arms": {arm.pop("name"): arm for arm in asked["arms"]},
        "contrasts": asked["contrasts"],
        "published": asked["published"],
        "base": request.base,
        "budget": setting.budget,
        "trial_seed": TRIAL_SEED,
        "trial_fraction": request.trial_fraction,
        "trial_seeds": request.trial_seeds,
        "lr": {draft.arm.name: draft.tuning.to_json() for draft in drafts},
        "jobs": jobs,
        "threads": setting.threads,
        "failures": failures,
    }
    replace_atomically(setting.out / STUDY, seal(plan))


def typed_command() -> str:
    """What was typed, or as good as that."""
    program = Path(sys.argv[0]).name
    return shlex.join(
        [*(["python", "-m", "thriftlab.launch"] if program == "__main__.py" else [program]), *sys.argv[1:]]
    )
