"""`thriftlab study papers/PAPER-SIZE`: what a paper ran, as a study, from the table papers.yaml.

As it is, a study needs C4 in prepared/c4 and a cluster. `mini` keeps the protocol and gives up the reproduction: a
small model, another corpus and 500 steps, with warm-up, gap and rank as the same fractions of the run and the width.
"""

import functools
from importlib import resources
from pathlib import Path
from typing import Any

from thriftlab.train.config.files import read_file
from thriftlab.train.model import PRESETS

PREFIX = "papers/"
WINDOWS, LENGTH = 512, 256  # of a step
MINI = {"windows": 8, "steps": 500, "preset": "nano"}


@functools.cache
def table() -> dict[str, Any]:
    return read_file(str(Path(str(resources.files("thriftlab.launch").joinpath("studies/papers.yaml")))))


def names() -> list[str]:
    return [f"{PREFIX}{paper}-{size}" for paper, entry in table().items() for size in entry["sizes"]]


def study(name: str, mini: bool = False) -> dict[str, Any]:
    """The study of one of the names, as a file of a study has it."""
    paper, _, size = name.removeprefix(PREFIX).rpartition("-")
    row = at_size(table()[paper], size)
    tree = {
        "question": f"Does {paper} with {size.upper()} parameters come out as published?",
        "base": {
            "model": {"preset": f"llama-{size}"},
            "data": {"path": "prepared/c4", "sequence_length": LENGTH},
            "train": {"batch_size": WINDOWS, "precision": "bf16", "clip": row.get("clip")},
            "schedule": schedule(row),
            "budget": {"tokens": row["steps"] * WINDOWS * LENGTH},
        },
        "seeds": 1,
        "arms": row["arms"],
        "published": {
            "source": row["source"],
            "perplexity": {arm: value for arm, value in row["published"].items() if value is not None},
            "batches": row.get("batches"),
            "uncertain": row["uncertain"],
        },
    }
    return smaller(tree, row["steps"], size) if mini else tree


def at_size(entry: dict[str, Any], size: str) -> dict[str, Any]:
    """A paper's row for one size: of every list that has a value for each size, its own."""
    sizes = entry["sizes"]

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: own(each) for key, each in value.items()}
        return value[sizes.index(size)] if isinstance(value, list) and len(value) == len(sizes) else value

    said = [each.get(size) if isinstance(each, dict) else each for each in entry["uncertain"]]
    others = {key: own(value) for key, value in entry.items() if key not in ("sizes", "uncertain")}
    return {**others, "uncertain": [line for line in said if line]}


def schedule(row: dict[str, Any]) -> dict[str, Any]:
    shape = {"name": "cosine", "warmup": row.get("warmup", 0.1), "final": 0.1}
    return {**shape, "name": "cycles", "cycles": row["cycles"]} if "cycles" in row else shape


def smaller(tree: dict[str, Any], steps: int, size: str) -> dict[str, Any]:
    """The same protocol for two cores."""
    width = PRESETS[MINI["preset"]]["dim"] / PRESETS[f"llama-{size}"]["dim"]  # type: ignore[index, operator]
    time = MINI["steps"] / steps  # type: ignore[operator]

    def scaled(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: scaled(inner, each) for inner, each in value.items()}
        factor = {"rank": width, "gap": time}.get(key)
        return max(1, round(value * factor)) if factor else value

    base = {
        **tree["base"],
        "model": {"preset": MINI["preset"]},
        "data": {**tree["base"]["data"], "path": "prepared/embedded"},
        "train": {**tree["base"]["train"], "batch_size": MINI["windows"], "precision": "fp32"},
        "budget": {"tokens": MINI["steps"] * MINI["windows"] * LENGTH},  # type: ignore[operator]
    }
    remark = "mini: the protocol of the paper in a small model on other text; the numbers are no reproduction"
    published = {**tree["published"], "uncertain": [remark, *tree["published"]["uncertain"]]}
    question = tree["question"].replace("come out as published", "run, as a protocol in miniature")
    return {**tree, "question": question, "base": base, "arms": scaled("", tree["arms"]), "published": published}
