"""Figures of a study as inline SVG that takes its colours from the page, in light and in dark.

matplotlib draws with placeholder colours, which are then replaced by CSS variables: `--ink` and `--rule` for text and
grid, `--s0` ... `--s7` for the arms. Arms differ in colour (Okabe and Ito's palette), dash and marker, so that no
one has to tell colours apart.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from thriftlab.launch.report.results import Result, Row, Study, evaluations
from thriftlab.launch.report.stats import pareto_front

INK, RULE = "#010101", "#020202"
SERIES = [f"#0a0a{i:02x}" for i in range(8)]
MARKERS = "osD^vPX*"
DASHES: list[Any] = ["-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (3, 1)), ":"]
POINTS = 100
MIB = 2**20
AXES = {"tokens": "training tokens", "seconds": "seconds of training"}
STYLE = {
    "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "thriftlab",
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": RULE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.5,
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "lines.linewidth": 1.5,
    "axes.formatter.useoffset": False, "axes.axisbelow": True,
}  # fmt: skip

Curve = tuple[np.ndarray, np.ndarray]  # x, y of one run


@dataclass(frozen=True)
class Picture:
    title: str
    svg: str
    caption: str


def pictures(study: Study) -> list[Picture]:
    """The figures that the finished runs of a study allow."""
    rows, colour = study.rows, colours(study)
    finished = [(colour[row.arm], row) for row in rows if row.done and row.arm in colour]
    if not finished:
        return []
    held_out = all(len(lines) > 2 for _, row in finished for lines in evaluations(row.done))
    shown, what = (evaluation_curve, "held-out") if held_out else (training_curve, "training")
    drawn = [curves(finished, shown, what, "tokens")] if held_out else []
    drawn += [curves(finished, training_curve, "training", "tokens"), curves(finished, shown, what, "seconds")]
    last = loss_against_state(finished, rows[0].arm) if len(colour) == len(rows) else all_differences(rows)
    return [*drawn, last] if last else drawn


def colours(study: Study) -> dict[str, int]:
    """Arm -> colour. Where there are more arms than colours, the baseline, the arms of the study's questions and those
    with the lowest losses have one, and the others are not drawn."""
    rows = study.rows
    names = [row.arm for row in rows]
    if len(rows) > len(SERIES):
        asked = [arm for question in study.contrasts for arm in question.arms]
        best = sorted((row for row in rows if row.loss[0] is not None), key=lambda row: row.loss[0] or 0.0)
        names = [*dict.fromkeys([names[0], *asked, *(row.arm for row in best)])][: len(SERIES)]
    return {name: i for i, name in enumerate(names)}


def evaluation_curve(result: Result, axis: str) -> Curve:
    return points((line[axis], line["eval"].get("loss")) for line in result.metrics if "eval" in line)


def training_curve(result: Result, axis: str) -> Curve:
    """At most POINTS means of neighbouring training losses."""
    x, y = points((line[axis], line["loss"]) for line in result.metrics if "loss" in line)
    pieces = np.array_split(np.arange(len(x)), min(POINTS, max(len(x), 1)))
    return np.array([x[piece].mean() for piece in pieces if len(piece)]), np.array(
        [y[piece].mean() for piece in pieces if len(piece)]
    )


def points(pairs: Any) -> Curve:
    found = [(x, y) for x, y in pairs if y is not None]
    return np.array([x for x, _ in found], float), np.array([y for _, y in found], float)


def band(runs: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray] | None:
    """Runs at common x, those of the first run that all reach: x [n] and y [runs, n]. None without a common x."""
    runs = [run for run in runs if len(run[0])]
    if not runs:
        return None
    low, high = max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs)
    grid = np.unique(np.clip(runs[0][0], low, high)) if low <= high else np.array([])
    return (grid, np.stack([np.interp(grid, x, y) for x, y in runs])) if len(grid) else None


def curves(rows: list[tuple[int, Row]], read: Callable[[Result, str], Curve], what: str, axis: str) -> Picture:
    """Mean over seeds as a line, smallest to largest seed as a band."""
    bands = [(i, row, found) for i, row in rows if (found := band([read(result, axis) for result in row.done]))]

    def draw(axes: Axes) -> None:
        for i, row, (x, y) in bands:
            axes.plot(x, y.mean(0), color=SERIES[i % 8], linestyle=DASHES[i % 8], label=row.arm)
            axes.fill_between(x, y.min(0), y.max(0), color=SERIES[i % 8], alpha=0.18, linewidth=0)
        zoom(axes, [found for *_, found in bands])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(xlabel=AXES[axis], ylabel="nats per token")
        if bands:
            axes.legend(loc="upper right")

    caption = (
        f"{what.capitalize()} loss, nats per token, against {AXES[axis]}. "
        f"Line: mean over seeds; band: smallest to largest seed. The first tenth may lie above the frame."
    )
    if axis == "seconds":
        caption += " Time without evaluation and saving, runs side by side; a line ends where its fastest run does."
    return Picture(f"{what.capitalize()} loss against {axis}", render(draw, f"{what}-{axis}".replace("-", "")), caption)


def zoom(axes: Axes, bands: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Let the frame begin where the first tenth of training ends, so that the end can be told apart."""
    if not bands:
        return
    top = max(y.max(0)[np.searchsorted(x, 0.1 * x[-1])] for x, y in bands)
    bottom = min(y.min() for _, y in bands)
    if top > bottom:
        axes.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))


def loss_against_state(rows: list[tuple[int, Row]], baseline: str) -> Picture | None:
    """Paired difference of the final loss against measured state: interval as bar, Pareto front as stair."""
    marks = []
    for i, row in rows:
        mean = row.difference.mean if row.difference else 0.0 if row.arm == baseline else None
        if mean is not None and row.state_bytes is not None:
            marks.append((i, row, row.state_bytes / MIB, mean))
    if not marks:
        return None

    def draw(axes: Axes) -> None:
        front = [marks[k][2:] for k in pareto_front([(mark[2], mark[3]) for mark in marks])]
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.step(*zip(*front, strict=True), where="post", color=INK, linewidth=1, alpha=0.5, label="Pareto front")
        for i, row, state, mean in marks:
            t = row.difference.t if row.difference else None
            error = np.abs(np.array(t)[:, None] - mean) if t else None
            axes.errorbar(
                [state], [mean], yerr=error, color=SERIES[i % 8], marker=MARKERS[i % 8], markersize=7, capsize=4,
                linestyle="none", label=row.arm,
            )  # fmt: skip
        axes.margins(x=0.12, y=0.15)
        axes.set(xlabel="optimizer state, MiB (measured)", ylabel=f"final loss minus {baseline}'s, nats per token")
        axes.legend(loc="best")

    caption = (
        f"Final held-out loss as paired difference to {baseline} (the line at 0), nats per token, against measured "
        f"optimizer state; lower left is better. Bars: 95 % t intervals over seeds; a bar that meets the line is no "
        f"claim. Stair: Pareto front of the means."
    )
    return Picture("Loss against state memory", render(draw, "memory"), caption)


def all_differences(rows: Sequence[Row]) -> Picture | None:
    """Paired difference of the final loss of every arm, one below the other."""
    marks = [(row.arm, row.difference) for row in rows if row.difference]
    if not marks:
        return None

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=INK, linewidth=0.8)
        for y, (_, d) in enumerate(marks):
            error = np.abs(np.array(d.t)[:, None] - d.mean) if d.t else None
            axes.errorbar([d.mean], [y], xerr=error, color=SERIES[0], marker="o", markersize=4, capsize=3)
        axes.set_yticks(range(len(marks)), [name for name, _ in marks])
        axes.invert_yaxis()
        axes.set(xlabel=f"final loss minus {rows[0].arm}'s, nats per token")

    caption = (
        f"Final held-out loss of every arm as paired difference to {rows[0].arm} (the line at 0), nats per token, "
        f"with 95 % t intervals over seeds. The other figures show the baseline, the arms of the questions and those "
        f"with the lowest losses."
    )
    return Picture("Differences", render(draw, "differences", 1 + 0.2 * len(marks)), caption)


def render(draw: Callable[[Axes], None], name: str, height: float = 3.2) -> str:
    """One drawing as an <svg> element that scales with the page; its ids begin with `name`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"])
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)  # it would style the whole page
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r'\1role="img"', svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for placeholder, variable in {INK: "ink", RULE: "rule", **{c: f"s{i}" for i, c in enumerate(SERIES)}}.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    return svg
