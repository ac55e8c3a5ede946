"""What `thriftlab curate` found, as lines, and as curate.html and curate.md in the manner of a study's report."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from thriftlab.data.curation_law import Answer, Crossover, Fit, Option, Point, predicted
from thriftlab.data.files import make_folder, replace_atomically
from thriftlab.launch.report.figures import DASHES, INK, MARKERS, SERIES, Picture, render
from thriftlab.launch.report.page import html_figure, html_section, markdown_table, template, warning_box
from thriftlab.launch.report.tables import Table

QUESTION = "Which data end at the lowest held-out loss, for each budget of training tokens?"
CURVE = 80


@dataclass(frozen=True)
class Curation:
    fit: Fit
    mixtures: tuple[Point, ...]  # not fitted
    answers: tuple[Answer, ...]
    weighted: tuple[Option | None, ...]  # the best weights for each answer's budget
    crossovers: tuple[Crossover, ...]
    candidates: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]
    flops_per_token: float

    def lines(self) -> list[str]:
        return [*self.conclusions(), *self.warnings()]

    def conclusions(self) -> list[str]:
        return [*map(sentence, self.answers, self.weighted), *map(self.change, self.crossovers)]

    def change(self, found: Crossover) -> str:
        low, high = found.interval
        ends = [
            "below the budgets of the page" if low == 0 else amount(low),
            "beyond them" if high == math.inf else amount(high),
        ]
        flops = f", {found.tokens * self.flops_per_token:.3g} FLOPs" if self.flops_per_token else ""
        return (
            f"From {amount(found.tokens)} tokens on{flops}, {found.after} is better than {found.before} "
            f"(95 % interval: {' to '.join(ends)})."
        )

    def warnings(self) -> list[str]:
        missing = [
            f"{key} of {pool} is not identified: {why}{remedy(key)}" for (pool, key), why in self.fit.missing.items()
        ]
        excluded = [
            f"{' + '.join(point.unique)} at {amount(point.tokens)} tokens is past the minimum of its loss: not fitted"
            for point in self.fit.excluded
        ]
        return [*missing, *dict.fromkeys(excluded), *self.notes]


def remedy(key: str) -> str:
    return "; a half-life of 13 epochs (10 to 17) is assumed" if key == "tau" else "; the pool is not offered"


def sentence(found: Answer, weighted: Option | None) -> str:
    by_weights = f" Free weights: {weighted.name}, predicted loss {weighted.loss:.4f}." if weighted else ""
    return verdict_of(found) + by_weights


def verdict_of(found: Answer) -> str:
    at = f"{amount(found.tokens)} tokens"
    if found.best is None:
        nearest = found.options[0]
        return (
            f"{at}: no answer. Every candidate repeats a pool more often than any fitted run did "
            f"({nearest.name}: {nearest.epochs[nearest.beyond or '']:.1f} epochs of {nearest.beyond})."
        )
    text = f"{at}: {found.best.name}, predicted loss {found.best.loss:.4f} ({span(found.best)})."
    if found.tied:
        return f"{text} It cannot be told apart from {'; '.join(found.tied)}."
    rivals = [one for one in found.options if one.beyond is None and one is not found.best]
    return f"{text} It is {rivals[0].loss - found.best.loss:.4f} below {rivals[0].name}." if rivals else text


def amount(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens < 1e7 else f"{tokens:.4g}"


def span(option: Option) -> str:
    return f"95 % {option.interval[0]:.4f} to {option.interval[1]:.4f}"


def label(weights: Mapping[str, float], unique: Mapping[str, float]) -> str:
    """`a + b` where every token counts alike, else the shares in percent."""
    epochs = [weights[name] / unique[name] for name in weights]
    if max(epochs) <= 1.02 * min(epochs):
        return " + ".join(sorted(weights))
    total = math.fsum(weights.values())
    return ", ".join(f"{name} {weights[name] / total:.0%}" for name in sorted(weights))


# ------------------------------------------------------------------------------------------------------------- tables


def sections(found: Curation) -> list[tuple[str, Table, str]]:
    best = (
        "Smallest predicted loss first. Not offered: candidates that repeat a pool more often than any fitted run did."
    )
    pools = (
        "b: utility, the slope of ln(loss - E) by ln(tokens) in the first epoch. tau: epochs in which it halves. "
        "Intervals: profile likelihood, 95 %, by an F threshold on Huber's loss of ln(loss)."
    )
    tables = [
        ("Budgets", budget_table(found), best),
        ("Pools", pool_table(found), pools),
        ("Mixtures that were not fitted", mixture_table(found), "A check of how pools combine."),
    ]
    return [(name, rows, note) for name, rows, note in tables if rows[1]]


def budget_table(found: Curation) -> Table:
    head = ["data", "budget, tokens", "predicted loss", "epochs", "verdict"]
    rows = [
        [(o.name,), (amount(a.tokens),), (f"{o.loss:.4f}", span(o)), (epochs_of(o),), (verdict(a, o),)]
        for a, weighted in zip(found.answers, found.weighted, strict=True)
        for o in (*a.options, *([weighted] if weighted else []))
    ]
    return head, rows


def epochs_of(option: Option) -> str:
    return ", ".join(f"{count:.2f} {name}" for name, count in option.epochs.items())


def verdict(answer: Answer, option: Option) -> str:
    if option.beyond is not None:
        return f"beyond the fitted epochs of {option.beyond}"
    if answer.best is option:
        return "best"
    if option not in answer.options:
        return "best weights"
    return "cannot be told apart from the best" if option.name in answer.tied else "worse"


def pool_table(found: Curation) -> Table:
    fit, rows = found.fit, []
    for pool in fit.law.ranked:
        own = fit.intervals[pool.name]
        b = f"{own['b'][0]:.3g} to {own['b'][1]:.3g}"
        tau = f"{own['tau'][0]:.3g} to {own['tau'][1]:.3g}" if "tau" in own else "not identified, assumed"
        runs = sum(pool.name in point.unique for point in fit.points)
        rows.append(
            [(pool.name,), (amount(pool.tokens),), (str(runs),), (f"{fit.last_epochs[pool.name]:.2f}",),
             (f"{pool.b:.4g}", b), (f"{pool.tau:.3g}", tau)]
        )  # fmt: skip
    return ["pool", "unique tokens", "runs", "most epochs", "b", "tau, epochs"], rows


def mixture_table(found: Curation) -> Table:
    rows = []
    for point in sorted(found.mixtures, key=lambda point: point.tokens):
        y = predicted(found.fit.law, point)
        name = label(point.shares, point.unique)
        rows.append(
            [(name,), (amount(point.tokens),), (f"{point.loss:.4f}",), (f"{y:.4f}",), (f"{point.loss - y:+.4f}",)]
        )
    return ["data", "tokens", "observed loss", "predicted loss", "difference"], rows


def facts(found: Curation) -> list[tuple[str, str]]:
    fit, shared = found.fit, found.fit.intervals[""]
    rows = [
        (key, f"{value:.5g}" + (f" ({shared[key][0]:.4g} to {shared[key][1]:.4g})" if key in shared else ", given"))
        for key, value in (("E", fit.law.E), ("A", fit.law.A), ("n_ref", fit.law.n_ref))
    ]
    return [
        ("law", "loss = E + A (n / n_ref)^b in the first epoch; b halves every tau epochs (arXiv 2404.07177)"),
        *rows, ("gamma", f"{fit.law.gamma:.3g}"), ("points", f"{len(fit.points)} fitted, {len(fit.excluded)} left out"),
        ("error of the fit", f"{fit.residual:.3%} of the loss"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ figures


def pictures(found: Curation) -> list[Picture]:
    return [utility_curves(found), fitted_against_observed(found), frontier(found)]


def utility_curves(found: Curation) -> Picture:
    fit = found.fit

    def draw(axes: Axes) -> None:
        for i, pool in enumerate(fit.law.ranked):
            own = [p for p in (*fit.points, *fit.excluded) if list(p.unique) == [pool.name]]
            reach = [p.tokens for p in own] or [p.tokens for p in fit.points]
            grid = np.geomspace(min(reach), max(*reach, *(a.tokens for a in found.answers)), CURVE)
            style = {"color": SERIES[i % 8], "linestyle": DASHES[i % 8], "label": pool.name}
            axes.plot(grid, fit.law.loss(grid, {pool.name: 1.0}), **style)
            for chosen, face in ((fit.points, SERIES[i % 8]), (fit.excluded, "none")):
                shown = [p for p in own if p in chosen]
                axes.plot([p.tokens for p in shown], [p.loss for p in shown], MARKERS[i % 8], color=SERIES[i % 8],
                          markerfacecolor=face, markersize=4)  # fmt: skip
        finish(axes, "training tokens", "held-out loss, nats per token")

    caption = "Predicted loss of each pool alone, and its runs. Hollow: past the minimum, not fitted."
    return Picture("Utility curves", render(draw, "utility"), caption)


def fitted_against_observed(found: Curation) -> Picture:
    def draw(axes: Axes) -> None:
        losses = [p.loss for p in (*found.fit.points, *found.mixtures)]
        axes.plot([min(losses), max(losses)], [min(losses), max(losses)], color=INK, linewidth=0.8)
        for i, (points, name) in enumerate(((found.fit.points, "fitted"), (found.mixtures, "mixtures, not fitted"))):
            if points:
                y = [predicted(found.fit.law, point) for point in points]
                axes.plot([p.loss for p in points], y, MARKERS[i], color=SERIES[i], markersize=4, label=name)
        axes.set(xlabel="observed loss", ylabel="predicted loss")
        axes.legend(loc="upper left")

    return Picture("Predicted against observed", render(draw, "observed"), "One mark a run; on the line they agree.")


def frontier(found: Curation) -> Picture:
    ends = [p.tokens for p in found.fit.points] + [a.tokens for a in found.answers]
    grid = np.geomspace(min(ends), max(ends), CURVE)
    losses = {name: found.fit.law.loss(grid, weights) for name, weights in found.candidates.items()}
    best = np.min(list(losses.values()), axis=0)

    def draw(axes: Axes) -> None:
        for i, (name, loss) in enumerate(losses.items()):
            axes.plot(grid, loss - best, color=SERIES[i % 8], linestyle=DASHES[i % 8], label=name)
        for change in found.crossovers:
            axes.axvline(change.tokens, color=INK, linewidth=0.8)
        finish(axes, "training tokens", "predicted loss above the best candidate's")

    caption = "How far each candidate is above the best one, which lies at 0. Vertical lines: the best one changes."
    return Picture("Frontier", render(draw, "frontier"), caption)


def finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel=x, ylabel=y)
    axes.legend(loc="best")


# --------------------------------------------------------------------------------------------------------------- page


def write_curation(found: Curation, folder: Path) -> Path:
    """Write curate.html and curate.md; returns the page."""
    make_folder(folder)
    page = folder / "curate.html"
    replace_atomically(page, Template(template()).substitute(title="Which data?", body=body(found)).encode())
    replace_atomically(folder / "curate.md", markdown(found).encode())
    return page


def body(found: Curation) -> str:
    parts = [
        "<h1>Which data?</h1>", f'<p class="question">{QUESTION}</p>',
        '<ul class="answers">', *(f"<li>{html.escape(line)}</li>" for line in found.conclusions()), "</ul>",
        warning_box(found.warnings()), *(html_section(*section, {}) for section in sections(found)),
        '<h2>Figures</h2><div class="figures">', *map(html_figure, pictures(found)), "</div>",
        "<h2>The fit</h2><dl>",
        *(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in facts(found)), "</dl>",
    ]  # fmt: skip
    return "\n".join(parts)


def markdown(found: Curation) -> str:
    parts = ["# Which data?", QUESTION, "\n".join(f"- {line}" for line in found.conclusions())]
    if warnings := found.warnings():
        parts.append("**Keep in mind**\n\n" + "\n".join(f"- {line}" for line in warnings))
    parts += [f"## {name}\n\n{markdown_table(rows)}\n\n{note}" for name, rows, note in sections(found)]
    parts.append("## The fit\n\n" + "\n".join(f"- {term}: {text}" for term, text in facts(found)))
    return "\n\n".join(parts) + "\n"
