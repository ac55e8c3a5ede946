"""A study as arrays of SLURM jobs: the trials of learning rates, and the runs, which wait for the trials.

    thriftlab submit compare METHOD ... --gpus 8 --lr-grid 3e-4,1e-3 ...
    thriftlab submit study NAME --gpus 1

What is finished is left out, so the same command submits what is left. Every run that ends writes the report anew. The
surprise: a learning rate is known only when the trials are done, so the task of a run sets it when it starts, from the
request as it was submitted.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from thriftlab.data.errors import UserError
from thriftlab.data.files import make_folder, replace_atomically, seal, unseal, write_json
from thriftlab.launch.cluster.slurm import (
    JobBatch,
    SubmitConfig,
    processes,
    refuse_busy,
    submit_batches,
    trainer_command,
)
from thriftlab.launch.report.results import STUDY
from thriftlab.launch.studies import compare, written
from thriftlab.launch.studies.arms import StudyRequest
from thriftlab.launch.studies.jobs import Job, refuse_other_run
from thriftlab.launch.studies.run import (
    Draft,
    Setting,
    make_drafts,
    make_setting,
    take_turns,
    tune,
    without_rate,
    write_plan,
)
from thriftlab.train.config.choice import Plugins
from thriftlab.train.config.parse import Settings
from thriftlab.train.records.tracking import OF_ONE_RUN

REQUEST = Path("jobs", "request.json")
REQUESTS: dict[str, Callable[[Settings], StudyRequest]] = {
    "compare": compare.make_request,
    "study": written.make_request,
}


def submit(c: SubmitConfig, settings: Settings) -> None:
    """Submit what is left of the study that `settings` describe, "compare METHOD ..." or "study NAME"."""
    kind, *settings.words = settings.words
    asked = REQUESTS[kind](settings)
    out, at_once = Path(asked.out), asked.jobs
    setting, drafts = open_study(asked, c.gpus, all)
    for draft in drafts:
        draft.runs[0].config.train.rows_per_rank(c.nodes * processes(c))
    trials = [job for job in take_turns([draft.trials for draft in drafts]) if not job.record]
    waiting = {job.arm for job in trials}
    left_out = [draft.arm.name for draft in drafts if draft.tuning.how == "failed"]
    runs = [job for job in take_turns([draft.runs for draft in drafts if draft.arm.name not in left_out])
            if job.arm in waiting or not job.record]  # fmt: skip
    said = f"every trial of {', '.join(left_out)} failed; choose other learning rates (lr_grid)"
    if not runs:
        raise UserError(
            f"{out} is done{f', but {said}' if left_out else ''}; thriftlab report {out} writes its report again"
        )
    if left_out:
        print(f"left out: {said}", file=sys.stderr)

    thriftlab = f"{shlex.quote(sys.executable)} -m thriftlab.launch"
    apart = f"unset {' '.join(OF_ONE_RUN)}"
    settle = f'{apart}\n{thriftlab} settle {shlex.quote(str(out / REQUEST))} "$run" || exit 1' if waiting else apart
    report = f"{thriftlab} report {shlex.quote(str(out))}"
    known, trainer = [job for job in runs if job.arm not in waiting], trainer_command(c)
    batches = [JobBatch("trials", folders(trials), trials, trainer, at_once, apart)] if trials else []
    batches.append(JobBatch("runs", folders(runs), known, trainer, at_once, settle, report))
    if not c.dry_run:
        refuse_busy(out, [run for batch in batches for run in batch.runs])
        make_folder((out / REQUEST).parent)
        write_json(out / REQUEST, {"gpus": c.gpus, "request": asked.to_json()})
        write_plan(setting, asked, drafts, at_once, without_rate(drafts))
    submit_batches(c, out, batches)


def folders(jobs: Iterable[Job]) -> list[Path]:
    return [job.folder for job in jobs]


def open_study(
    request: StudyRequest, gpus: int, enough: Callable[[Iterable[object]], bool]
) -> tuple[Setting, list[Draft]]:
    """The study of a request. `enough`: whether an arm chooses its learning rate once `all` of its trials are done, or
    `any`."""
    setting = make_setting(request, gpus > 0, "bf16" if gpus else "fp32")
    drafts = make_drafts(setting, request.arms)
    return setting, [
        tune(setting, draft, {}) if enough(job.record for job in draft.trials) else draft for draft in drafts
    ]


def settle(request: Path, run: Path) -> None:
    """Write RUN/config.json with the learning rate that the trials have chosen, and the rates to the study's plan."""
    saved = json.loads(request.read_bytes())
    asked = StudyRequest.from_json(saved["request"])
    Plugins(plugins=asked.base.get("plugins", ()))
    setting, drafts = open_study(asked, saved["gpus"], any)
    draft, job = next((draft, job) for draft in drafts for job in draft.runs if job.folder == run)
    if draft.trials and draft.tuning.lr is None:
        none = "ended with a finite loss" if draft.tuning.how == "failed" else "has finished"
        raise UserError(f"no trial of {job.arm} {none}, so {run} has no learning rate; submit the study again")
    refuse_other_run(job, setting.dataset.fingerprint)
    write_json(run / "config.json", job.config.model_dump(mode="json"))
    plan = unseal((setting.out / STUDY).read_bytes())
    rates = {draft.arm.name: draft.tuning.to_json() for draft in drafts}
    replace_atomically(setting.out / STUDY, seal(plan | {"lr": rates}))
