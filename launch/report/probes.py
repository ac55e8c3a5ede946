"""Figures of what probes found: over the training, over the copies of a passage, and head by head."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from thriftlab.launch.report.figures import (
    AXES,
    DASHES,
    RULE,
    SERIES,
    Curve,
    Picture,
    band,
    colours,
    points,
    render,
)
from thriftlab.launch.report.results import Result, Row, Study, value_at
from thriftlab.launch.report.tables import PROBED

HEADS = {"prefix_matching": "Prefix matching", "previous_token": "Previous token"}
WRITTEN = 64  # cells of a picture of heads that have their number in them, at most
LINE = "Line: mean over seeds; band: smallest to largest seed."


def probe_pictures(study: Study) -> list[Picture]:
    """The figures of what the finished runs of a study were asked; none where they were asked nothing."""
    colour = colours(study)
    rows = [(colour[row.arm], row) for row in study.rows if row.arm in colour and row.values("probes")]
    drawn = [over_training(rows, title, path) for title, path in PROBED.items()]
    drawn += [over_copies(rows), *(by_head(rows, name) for name in HEADS)]
    return [picture for picture in drawn if picture]


def over_training(rows: Sequence[tuple[int, Row]], title: str, path: Sequence[str]) -> Picture | None:
    """One number of each run against its tokens; None where it was not measured twice."""
    bands = [(i, row.arm, band([curve(result, path) for result in row.done])) for i, row in rows]
    lines = [(i, arm, *found) for i, arm, found in bands if found and len(found[0]) > 1]
    title = title.capitalize()
    caption = f"{title}, against training tokens; the table defines it. {LINE}"
    return drawing(title, lines, caption, AXES["tokens"]) if lines else None


def curve(result: Result, path: Sequence[str]) -> Curve:
    return points((line["tokens"], value_at(line["probes"], *path)) for line in result.metrics if "probes" in line)


def over_copies(rows: Sequence[tuple[int, Row]]) -> Picture | None:
    """The loss of each copy of a passage that comes eleven times in a row, at the end."""
    lines = []
    for i, row in rows:
        found = np.array(row.values("probes", "copy_loss", "curve", "held_out"), float)  # [seeds, copies]
        if len(found) and np.isfinite(found).all():
            lines.append((i, row.arm, np.arange(1, found.shape[1] + 1), found))
    caption = f"Nats per token in each copy of held-out passages that come eleven times, at the end of training. {LINE}"
    return drawing("Loss by copy", lines, caption, "copy") if lines else None


def drawing(title: str, lines: Sequence[tuple[int, str, Any, Any]], caption: str, x_axis: str) -> Picture:
    """Lines of (colour, arm, x [n], y [seeds, n])."""

    def draw(axes: Axes) -> None:
        for i, arm, x, y in lines:
            axes.plot(x, y.mean(0), color=SERIES[i % 8], linestyle=DASHES[i % 8], label=arm)
            axes.fill_between(x, y.min(0), y.max(0), color=SERIES[i % 8], alpha=0.18, linewidth=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(xlabel=x_axis, ylabel=title.lower())
        axes.legend(loc="best")

    return Picture(title, render(draw, "".join(filter(str.isalnum, title.lower()))), caption)


def by_head(rows: Sequence[tuple[int, Row]], name: str) -> Picture | None:
    """Layers x heads of each arm, side by side: the mean over seeds of the score of each head at the end."""
    every = [(i, row.arm, np.array(row.values("probes", name, "heads"), float)) for i, row in rows]
    found = [(i, arm, np.mean(scores, 0)) for i, arm, scores in every if scores.size and np.isfinite(scores).all()]
    if not found:
        return None
    written = sum(scores.size for *_, scores in found) <= WRITTEN
    layers = max(len(scores) for *_, scores in found)

    def draw(axes: Axes) -> None:
        left, middles = 0.0, []
        for i, _, scores in found:
            depth, heads = scores.shape
            for layer, head in np.ndindex(depth, heads):
                score = min(scores[layer, head], 1.0)
                axes.add_patch(Rectangle((left + head, layer), 1, 1, facecolor=SERIES[i % 8], alpha=score, linewidth=0))
                if written:
                    axes.text(left + head + 0.5, layer + 0.5, f"{score:.2f}", ha="center", va="center", fontsize=7)
            axes.add_patch(Rectangle((left, 0), heads, depth, fill=False, edgecolor=RULE))
            middles.append(left + heads / 2)
            left += heads + 1
        axes.set_xticks(middles, [arm for _, arm, _ in found])
        shown = range(0, layers, -(-layers // 12))
        axes.set_yticks([layer + 0.5 for layer in shown], [str(layer) for layer in shown])
        axes.grid(False)
        axes.set(xlim=(-0.2, left - 0.8), ylim=(-0.1, layers + 0.1), ylabel="layer")
        axes.spines[:].set_visible(False)

    title = f"{HEADS[name]} by head"
    caption = (
        f"{HEADS[name]}: the share of attention of each head at the end of training, mean over seeds, from transparent "
        f"(0) to full colour (1). Rows: layers, the first at the bottom; columns: heads, arm by arm."
    )
    return Picture(title, render(draw, name.replace("_", ""), 1 + min(0.3 * layers, 6)), caption)
