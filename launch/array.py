"""A study as arrays of SLURM jobs: the trials of learning rates, and the runs, which wait for the trials.

    thriftlab submit compare METHOD ... --gpus 8 --lr-grid 3e-4,1e-3 ...

What is finished is left out, so the same command submits what is left. Every run that ends writes the report anew. One
surprise: a learning rate is known only when the trials are done, so a run's own task settles it, when it starts, from
the request as it was submitted.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from thriftlab.launch import slurm
from thriftlab.launch.arguments import comparison
from thriftlab.launch.jobs import Job, refuse_other_run
from thriftlab.launch.results import STUDY
from thriftlab.launch.study import Setting, checked_grid, choose, draft, make_runs, make_setting, take_turns, write_plan
from thriftlab.train.choice import Plugins
from thriftlab.train.errors import UserError
from thriftlab.train.files import replace_atomically, seal, unseal, write_json
from thriftlab.train.settings import Settings

REQUEST = Path("jobs", "request.json")


def submit(c: slurm.SubmitConfig, settings: Settings) -> None:
    """Submit what is left of the study that `settings` describe, as for `thriftlab compare`."""
    asked = comparison(settings)
    asked.base.train.rows_per_rank(c.nodes * slurm.processes(c))
    out, at_once = Path(asked.options.out), asked.options.jobs
    request = {
        "methods": asked.methods,
        "seeds": asked.options.seeds,
        "lr_grid": asked.options.lr_grid,
        "base": asked.base.model_dump(mode="json"),
        "overrides": asked.overrides,
        "out": str(out),
        "gpus": c.gpus,
    }
    setting, trials, runs, lr = opened(request, all)
    tuned = [job for job in take_turns([*trials.values()]) if not job.record]
    waiting = {job.config.optim.name for job in tuned}
    jobs = [job for job in take_turns([*runs.values()]) if job.config.optim.name in waiting or not job.record]
    if not jobs:
        raise UserError(f"{out} is done; thriftlab report {out} writes its report again")

    thriftlab = f"{shlex.quote(sys.executable)} -m thriftlab.launch"
    settle = f'{thriftlab} settle {shlex.quote(str(out / REQUEST))} "$run" || exit 1' if waiting else ""
    report = f"{thriftlab} report {shlex.quote(str(out))}"
    known = [job for job in jobs if job.config.optim.name not in waiting]
    batches = [slurm.Batch("trials", folders(tuned), tuned, at_once)] if tuned else []
    batches.append(slurm.Batch("runs", folders(jobs), known, at_once, settle, report))
    if not c.dry_run:
        slurm.refuse_busy(out, [run for batch in batches for run in batch.runs])
        (out / REQUEST).parent.mkdir(parents=True, exist_ok=True)
        write_json(out / REQUEST, request)
        write_plan(setting, asked.methods, range(asked.options.seeds), lr, at_once, {})
    slurm.hand_in(c, out, batches)


def folders(jobs: Iterable[Job]) -> list[Path]:
    return [job.folder for job in jobs]


def opened(
    request: dict[str, Any], ripe: Callable[[Iterable[object]], bool]
) -> tuple[Setting, dict[str, list[Job]], dict[str, list[Job]], dict[str, dict[str, Any]]]:
    """The study of a request: its trials, runs and learning rates. `ripe`: whether all trials of a method have to be
    finished before they choose, or any."""
    base, methods, seeds = request["base"], request["methods"], range(request["seeds"])
    setting = make_setting(base, base["budget"], request["overrides"], Path(request["out"]), request["gpus"] > 0)
    trials, runs, lr = draft(setting, methods, seeds, checked_grid(request["lr_grid"]))
    for method in methods:
        if trials[method] and ripe(job.record for job in trials[method]):
            lr[method] = choose(trials[method], {})
            if rate := lr[method]["lr"]:
                runs[method] = make_runs(setting, method, seeds, rate)
    return setting, trials, runs, lr


def settle(request: Path, run: Path) -> None:
    """Write RUN/config.json with the learning rate that the trials have chosen, and the rates to the study's plan."""
    asked = json.loads(request.read_bytes())
    Plugins(plugins=asked["base"]["plugins"])
    setting, trials, runs, lr = opened(asked, any)
    job = next(job for jobs in runs.values() for job in jobs if job.folder == run)
    method = job.config.optim.name
    if trials[method] and lr[method]["lr"] is None:
        raise UserError(f"no trial of {method} has finished, so {run} has no learning rate; submit the study again")
    refuse_other_run(job, setting.dataset.fingerprint)
    write_json(run / "config.json", job.config.model_dump(mode="json"))
    replace_atomically(setting.out / STUDY, seal(unseal((setting.out / STUDY).read_bytes()) | {"lr": lr}))
