"""The part of a report that studies of repetition have: effective sizes, damage, and the loss against exposures.

Everything is compared with controls of the baseline's recipe: the same update rule, signal, schedule and dropout. So a
cure is measured by what it leaves of the damage, and on a control by what it costs. A size is the number of weights of
attention and MLP. Each seed has a law of its own, through the controls of that seed, so an interval over seeds holds
the noise of both.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from thriftlab.data.effective_size import fit_size_law, harm_index, interpolated_size, off_scale, verdict
from thriftlab.data.errors import DataError
from thriftlab.data.mixture import REPEATED
from thriftlab.launch.report.figures import DASHES, INK, MARKERS, SERIES, Picture, render
from thriftlab.launch.report.results import Row, Study, evaluations, value_at
from thriftlab.launch.report.stats import paired, t_interval
from thriftlab.launch.report.tables import Cell, Table
from thriftlab.launch.report.words import plus_minus, signed
from thriftlab.train.model import ModelConfig

RECIPE = ("layer", "optim", "signal", "schedule", "train")
MEASURES = {"copying": ("copy_loss", "held_out"), "prefix matching": ("prefix_matching", "mean")}  # of the probes
HEAD = (
    "arm", "loss of the pool", "risen since its lowest", "size, by loss", *(f"size, by {name}" for name in MEASURES),
    "loss minus that without the repeats", "harm index", "repeats were",
)  # fmt: skip
NOTE = (
    "Risen since its lowest: final held-out loss above the lowest on the way, of the evaluations that there are. "
    "Size: of a model that does as well on text seen once, as a part of this one's. By loss: ln L = a - alpha ln N "
    "through the controls, for each seed its own, with a 95 % t interval of its logarithm. By a probe, whose value is "
    "given: between the means of the controls. Beyond the controls no size is told. Harm index: 0, the repeats were "
    "wasted; -1, as good as other text; above 0, worse than none. No index is told where less text has not cost "
    "anything. Wasted: all of the interval is within half of what less text costs; no claim: it contains 0, and is "
    "wider than that."
)


def section(study: Study) -> tuple[str, Table, str] | None:
    """Title, table and note; None for a study without repeated data."""
    rows = [row for row in study.rows if row.done]
    if not any(role(row) == "repeats" for row in rows):
        return None
    controls = size_controls(study.rows[0], rows)
    shown = [row for row in rows if size(row) == size(study.rows[0]) or row in controls.values()]
    return (
        "Repetition",
        (HEAD, [table_row(study, controls, rows, row) for row in shown]),
        f"{NOTE}{law_words(controls)}",
    )


# -------------------------------------------------------------------------------------------------- which run is what


def config(row: Row) -> dict[str, Any]:
    return row.done[0].record["config"]  # type: ignore[index]  # finished runs have one


def repetition(row: Row) -> dict[str, Any]:
    return value_at(config(row), "data", "repetition") or {}


def role(row: Row) -> str:
    """repeats, unique_only (their control without the repeats), or control (all text is seen once)."""
    asked = repetition(row)
    if asked.get("fraction") is None or asked.get("control") == "fresh":
        return "control"
    return asked.get("control") or "repeats"


def recipe(row: Row) -> list[Any]:
    return [config(row).get(key) for key in RECIPE]


def size(row: Row) -> int:
    """Weights of attention and MLP."""
    c = ModelConfig.model_validate(config(row)["model"])
    keys = c.dim // c.heads * (c.kv_heads or c.heads)
    return c.layers * c.dim * (2 * c.dim + 2 * keys + 3 * c.hidden)


def size_controls(baseline: Row, rows: Sequence[Row]) -> dict[int, Row]:
    """Size -> the first control of it that has the baseline's recipe."""
    found: dict[int, Row] = {}
    for row in rows:
        if role(row) == "control" and recipe(row) == recipe(baseline):
            found.setdefault(size(row), row)
    return found


def partner(rows: Sequence[Row], baseline: Row, row: Row, wanted: str) -> Row | None:
    """The control of the baseline's recipe and size that belongs to these repeats."""
    kind = [repetition(row).get(key) for key in ("fraction", "unit")]
    return next(
        (
            other for other in rows
            if role(other) == wanted and recipe(other) == recipe(baseline) and size(other) == size(row)
            and [repetition(other).get(key) for key in ("fraction", "unit")] == kind
        ),
        None,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- table


def table_row(study: Study, controls: Mapping[int, Row], rows: Sequence[Row], row: Row) -> list[Cell]:
    measured = [size_by_probe(controls, row, *path) for path in MEASURES.values()]
    pool = plus_minus(*row.mean_sd("results", "sources", REPEATED, "loss"))
    by_loss = ("–",) if row in controls.values() else size_by_loss(study, controls, row)
    return [(row.arm,), (pool,), (risen(row),), by_loss, *measured, *damage(study, rows, row)]


def risen(row: Row) -> str:
    """How far the final held-out loss is above the lowest of the run."""
    curves = [[line["eval"]["loss"] for line in lines] for lines in evaluations(row.done)]
    return f"{statistics.fmean(curve[-1] - min(curve) for curve in curves):.4f}" if all(curves) else "–"


def size_by_loss(study: Study, controls: Mapping[int, Row], row: Row) -> Cell:
    """The size as a part of the row's own, with an interval over seeds."""
    losses, own = {n: study.losses(control.arm) for n, control in controls.items()}, study.losses(row.arm)
    seeds = sorted(own.keys() & set.intersection(*(set(found) for found in losses.values())))
    try:
        laws = [fit_size_law({n: found[seed] for n, found in losses.items()}) for seed in seeds]
    except DataError:
        return ("–",)
    if not laws:
        return ("–",)
    logs = [math.log(law.size(own[seed]) / size(row)) for law, seed in zip(laws, seeds, strict=True)]
    middle = math.exp(math.fsum(logs) / len(logs))
    if beyond := off_scale(middle * size(row), laws[0].smallest, laws[0].largest):
        return (off_scale_words(beyond, controls, row),)
    if len(logs) < 2:
        return f"{middle:.2f}", "one seed, no interval"
    low, high = map(math.exp, t_interval(logs))
    return f"{middle:.2f}", f"95 %: {low:.2f} to {high:.2f}"


def size_by_probe(controls: Mapping[int, Row], row: Row, *path: str) -> Cell:
    """The same by a probe, between the means of the controls, and what it has found."""
    means = {
        n: statistics.fmean(values) for n, control in controls.items() if (values := control.values("probes", *path))
    }
    own = row.values("probes", *path)
    if not own:
        return ("–",)
    nearest, value = interpolated_size(means, statistics.fmean(own)), f"{statistics.fmean(own):.3f}"
    if math.isnan(nearest) or row in controls.values():
        return "–", value
    if beyond := off_scale(nearest, min(means), max(means)):
        return off_scale_words(beyond, controls, row), value
    return f"{nearest / size(row):.2f}", value


def off_scale_words(beyond: str, controls: Mapping[int, Row], row: Row) -> str:
    end = min(controls) if beyond == "below" else max(controls)
    return f"off-scale, {beyond} {end / size(row):.2f}"


def damage(study: Study, rows: Sequence[Row], row: Row) -> list[Cell]:
    """Loss minus that without the repeats, harm index, and what that means; dashes for what has no repeats."""
    baseline = study.rows[0]
    fewer = partner(rows, baseline, row, "unique_only")
    full = partner(rows, baseline, row, "control") or baseline
    if role(row) != "repeats" or fewer is None:
        return [("–",)] * 3
    difference = paired(*study.pair(row.arm, fewer.arm))
    if difference is None or difference.t is None:
        return [(signed(difference.mean) if difference else "–", "no interval"), ("–",), ("–",)]
    less = paired(*study.pair(fewer.arm, full.arm))
    losses = [each.loss[0] or 0.0 for each in (row, fewer, full)]
    told = less is not None and less.resolved
    return [
        (signed(difference.mean), f"95 % t: {signed(difference.t[0])} to {signed(difference.t[1])}"),
        (f"{harm_index(*losses):+.2f}" if told else "–",),
        (verdict(difference.t, losses[1] - losses[2]),),
    ]


def law_words(controls: Mapping[int, Row]) -> str:
    """The law through the means of the controls."""
    try:
        law = fit_size_law({n: row.loss[0] for n, row in controls.items() if row.loss[0] is not None})
    except DataError as error:
        return f" No size by loss: {error}."
    sizes = ", ".join(f"{n:,}" for n in sorted(controls))
    return (
        f" Law of the means: ln L = {law.a:.4f} - {law.alpha:.4f} ln N, N = {sizes}, residuals to {law.residual:.4f}."
    )


# ------------------------------------------------------------------------------------------------------------ picture


def picture(study: Study) -> Picture | None:
    """Held-out loss, and that of the pool, against exposures, a line for each fraction."""
    rows = [row for row in study.rows if row.done and row.loss[0] is not None]
    if study.rows[0] not in rows or not any(role(row) == "repeats" for row in rows):
        return None
    plain = [r for r in rows if recipe(r) == recipe(study.rows[0]) and size(r) == size(study.rows[0])]
    fractions = sorted({repetition(row)["fraction"] for row in plain if role(row) == "repeats"})

    def draw(axes: Axes) -> None:
        axes.axhline(study.rows[0].loss[0] or 0.0, color=INK, linewidth=0.8, label="all text seen once")
        for i, fraction in enumerate(fractions):
            of_it = [row for row in plain if repetition(row).get("fraction") == fraction]
            points = sorted(((exposures(r), r) for r in of_it if role(r) == "repeats"), key=lambda point: point[0])
            x, style = [point for point, _ in points], {"color": SERIES[i % 8], "marker": MARKERS[i % 8]}
            held_out, pool = (
                [row.mean_sd("results", *path, "loss")[0] for _, row in points] for path in ((), ("sources", REPEATED))
            )
            axes.plot(x, held_out, label=f"fraction {fraction}", **style)  # type: ignore[arg-type]
            axes.plot(x, pool, linestyle=":", **style)  # type: ignore[arg-type]
            for row in of_it:
                if role(row) == "unique_only":
                    axes.axhline(row.loss[0] or 0.0, color=SERIES[i % 8], linestyle=DASHES[1], linewidth=0.8)
        axes.set_xscale("log")
        axes.set(xlabel="exposures of each item of the pool", ylabel="nats per token")
        axes.legend(loc="best")

    caption = (
        "Mean final loss over seeds against exposures. Solid: held out; dotted: of the pool itself; dashed level: a "
        "run without the repeats, which is shorter. Above it repeats are harmful."
    )
    return Picture("Loss against exposures", render(draw, "exposures"), caption)


def exposures(row: Row) -> float:
    """How often an item of the pool is seen."""
    used = value_at(row.done[0].record, "data", "sources", REPEATED) or {"tokens": 1, "unique": 1}
    return used["tokens"] / used["unique"]
