"""A prepared folder -> report.html, one page that needs no other file: what was dropped where and why, to be looked at.

Documents are other people's text: all of it is escaped, and the page forbids itself scripts and everything outside.
"""

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import chain, zip_longest
from pathlib import Path
from string import Template
from typing import Any

import pyarrow.compute as pc

from thriftlab.data.files import replace_atomically
from thriftlab.data.prepare.report.bars import COLOURS, histogram, shares, short
from thriftlab.data.prepare.report.clusters import LARGEST, Cluster, clusters, differing
from thriftlab.data.prepare.report.documents import Documents, open_documents
from thriftlab.data.prepare.report.show import after, reasons_by_source

SAMPLES = 20  # of a reason
MEASURES = {
    "bytes": "length of the documents, bytes",
    "score": "score of the classifier",
    "trigram": "nats per token under the trigram model",
    "model": "nats per token under the model of a run",
}

escape = html.escape


def write_report(folder: Path, name: str | None = None) -> Path:
    """Write FOLDER/report.html from the manifest and documents/; `name` is what the data set is called."""
    documents = open_documents(folder)
    title = f"What was prepared: {name or folder.resolve().name}"
    page = Template(template()).substitute(title=escape(title), body=body(documents, title))
    replace_atomically(folder / "report.html", page.encode(errors="replace"))
    return folder / "report.html"


def template() -> str:
    return resources.files("thriftlab.data").joinpath("prepare/report/page.html").read_text("utf-8")


def body(documents: Documents, title: str) -> str:
    parts = [
        f'<h1>{escape(title)}</h1><p class="lead">{lead(documents)}</p>',
        section("Documents after each stage", funnel(documents.funnel["funnel"])),
        section("Dropped, and why", "".join(reasons(documents.funnel))),
        section("Lengths and scores", "".join(histograms(documents.funnel["histograms"]))),
        section("Near duplicates, side by side", near_duplicates(documents)),
        section("Tokens to train on", tokens(documents)),
        section("Lines that rules edited", edits(documents.funnel.get("edits", {}))),
    ]
    return "\n".join(parts)


def section(name: str, content: str) -> str:
    return f"<h2>{name}</h2>\n{content}" if content else ""


def lead(documents: Documents) -> str:
    read = sum(steps[0]["documents"] for steps in documents.funnel["funnel"].values())
    sources = documents.manifest["sources"].values()
    splits = [entry[split] for entry in sources for split in ("train", "validation")]
    left, size, tokens = (sum(split[key] for split in splits) for key in ("documents", "bytes", "tokens"))
    return (
        f"{left:,} of {read:,} documents stayed ({percent(left, read)}): {in_bytes(size)}, {tokens:,} tokens in "
        f"{count(len(sources), 'source')}."
    )


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def in_bytes(size: int) -> str:
    return f"{short(size, ' ')}B"


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def funnel(sources: dict[str, list[dict[str, Any]]]) -> str:
    stages = list(dict.fromkeys(step["stage"] for steps in sources.values() for step in steps))
    rows = [(escape(name), [(after(steps, stage, "documents"), after(steps, stage, "bytes")) for stage in stages])
            for name, steps in sources.items()]  # fmt: skip
    columns = zip(*(row for _, row in rows), strict=True)
    total = [(sum(documents for documents, _ in column), sum(size for _, size in column)) for column in columns]
    lines = [f"<tr><td>{name}</td>{stage_cells(row)}</tr>" for name, row in rows]
    lines += [f'<tr class="all"><td>all</td>{stage_cells(total)}</tr>'] if len(rows) > 1 else []
    return table(["source", *stages], lines) + note("Documents, their share of those that were read, and their bytes.")


def stage_cells(row: list[tuple[int, int]]) -> str:
    return "".join(
        f'<td class="bar" style="--part: {percent(documents, row[0][0])}">{documents:,}'
        f"<small>{percent(documents, row[0][0])}, {in_bytes(size)}</small></td>"
        for documents, size in row
    )


def table(head: Sequence[str], lines: Sequence[str]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def note(words: str) -> str:
    return f'<p class="note">{words}</p>'


def reasons(documents: dict[str, Any]) -> Iterator[str]:
    """Every reason, to be opened: how many in each source, and samples that can be opened."""
    for (stage, reason), by_source in reasons_by_source(documents).items():
        number, size = (sum(entry[key] for entry in by_source.values()) for key in ("count", "bytes"))
        counted = "" if any(entry["acted"] for entry in by_source.values()) else ", only counted"
        where = ", ".join(f"{escape(name)} {entry['count']:,}" for name, entry in by_source.items())
        turns = zip_longest(*([(name, each) for each in entry["samples"]] for name, entry in by_source.items()))
        samples = [pair for pair in chain.from_iterable(turns) if pair][:SAMPLES]
        yield (
            f'<details><summary><span class="count">{number:,} <small>{in_bytes(size)}</small></span>'
            f"{escape(reason)} <small>{escape(stage)}{counted}</small></summary><p>{where}</p>"
            f"{''.join(sample(*pair) for pair in samples)}</details>"
        )


def sample(source: str, entry: dict[str, str]) -> str:
    name, begin = escape(f"{source}/{entry['id']}"), escape(beginning(entry["text"]))
    words = text(escape(entry["text"]))
    return f"<details><summary><code>{name}</code> <small>{begin}</small></summary>{words}</details>"


def beginning(words: str) -> str:
    return " ".join(words[:200].split())[:90]


def text(escaped: str) -> str:
    return f'<pre dir="auto">{escaped}</pre>'


def histograms(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Of each measure, one figure for all sources together and one for each."""
    for name, measured in found.items():
        counts = {source: values for source, values in measured["counts"].items() if any(values)}
        if not counts:
            continue
        total = [sum(column) for column in zip(*counts.values(), strict=True)]
        first, last = (next(k for k in order if total[k]) for order in (range(len(total)), range(len(total))[::-1]))
        edges, cuts = measured["edges"][first : last + 2], measured["cuts"]
        everything = {"all sources": total} | counts if len(counts) > 1 else counts
        figures = "".join(
            figure(source, edges, values[first : last + 1], cuts.get(source, []))
            for source, values in everything.items()
        )
        said = " Dashed: where pools are cut." if cuts else ""
        words = note(f"Number of documents; the highest bar is as high in every figure.{said}")
        yield f'<h3>{escape(MEASURES.get(name, name))}</h3><div class="figures">{figures}</div>{words}'


def figure(source: str, edges: list[float], counts: list[int], cuts: list[float]) -> str:
    said = f"<figcaption>cut at {', '.join(f'{cut:.4g}' for cut in cuts)}</figcaption>" if cuts else ""
    return f"<figure><h4>{escape(source)}</h4>{histogram(source, edges, counts, cuts)}{said}</figure>"


def near_duplicates(documents: Documents) -> str:
    total, found = clusters(documents)
    if not found:
        return ""
    rest = len(found) - LARGEST
    shown = f"the {LARGEST} largest and {rest} others" if rest > 0 else "all are shown"
    words = f"{count(total, 'cluster')}; {shown}. Words that differ from the document that stayed are marked."
    return "".join(map(cluster, found)) + note(words)


def cluster(found: Cluster) -> str:
    stayed, *dropped = found.members
    columns = [member(stayed, "stayed", escape(stayed["text"]))]
    columns += [member(row, "dropped", marked(row["text"], stayed["text"])) for row in dropped]
    more = found.size - len(found.members)
    rest = f"<p>and {more:,} more</p>" if more else ""
    name, begin = escape(f"{stayed['source']}/{stayed['id']}"), escape(beginning(stayed["text"]))
    return (
        f'<details><summary><span class="count">{count(found.size, "document")}</span>'
        f"<code>{name}</code> <small>{begin}</small></summary>"
        f'<div class="cluster">{"".join(columns)}</div>{rest}</details>'
    )


def member(row: dict[str, Any], fate: str, escaped: str) -> str:
    name = f"{escape(row['source'])}/{escape(row['id'])}"
    return f"<div><h4>{name} <small>{fate}, document {row['number']}</small></h4>{text(escaped or '(not kept)')}</div>"


def marked(words: str, other: str) -> str:
    return "".join(
        f"<mark>{escape(piece)}</mark>" if differs else escape(piece) for differs, piece in differing(words, other)
    )


def tokens(documents: Documents) -> str:
    """By source and pool, as a table and a bar."""
    found: Counter[tuple[str, int | None]] = Counter()
    for batch in documents.batches(["source", "tokens", "pool"], pc.field("split") == "train"):
        for row in batch.to_pylist():
            found[row["source"], row.get("pool")] += row["tokens"]
    pools = sorted({pool for _, pool in found}, key=lambda pool: (pool is None, pool))
    names = [f"pool {pool}" if pool is not None else "no pool" if len(pools) > 1 else "tokens" for pool in pools]
    sources = list(documents.manifest["sources"])
    most = max([sum(found[source, pool] for pool in pools) for source in sources], default=1)
    lines = []
    for source in sources:
        values = [found[source, pool] for pool in pools]
        bar = shares(source, names, values)
        total = [f"<td>{sum(values):,}</td>"] if len(pools) > 1 else []
        cells = [f"<td>{escape(source)}</td>", *(f"<td>{value:,}</td>" for value in values), *total]
        width = f'<td style="width: 40%"><div style="width: {percent(sum(values), most)}">{bar}</div></td>'
        lines.append(f"<tr>{''.join(cells)}{width}</tr>")
    head = ["source", *names, *(["all"] if len(pools) > 1 else []), ""]
    return table(head, lines) + (note(" &nbsp; ".join(map(key, range(len(names)), names))) if len(names) > 1 else "")


def key(number: int, name: str) -> str:
    return f'<span class="key" style="background: var(--s{number % COLOURS})"></span>{name}'


def edits(found: dict[str, dict[str, int]]) -> str:
    lines = [
        f"<tr><td>{escape(source)}</td><td>{escape(rule)}</td><td>{number:,}</td></tr>"
        for source, rules in found.items()
        for rule, number in rules.items()
        if number
    ]
    return table(["source", "rule", "lines"], lines) if lines else ""
