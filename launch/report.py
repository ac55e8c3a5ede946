"""A study's folder -> report.html, one page that needs nothing beside it, and report.md with the same words and tables.

Works on a study that is half done: what is missing is named at the top. One surprise: the page carries no script and
asks no server; its figures take their colours from the page's style, so they follow the reader's light or dark setting.
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from thriftlab.launch.figures import Picture, colours, pictures
from thriftlab.launch.results import Row, Study, read_study
from thriftlab.launch.stats import Paired
from thriftlab.launch.summary import (
    LR_WORDS,
    answers,
    megabytes,
    number,
    plus_minus,
    question,
    signed,
    spread,
    table,
    warnings,
)
from thriftlab.train import surface
from thriftlab.train.files import replace_atomically

__all__ = ["report", "table"]

Cell = tuple[str, ...]  # the value, then smaller print below it
Table = tuple[Sequence[str], Sequence[Sequence[Cell]]]  # head, rows


def report(folder: Path) -> Path:
    """Write FOLDER/report.html and report.md; returns the page. UserError if FOLDER is not a comparable study."""
    study = read_study(Path(folder))
    template = Template(resources.files("thriftlab.launch").joinpath("templates/report.html").read_text("utf-8"))
    page = template.substitute(title=html.escape(title(study)), body=body(study))
    target = study.folder / "report.html"
    replace_atomically(target, page.encode())
    replace_atomically(study.folder / "report.md", markdown(study).encode())
    return target


def title(study: Study) -> str:
    if study.plan["question"]:
        return study.folder.resolve().name
    baseline, *others = study.plan["arms"]
    return f"{', '.join(others)} against {baseline}" if others else baseline


# ----------------------------------------------------------------------------------------------------------- tables

HEAD = (
    "method", "held-out loss, nats/token", "bits per byte", "difference to {}, nats/token", "optimizer state",
    "tokens/s", "learning rate", "cost of its trials", "seeds",
)  # fmt: skip


def main_table(study: Study) -> Table:
    head = [text.format(study.rows[0].method) for text in HEAD]
    return head, [[*main_row(row)] for row in study.rows]


def main_row(row: Row) -> Iterator[Cell]:
    yield (row.method,)
    yield (plus_minus(*row.loss),)
    yield (plus_minus(*row.mean_sd("results", "bits_per_byte")),)
    yield difference(row)
    predicted = max(row.values("memory", "predicted_state_bytes"), default=None)
    yield megabytes(row.state_bytes), f"predicted {megabytes(predicted)}"
    yield (spread(row.values("speed", "tokens_per_second")),)
    edge = f", {row.lr['edge']} edge" if row.lr.get("edge") else ""
    yield number(row.learning_rate, ".3g"), LR_WORDS[row.lr["how"]] + edge
    yield trial_cost(row)
    yield f"{len(row.done)} of {row.planned}", f"{sum(row.values('skipped_steps')):.0f} steps skipped"


def difference(row: Row) -> Cell:
    d = row.difference
    if d is None:
        return ("–",)
    if d.t is None or d.bootstrap is None:
        return signed(d.mean), "one seed, no interval"
    return (
        signed(d.mean),
        f"95 % t: {signed(d.t[0])} to {signed(d.t[1])}",
        f"bootstrap: {signed(d.bootstrap[0])} to {signed(d.bootstrap[1])}",
    )


def trial_cost(row: Row) -> Cell:
    trials = row.lr.get("trials", [])
    if not trials:
        return ("–",)
    tokens, seconds = (sum(trial[key] or 0 for trial in trials) for key in ("tokens", "seconds"))
    return f"{tokens:,.0f} tokens", f"{seconds:,.0f} s in {len(trials)} trials"


def contrast_table(study: Study) -> Table | None:
    if not study.contrasts:
        return None
    rows = [
        [(c.name,), (f"{c.arms[0]} − {c.arms[1]}",), contrast_cell(c.difference), (number(c.adjusted, ".3g"),),
         (", ".join(f"{d:+.3f}" for d in c.by_seed.values()),)]
        for c in study.contrasts
    ]  # fmt: skip
    return ["question", "arms", "difference, nats/token", "p", "by seed"], rows


def contrast_cell(d: Paired | None) -> Cell:
    if d is None:
        return ("–",)
    return (signed(d.mean), f"95 % t: {signed(d.t[0])} to {signed(d.t[1])}") if d.t else (signed(d.mean), "no interval")


def arm_table(study: Study) -> Table:
    """What each arm is, and how large it is."""
    rows = [[(row.method,), (settings(study.plan["arms"][row.method]["tree"]),), *sizes(row)] for row in study.rows]
    return ["method", "settings", "trained parameters", "FLOPs per token", "optimizer state", "peak memory"], rows


def settings(tree: dict[str, Any], prefix: str = "") -> str:
    """A tree as key=value, in the words of the command line."""
    parts = [
        settings(value, f"{prefix}{key}.") if isinstance(value, dict) else f"{prefix}{key}={surface.text(value)}"
        for key, value in tree.items()
    ]
    return " ".join(part for part in parts if part)


def sizes(row: Row) -> list[Cell]:
    """Trained parameters, FLOPs of a token, optimizer state, most memory of any run."""
    trained, flops, state, peak = (
        max(row.values(*path), default=None)
        for path in (("model", "trained"), ("model", "flops_per_token"), ("memory", "state_bytes"),
                     ("memory", "peak_bytes"))
    )  # fmt: skip
    return [(number(trained, ","),), (number(flops, ","),), (megabytes(state),), (megabytes(peak),)]


def source_table(study: Study) -> Table | None:
    """Loss by source; None where the text has one source only."""
    names = sorted({name for record in study.records for name in record["results"].get("sources", {})})
    if len(names) < 2:
        return None

    def cell(row: Row, name: str) -> Cell:
        bits = row.mean_sd("results", "sources", name, "bits_per_byte")[0]
        return plus_minus(*row.mean_sd("results", "sources", name, "loss")), f"{number(bits, '.4f')} bits/byte"

    return ["method", *names], [[(row.method,), *(cell(row, name) for name in names)] for row in study.rows]


def trial_table(study: Study) -> Table | None:
    grid = sorted({trial["lr"] for row in study.rows for trial in row.lr.get("trials", [])})
    if not grid:
        return None
    losses = {row.method: {trial["lr"]: trial["loss"] for trial in row.lr.get("trials", [])} for row in study.rows}
    rows = [[(method,), *((number(found.get(lr), ".4f"),) for lr in grid)] for method, found in losses.items()]
    return ["method", *(f"lr {lr:g}" for lr in grid)], rows


# ------------------------------------------------------------------------------------------------------ how it was run


def circumstances(study: Study) -> list[tuple[str, str]]:
    plan = study.plan
    done = next((result for result in study.results if result.record), None)
    first = done.record if done and done.record else {}
    commit = first.get("commit")
    machine, data, model = first.get("machine", {}), first.get("data", {}), first.get("model", {})
    found: dict[str, Any] = {
        "command": plan["command"],
        "budget of a run": ", ".join(f"{amount:,.12g} {kind}" for kind, amount in plan["budget"].items()),
        "seeds": f"{seeds(plan)}: the same data order and initial weights for every method",
        "side by side": f"{plan['jobs']} runs at a time, threads each: {plan['threads'] or 'as torch chooses'}",
        "model": model
        and f"{model['parameters']:,} parameters, {model['flops_per_token']:,.0f} FLOPs per token, "
        f"of {done and done.method}",
        "data": data and f"tokenizer {data.get('tokenizer')}, fingerprint {data['fingerprint']}",
        "code": commit and commit + (", with uncommitted changes" if first["diff_sha256"] else ""),
        "machine": ", ".join(
            [f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}", *machine["gpus"]] if machine else []
        ),
        "versions": ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items() if version),
        "when": period(study),
    }
    return [(term, text) for term, text in found.items() if text]


def seeds(plan: dict[str, Any]) -> str:
    """0, 1, 2 for most arms, and for how many more seeds which."""
    fewest = min(arm["seeds"] for arm in plan["arms"].values())
    more = [f"{name} to {arm['seeds'] - 1}" for name, arm in plan["arms"].items() if arm["seeds"] > fewest]
    return ", ".join(map(str, range(fewest))) + (f" ({', '.join(more)})" if more else "")


def period(study: Study) -> str:
    """From the start of the first finished run to the end of the last."""
    times = [record[key] for record in study.records for key in ("started", "finished")]
    first, last = (datetime.fromtimestamp(pick(times), UTC) for pick in (min, max)) if times else (None, None)
    return f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC" if times else ""


NOTES = (
    "Differences are paired by seed. The t interval decides; the percentile bootstrap stands beside it and is too "
    "narrow for few seeds (with 3 it can cover 75 % at most). The intervals are one per comparison and not "
    "simultaneous: of k of them one or more may miss with a chance of up to k × 5 %. ± is the standard deviation over "
    "seeds. MiB are 2²⁰ bytes."
)


# ------------------------------------------------------------------------------------------------------------- pages


def sections(study: Study) -> list[tuple[str, Table, str]]:
    """Title, table and note of every table of the report."""
    side_by_side = f"tokens/s: mean over seeds, with {study.plan['jobs']} runs side by side."
    trials = "Final held-out loss, nats/token, of short runs, under seeds that are none of the study's."
    adjusted = (
        "Questions that were asked before the runs. p: two-sided t test of no difference, adjusted for the number of "
        "questions (Holm); the intervals are not. Differences by seed in the order of the seeds."
    )
    tables = [
        ("Questions", contrast_table(study), adjusted),
        ("Comparison", main_table(study), f"{NOTES} {side_by_side}"),
        ("Arms", arm_table(study), "What differs from the study's base. Peak memory is that of the whole process."),
        ("Held-out loss by source", source_table(study), "nats/token, mean ± standard deviation over seeds."),
        ("Learning-rate trials", trial_table(study), trials),
    ]
    return [(name, rows, note) for name, rows, note in tables if rows]


def body(study: Study) -> str:
    tables, lead, colour = sections(study), 2 if study.contrasts else 1, colours(study)
    parts = [
        f"<h1>{html.escape(title(study))}</h1>",
        f'<p class="question">{html.escape(question(study))}</p>',
        '<ul class="answers">', *(f"<li>{html.escape(line)}</li>" for line in answers(study)), "</ul>",
        warning_box(warnings(study)),
        *(html_section(*section, colour) for section in tables[:lead]),
        '<h2>Figures</h2><div class="figures">', *map(html_figure, pictures(study)), "</div>",
        *(html_section(*section, colour) for section in tables[lead:]),
        "<h2>How it was run</h2><dl>", *(html_fact(*fact) for fact in circumstances(study)), "</dl>",
    ]  # fmt: skip
    return "\n".join(parts)


def warning_box(lines: list[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<div class="warnings"><strong>Keep in mind</strong><ul>{items}</ul></div>' if lines else ""


def html_section(name: str, rows: Table, note: str, colour: Mapping[str, int]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in rows[0])
    lines = "".join(f"<tr>{html_row(row, colour)}</tr>" for row in rows[1])
    return (
        f'<h2>{html.escape(name)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{lines}</tbody></table></div><p class="note">{html.escape(note)}</p>'
    )


def html_row(row: Sequence[Cell], colour: Mapping[str, int]) -> str:
    (name,), *others = row
    key = f'<span class="key" style="background: var(--s{colour[name]})"></span>' if name in colour else ""
    return f"<td>{key}{html.escape(name)}</td>" + "".join(f"<td>{html_cell(cell)}</td>" for cell in others)


def html_cell(cell: Cell) -> str:
    return html.escape(cell[0]) + "".join(f"<small>{html.escape(text)}</small>" for text in cell[1:])


def html_figure(picture: Picture) -> str:
    svg = picture.svg.replace("<svg ", f'<svg aria-label="{html.escape(picture.title)}" ', 1)
    caption = html.escape(picture.caption)
    return f"<figure><h3>{html.escape(picture.title)}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def html_fact(term: str, text: str) -> str:
    shown = f"<code>{html.escape(text)}</code>" if term == "command" else html.escape(text)
    return f"<dt>{term}</dt><dd>{shown}</dd>"


def markdown(study: Study) -> str:
    parts = [f"# {title(study)}", question(study), "\n".join(f"- {line}" for line in answers(study))]
    if found := warnings(study):
        parts.append("**Keep in mind**\n\n" + "\n".join(f"- {line}" for line in found))
    parts += [f"## {name}\n\n{markdown_table(rows)}\n\n{note}" for name, rows, note in sections(study)]
    parts.append("## How it was run\n\n" + "\n".join(f"- {term}: {text}" for term, text in circumstances(study)))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(rows: Table) -> str:
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *[["; ".join(cell) for cell in row] for row in rows[1]]]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
