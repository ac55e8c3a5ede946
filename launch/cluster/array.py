"""A study as arrays of SLURM jobs: the trials of learning rates, and the runs, which wait for the trials.

    thriftlab submit compare METHOD ... --gpus 8 --lr-grid 3e-4,1e-3 ...
    thriftlab submit study NAME --gpus 1

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

from thriftlab.data.errors import UserError
from thriftlab.data.files import replace_atomically, seal, unseal, write_json
from thriftlab.launch.cluster import slurm
from thriftlab.launch.report.results import STUDY
from thriftlab.launch.studies import written as experiment
from thriftlab.launch.studies.arms import Request
from thriftlab.launch.studies.compare import comparison
from thriftlab.launch.studies.jobs import Job, refuse_other_run
from thriftlab.launch.studies.run import Setting, choose, draft, make_runs, make_setting, take_turns, write_plan
from thriftlab.train.config.choice import Plugins
from thriftlab.train.config.parse import Settings

REQUEST = Path("jobs", "request.json")
REQUESTS: dict[str, Callable[[Settings], Request]] = {
    "compare": lambda settings: comparison(settings).request(), "study": experiment.requested
}  # fmt: skip


def submit(c: slurm.SubmitConfig, settings: Settings) -> None:
    """Submit what is left of the study that `settings` describe, "compare METHOD ..." or "study NAME"."""
    kind, *settings.words = settings.words
    asked = REQUESTS[kind](settings)
    out, at_once = Path(asked.out), asked.jobs
    setting, trials, runs, lr = opened(asked, c.gpus, all)
    for first, *_ in runs.values():
        first.config.train.rows_per_rank(c.nodes * slurm.processes(c))
    tuned = [job for job in take_turns([*trials.values()]) if not job.record]
    waiting = {job.arm for job in tuned}
    jobs = [job for job in take_turns([*runs.values()]) if job.arm in waiting or not job.record]
    if not jobs:
        raise UserError(f"{out} is done; thriftlab report {out} writes its report again")

    thriftlab = f"{shlex.quote(sys.executable)} -m thriftlab.launch"
    settle = f'{thriftlab} settle {shlex.quote(str(out / REQUEST))} "$run" || exit 1' if waiting else ""
    report = f"{thriftlab} report {shlex.quote(str(out))}"
    known = [job for job in jobs if job.arm not in waiting]
    batches = [slurm.Batch("trials", folders(tuned), tuned, at_once)] if tuned else []
    batches.append(slurm.Batch("runs", folders(jobs), known, at_once, settle, report))
    if not c.dry_run:
        slurm.refuse_busy(out, [run for batch in batches for run in batch.runs])
        (out / REQUEST).parent.mkdir(parents=True, exist_ok=True)
        write_json(out / REQUEST, {"gpus": c.gpus, "request": asked.to_json()})
        write_plan(setting, asked, lr, at_once, {})
    slurm.hand_in(c, out, batches)


def folders(jobs: Iterable[Job]) -> list[Path]:
    return [job.folder for job in jobs]


def opened(
    request: Request, gpus: int, ripe: Callable[[Iterable[object]], bool]
) -> tuple[Setting, dict[str, list[Job]], dict[str, list[Job]], dict[str, dict[str, Any]]]:
    """The study of a request: its trials, runs and learning rates. `ripe`: whether all trials of an arm have to be
    finished before they choose, or any."""
    setting = make_setting(request, gpus > 0)
    trials, runs, lr = draft(setting, request.arms)
    for arm in request.arms:
        name = arm.name
        if trials[name] and ripe(job.record for job in trials[name]):
            lr[name] = choose(trials[name], {})
            if rate := lr[name]["lr"]:
                runs[name] = make_runs(setting, arm, rate)
    return setting, trials, runs, lr


def settle(request: Path, run: Path) -> None:
    """Write RUN/config.json with the learning rate that the trials have chosen, and the rates to the study's plan."""
    saved = json.loads(request.read_bytes())
    asked = Request.from_json(saved["request"])
    Plugins(plugins=asked.base.get("plugins", ()))
    setting, trials, runs, lr = opened(asked, saved["gpus"], any)
    job = next(job for jobs in runs.values() for job in jobs if job.folder == run)
    if trials[job.arm] and lr[job.arm]["lr"] is None:
        raise UserError(f"no trial of {job.arm} has finished, so {run} has no learning rate; submit the study again")
    refuse_other_run(job, setting.dataset.fingerprint)
    write_json(run / "config.json", job.config.model_dump(mode="json"))
    replace_atomically(setting.out / STUDY, seal(unseal((setting.out / STUDY).read_bytes()) | {"lr": lr}))
