"""The part of a study's folder that is kept in a repository: its report, its plan and a line for every run.

It is much smaller than the runs and can still be checked: the line of a run has its fingerprint and commit, and a run
is a function of those.
"""

import json
import re
from pathlib import Path
from typing import Any

from thriftlab.data.errors import UserError
from thriftlab.data.files import make_folder, replace_atomically
from thriftlab.launch.report.figures import Picture
from thriftlab.launch.report.page import markdown, pictures, template
from thriftlab.launch.report.results import STUDY, Result, Study, value_at

KEPT = {
    "lr": ("config", "optim", "lr"), "loss": ("results", "loss"), "bits_per_byte": ("results", "bits_per_byte"),
    "train_loss": ("results", "train_loss"), "tokens": ("budget", "tokens"), "seconds": ("budget", "seconds"),
    "parameters": ("model", "trained"), "flops_per_token": ("model", "flops_per_token"),
    "state_bytes": ("memory", "state_bytes"), "peak_bytes": ("memory", "peak_bytes"),
    "skipped_steps": ("skipped_steps",), "data": ("data", "fingerprint"), "plan": ("data", "plan"),
    "commit": ("commit",), "diff_sha256": ("diff_sha256",), "cpu": ("machine", "cpu"), "cores": ("machine", "cores"),
    "threads": ("machine", "threads"), "gpus": ("machine", "gpus"), "finished": ("finished",),
    "fingerprint": ("fingerprint",),
}  # fmt: skip


def publish(study: Study, target: Path) -> Path:
    """Write TARGET/report.md with its figures, study.json and runs.jsonl; returns TARGET.

    UserError where TARGET holds something else.
    """
    if target.exists() and not (target / STUDY).exists() and any(target.iterdir()):
        raise UserError(f"{target} holds something else than a study; choose another folder")
    make_folder(target)
    for old in target.glob("*.svg"):
        old.unlink()
    figures = {f"{slug(picture.title)}.svg": picture for picture in pictures(study)}
    words = markdown(study, figures).replace(f"{study.folder}/", "")  # where a problem lay on the machine of the runs
    lines = [json.dumps(line(result)) for result in study.results if result.record]
    texts = {name: standalone(picture) for name, picture in figures.items()}
    texts |= {"report.md": words, "runs.jsonl": "".join(f"{text}\n" for text in lines)}
    for name, text in texts.items():
        replace_atomically(target / name, text.encode())
    replace_atomically(target / STUDY, (study.folder / STUDY).read_bytes())
    return target


def line(result: Result) -> dict[str, Any]:
    """A run in one line."""
    kept = {key: value_at(result.record, *path) for key, path in KEPT.items()}
    probes, sources = value_at(result.record, "probes"), value_at(result.record, "results", "sources") or {}
    found: dict[str, Any] = {"probes": probes} if probes else {}
    if len(sources) > 1:
        found["losses"] = {name: measures["loss"] for name, measures in sources.items()}
        found["used"] = value_at(result.record, "data", "sources")
    return {"arm": result.arm, "seed": result.seed, **kept, **found}


def slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def standalone(picture: Picture) -> str:
    """The figure as a file of its own, in the light colours of the report's page."""
    light = dict(re.findall(r"--(\w+): (#\w+)", template().partition("@media")[0]))
    svg = re.sub(r"var\(--(\w+)\)", lambda found: light[found[1]], picture.svg)
    return svg.replace("<svg ", f'<svg style="background: {light["page"]}" ', 1).replace("inherit", "sans-serif")
