"""A study's folder read back: which runs are there, and what they say about each arm.

    STUDY/study.json                    the plan, written by launch/studies/run.py
    STUDY/ARM/seed-0/record.json ...    the runs
    STUDY/trials/ARM/lr-0.001/...       the trials that chose a learning rate

A run that is missing, unfinished or damaged is a Result without a record and with one line that says so; what cannot be
compared at all (different data, different budgets) is an error.
"""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from thriftlab.data.errors import UserError
from thriftlab.data.files import unseal
from thriftlab.launch.report.stats import Paired, holm, paired
from thriftlab.train.records.record import RecordError, read_metrics, read_record

STUDY = "study.json"


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried: mean final loss over its seeds, None if one has none, and what they spent."""

    lr: float
    loss: float | None
    tokens: float
    seconds: float
    problem: str = ""


@dataclass(frozen=True)
class Tuning:
    """How an arm comes by its learning rate: the values of `lr` in study.json.

    `how` is pending, tuned or failed for an arm with trials, else default or hand; `edge` is the end of the grid, lower
    or upper, where the best rate is the last that was tried on that side.
    """

    how: str
    lr: float | None
    edge: str | None = None
    trials: tuple[Trial, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Tuning":
        return cls(**{**tree, "trials": tuple(Trial(**trial) for trial in tree["trials"])})


@dataclass(frozen=True)
class Result:
    """One planned run. `record` is None unless it is done and whole; then `problem` says why."""

    arm: str
    seed: int
    folder: Path
    record: dict[str, Any] | None
    problem: str

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")


@dataclass(frozen=True)
class Row:
    """One arm: its finished runs, and its paired differences to the baseline (None for the baseline itself)."""

    arm: str
    planned: int
    done: list[Result]
    tuning: Tuning
    difference: Paired | None

    def values(self, *path: str) -> list[Any]:
        """What the finished runs measured at `path` of their records, without nulls."""
        return [value for result in self.done if (value := value_at(result.record, *path)) is not None]

    def mean_sd(self, *path: str) -> tuple[float | None, float | None]:
        """Mean and standard deviation over seeds; None for what too few runs measured."""
        values = self.values(*path)
        return (
            statistics.fmean(values) if values else None,
            statistics.stdev(values) if len(values) > 1 else None,
        )

    @property
    def loss(self) -> tuple[float | None, float | None]:
        return self.mean_sd("results", "loss")

    @property
    def state_bytes(self) -> float | None:
        return max(self.values("memory", "state_bytes"), default=None)

    @property
    def learning_rate(self) -> float | None:
        return next(iter(self.values("config", "optim", "lr")), self.tuning.lr)


@dataclass(frozen=True)
class Answer:
    """What the runs say to a question that was asked beforehand: loss of the first arm minus that of the second."""

    name: str
    arms: tuple[str, str]
    by_seed: dict[int, float]
    difference: Paired | None
    adjusted: float | None  # Holm's p over the questions of the study that have one


@dataclass(frozen=True)
class Study:
    folder: Path
    plan: dict[str, Any]
    results: list[Result]

    @cached_property
    def rows(self) -> list[Row]:
        """One row an arm; the first is the baseline."""
        baseline = next(iter(self.plan["arms"]))
        return [self.row(arm, paired(*self.pair(arm, baseline))) for arm in self.plan["arms"]]

    def row(self, arm: str, difference: Paired | None) -> Row:
        planned = [result for result in self.results if result.arm == arm]
        done = [result for result in planned if result.record]
        baseline = arm == next(iter(self.plan["arms"]))
        tuning = Tuning.from_json(self.plan["lr"][arm])
        return Row(arm, len(planned), done, tuning, None if baseline else difference)

    def losses(self, arm: str) -> dict[int, float]:
        """Final held-out loss by seed; a loss that is not finite counts as none."""
        done = [result for result in self.results if result.arm == arm and result.record]
        found = {result.seed: value_at(result.record, "results", "loss") for result in done}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    def pair(self, first: str, second: str) -> tuple[dict[int, float], dict[int, float]]:
        """The losses of two arms by seed, of the seeds that both were to have."""
        common = range(min(self.plan["arms"][arm]["seeds"] for arm in (first, second)))
        one, other = ({s: loss for s, loss in self.losses(arm).items() if s in common} for arm in (first, second))
        return one, other

    @cached_property
    def contrasts(self) -> list[Answer]:
        pairs = [self.pair(*c["arms"]) for c in self.asked]
        found = [paired(*pair) for pair in pairs]
        adjusted = iter(holm([d.p for d in found if d and d.p is not None]))
        return [
            Answer(
                c["name"], tuple(c["arms"]), {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}, d,
                next(adjusted) if d and d.p is not None else None,
            )
            for c, (a, b), d in zip(self.asked, pairs, found, strict=True)
        ]  # fmt: skip

    @property
    def asked(self) -> list[dict[str, Any]]:
        return self.plan["contrasts"]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [result.record for result in self.results if result.record]


def read_study(folder: Path) -> Study:
    """The study in `folder`, finished or not. UserError if it is none, or if its runs cannot be compared."""
    folder = Path(folder)
    plan = read_plan(folder)
    results = [
        read_result(folder / arm / f"seed-{seed}", arm, seed, plan["failures"])
        for arm, entry in plan["arms"].items()
        for seed in range(entry["seeds"])
    ]
    study = Study(folder, plan, results)
    refuse_mixture(study, "data", "fingerprint")
    refuse_mixture(study, "config", "budget")
    return study


def read_plan(folder: Path) -> dict[str, Any]:
    path = folder / STUDY
    try:
        plan = unseal(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: not a folder of a study") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); run the same command again to rewrite it") from None
    if plan["format"] != 2:
        raise UserError(f"{path} is of an older version; run the same command again to rewrite it: no run is lost")
    return plan


def read_result(folder: Path, arm: str, seed: int, failures: dict[str, str]) -> Result:
    try:
        if not (folder / "record.json").exists():
            return Result(arm, seed, folder, None, failures.get(f"{arm}/seed-{seed}") or unfinished(folder))
        result = Result(arm, seed, folder, read_record(folder / "record.json"), "")
        result.metrics  # noqa: B018  a damaged line is found now and not in the middle of a figure
        return result
    except RecordError as error:
        return Result(arm, seed, folder, None, str(error))


def unfinished(folder: Path) -> str:
    if not folder.exists():
        return "not started"
    metrics = folder / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []
    return f"not finished, at step {lines[-1]['step']:,}" if lines else "not finished"


def refuse_mixture(study: Study, *path: str) -> None:
    """UserError unless all finished runs have the same value at `path`."""
    seen = {json.dumps(value_at(result.record, *path)): result.folder for result in study.results if result.record}
    if len(seen) > 1:
        (one, here), (other, there) = list(seen.items())[:2]
        raise UserError(
            f"the runs cannot be compared: {'.'.join(path)} is {one} in {here} and {other} in {there}; "
            f"move one of the folders away and run the study again"
        )


def value_at(tree: dict[str, Any] | None, *path: str) -> Any:
    """The value at `path`, or None where the way ends early."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def evaluations(results: Iterable[Result]) -> list[list[dict[str, Any]]]:
    """Per run its evaluation lines."""
    return [[line for line in result.metrics if "eval" in line] for result in results]
