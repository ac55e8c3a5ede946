"""thriftlab curate: finished runs -> points of the utility law -> the best pool or mixture for each budget.

A run is a point: the tokens it drew, the unique tokens of its sources, its held-out loss. Runs of one source fit that
pool; runs of several check how the pools combine, or, where a pool has no runs of its own, are fitted with the others.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from thriftlab.data.curation_law import (
    Fit,
    Option,
    Point,
    best_weights,
    calibrated_gamma,
    crossovers,
    fit,
    mixture_error,
    option,
    prefixes,
    with_gamma,
)
from thriftlab.data.curation_law import answer as answer_for
from thriftlab.data.errors import ConfigError, DataError, UserError
from thriftlab.data.paths import FilePath, typed_path
from thriftlab.data.prepare.request import split_commas
from thriftlab.launch.report.curation import Curation, label, write_curation
from thriftlab.launch.report.results import value_at
from thriftlab.train.budget import Whole
from thriftlab.train.config.choice import Section
from thriftlab.train.config.parse import read, validate
from thriftlab.train.records.record import RecordError, read_record

SAME = (  # what the law takes for a difference of data, if it is not the same in all runs
    ("data", "fingerprint"), ("config", "model"), ("config", "layer"), ("config", "optim"), ("config", "signal"),
    ("config", "schedule"), ("config", "train"), ("config", "eval", "tokens"), ("config", "data", "sequence_length"),
)  # fmt: skip


def budget_in_tokens(value: Any) -> Any:
    """`tokens=1e8,1e9`, or the section that `budget.tokens=1e8` makes."""
    if isinstance(value, dict):
        (kind, amount), *others = value.items()
    else:
        (kind, _, amount), others = str(value).partition("="), []
    if kind != "tokens" or others:
        raise ValueError("takes tokens alone, as in budget=tokens=1e8,1e9")
    return split_commas(amount)


class CurateConfig(Section):
    """What is asked of the runs."""

    budget: Annotated[tuple[Annotated[Whole, Field(ge=1)], ...], BeforeValidator(budget_in_tokens)] = Field(
        description="budgets in tokens for which the best data are sought, as in tokens=1e8,1e9"
    )
    target: str | None = Field(None, description="held-out source whose loss counts; null: all that is held out")
    mixtures: Literal["law", "own"] = Field(
        "law", description="law: mixtures are predicted from their pools. own: each is a pool of its own"
    )
    draws: int = Field(200, ge=20, description="refits behind the intervals")
    seed: int = Field(0, ge=0, description="of the refits")
    out: FilePath | None = Field(None, description="folder for curate.html and curate.md; null: that of the first runs")


def curate(argv: Sequence[str]) -> str:
    """Fit, write the page, and return what is printed."""
    settings = read(argv)
    folders, settings.words = [*map(typed_path, settings.words)], []
    if not folders:
        raise ConfigError("thriftlab curate takes folders of finished runs: thriftlab curate RUNS --budget tokens=1e9")
    asked = validate(CurateConfig, settings)
    records, notes = read_runs(folders)
    refuse_different(records)
    points = [point for path, record in records.items() if (point := point_of(path, record, asked, notes))]
    if not points:
        raise UserError(f"{folders[0]}: not identified: none of the runs can be used; {'; '.join(notes) or 'no runs'}")
    found = examine(points, asked, notes, max(value_at(r, "model", "flops_per_token") or 0 for r in records.values()))
    page = write_curation(found, Path(asked.out or folders[0]))
    return "\n".join([*found.lines(), str(page)])


def read_runs(folders: Sequence[Path]) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """The records under these folders, without trials, and a note for each run without one."""
    records, notes = {}, []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder of runs")
        runs = {path.parent for name in ("record.json", "config.json") for path in folder.rglob(name)}
        for run in sorted(run for run in runs if "trials" not in run.relative_to(folder).parts):
            try:
                records[run] = read_record(run / "record.json")
            except RecordError as error:
                notes.append(str(error))
    return records, notes


def refuse_different(records: dict[Path, dict[str, Any]]) -> None:
    """UserError unless the runs differ in their data, budgets, seeds and learning rates alone."""
    for keys in SAME:
        seen: dict[str, Path] = {}
        for path, record in records.items():
            value = value_at(record, *keys)
            if isinstance(value, dict):
                value = {key: v for key, v in value.items() if key not in ("lr", "threads", "micro_batch_size")}
            seen.setdefault(json.dumps(value, sort_keys=True), path)
        if len(seen) > 1:
            here, there = list(seen.values())[:2]
            raise UserError(
                f"the runs cannot be compared: {'.'.join(keys)} is not the same in {here} and {there}; "
                f"name the folders of runs that differ in their data alone"
            )


def point_of(path: Path, record: dict[str, Any], asked: CurateConfig, notes: list[str]) -> Point | None:
    """A run as a point, or None and a note."""
    sources = value_at(record, "data", "sources")
    loss = value_at(record, "results", *(("sources", asked.target) if asked.target else ()), "loss")
    if asked.target and asked.target not in (held_out := value_at(record, "results", "sources") or {}):
        raise ConfigError(f"target: nothing of {asked.target!r} is held out; there is {', '.join(held_out)}")
    if not sources:
        notes.append(f"{path} was written before records named the tokens of their sources, and is not used")
        return None
    if (value_at(record, "config", "data", "repetition") or {}).get("fraction") is not None:
        notes.append(f"{path} repeats a pool by data.repetition, which is no pool that can be bought, and is not used")
        return None
    if loss is None:
        notes.append(f"{path} ended with a loss that is not finite, and is not used")
        return None
    drawn = {pool_name(record, name): use["tokens"] for name, use in sources.items() if use["tokens"]}
    unique = {pool_name(record, name): use["unique"] for name, use in sources.items() if use["tokens"]}
    tokens = sum(drawn.values())
    if asked.mixtures == "own":
        return Point(tokens, loss, {label(drawn, unique): sum(unique.values())})
    return Point(tokens, loss, unique, None if uniform(drawn, unique) else drawn)


def pool_name(record: dict[str, Any], source: str) -> str:
    """The source, and with `where` the choice among its documents: another choice is another pool."""
    where = value_at(record, "config", "data", "sources", source, "where")
    return f"{source}[{where}]" if where else source


def uniform(drawn: dict[str, int], unique: dict[str, int]) -> bool:
    """Whether every source is seen about as often as the others."""
    epochs = [drawn[name] / unique[name] for name in drawn]
    return max(epochs) <= 1.02 * min(epochs)


def examine(points: Sequence[Point], asked: CurateConfig, notes: list[str], flops_per_token: float) -> Curation:
    """Fit, choose gamma by the mixtures, and answer for each budget."""
    single = [point for point in points if len(point.unique) == 1]
    mixtures = [point for point in points if len(point.unique) > 1]
    budgets = {name: {p.tokens for p in single if name in p.unique} for p in points for name in p.unique}
    alone = sorted(name for name, seen in budgets.items() if len(seen) < 2)
    n_ref = "free" if len(budgets) > 1 else None
    if mixtures and alone:
        notes.append(f"{', '.join(alone)}: fewer than two budgets of its own, so mixtures are fitted with the pools")
        single, mixtures = [*points], []
    fitted = fit(single, n_ref=n_ref, draws=asked.draws, seed=asked.seed)
    if mixtures:
        gamma = calibrated_gamma(fitted, mixtures)
        fitted = with_gamma(fitted, gamma)
        error = mixture_error(fitted.law, mixtures)
        notes.append(
            f"{len(mixtures)} runs of mixtures were not fitted; gamma = {gamma:.2g} predicts them best, "
            f"to {error:.2%} of the loss (pools alone: {fitted.residual:.2%})"
        )
    elif asked.mixtures == "law" and len(budgets) > 1 and not alone:
        notes.append(
            "no run mixes pools: how they combine is not tested (gamma = 0); train one mixture before you rely on it"
        )
    candidates = {name: {name: 1.0} for name in fitted.known} if asked.mixtures == "own" else prefixes(fitted)
    observed = {label(dict(p.shares), dict(p.unique)): p.shares for p in mixtures if {*p.unique} <= {*fitted.known}}
    answers = [answer_for(fitted, tokens, {**observed, **candidates}) for tokens in asked.budget]
    weighted = [by_weights(fitted, tokens) if asked.mixtures == "law" else None for tokens in asked.budget]
    ends = [point.tokens for point in points] + list(asked.budget)
    changes = crossovers(fitted, min(ends), max(ends), candidates)
    return Curation(
        fitted,
        tuple(mixtures),
        tuple(answers),
        tuple(weighted),
        tuple(changes),
        candidates,
        tuple(notes),
        flops_per_token,
    )


def by_weights(fitted: Fit, tokens: float) -> Option | None:
    """The best weights within the fitted epochs; None where they are no mixture, or not every utility is known."""
    if set(fitted.known) != set(fitted.law.named):
        return None
    try:
        weights = best_weights(fitted.law, tokens, fitted.last_epochs)
    except DataError:  # every pool would be repeated too often; the answer says so of each candidate
        return None
    unique = {name: fitted.law.named[name].tokens for name in weights}
    return option(fitted, tokens, label(weights, unique), weights) if len(weights) > 1 else None
