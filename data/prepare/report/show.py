"""What a prepared folder holds and what was dropped on the way, as tables of text."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from thriftlab.data.prepare.report.documents import Documents, open_documents
from thriftlab.data.prepare.report.why import explain, find, find_text
from thriftlab.data.prepare.summary import Summary

UNSCORED = np.iinfo(np.int32).min
SHOWN = 3  # sources of a reason, by name


def show(folder: str | Path, document: str | None = None, text: str | None = None) -> str:
    """A folder, or one of its documents: the one of a number or id, or with these words. DataError."""
    documents = open_documents(folder)
    if document is None and text is None:
        return summary(documents)
    return explain(documents, find(documents, document) if document is not None else find_text(documents, text or ""))


def summary(documents: Documents) -> str:
    tables = [funnel_table(documents, "documents"), funnel_table(documents, "bytes"), reason_table(documents)]
    tables += [edit_table(documents), score_table(documents)]
    names = ["documents after each stage", "MB after each stage", "dropped", "lines that rules edited", "scores"]
    blocks = [f"{name}\n{aligned(table)}" for name, table in zip(names, tables, strict=True) if len(table) > 1]
    hint = f"one document: thriftlab data show {documents.folder} --document NUMBER|ID, or --text WORDS"
    return "\n\n".join([str(Summary(documents.folder, documents.manifest, ())), *blocks, hint])


Table = list[Sequence[str]]


def funnel_table(documents: Documents, key: str) -> Table:
    funnel = documents.funnel["funnel"]
    stages = list(dict.fromkeys(step["stage"] for steps in funnel.values() for step in steps))
    rows = [(name, [after(steps, stage, key) for stage in stages]) for name, steps in funnel.items()]
    total = [sum(column) for column in zip(*(row for _, row in rows), strict=True)]
    shown = [*rows, ("all", total)] if len(rows) > 1 else rows
    return [
        ["source", *stages],
        *([name, *(f"{n:,}" if key == "documents" else f"{n / 1e6:,.3f}" for n in row)] for name, row in shown),
    ]


def after(steps: list[dict], stage: str, key: str) -> int:
    """What a source had after a stage; 0 if it did not come so far."""
    return next((step[key] for step in steps if step["stage"] == stage), 0)


def reason_table(documents: Documents) -> Table:
    rows: Table = [["stage", "reason", "documents", "MB", "", "most in"]]
    for (stage, reason), by_source in reasons_by_source(documents.funnel).items():
        count, size = (sum(entry[key] for entry in by_source.values()) for key in ("count", "bytes"))
        acted = any(entry["acted"] for entry in by_source.values())
        most = sorted(by_source.items(), key=lambda item: -item[1]["count"])
        where = ", ".join(f"{name} {entry['count']:,}" for name, entry in most[:SHOWN])
        rows.append([stage, reason, f"{count:,}", f"{size / 1e6:,.3f}", "" if acted else "counted only", where])
    return rows


def reasons_by_source(funnel: dict) -> dict[tuple[str, str], dict[str, dict]]:
    """(stage, reason) -> source -> what funnel.json says; stages in their order, the most frequent reason first."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for source, stages in funnel["reasons"].items():
        for stage, reasons in stages.items():
            for reason, entry in reasons.items():
                if entry["count"]:
                    found.setdefault((stage, reason), {})[source] = entry
    order = list(dict.fromkeys(step["stage"] for steps in funnel["funnel"].values() for step in steps))
    order += [stage for stage, _ in found if stage not in order]
    total = {key: sum(entry["count"] for entry in by_source.values()) for key, by_source in found.items()}
    return {key: found[key] for key in sorted(found, key=lambda key: (order.index(key[0]), -total[key], key[1]))}


def edit_table(documents: Documents) -> Table:
    edits = documents.funnel.get("edits", {}).items()
    return [["source", "rule", "lines"], *([name, r, f"{n:,}"] for name, rules in edits for r, n in rules.items() if n)]


def score_table(documents: Documents) -> Table:
    """Of the training documents, from the shards."""
    rows: Table = [["source", "score", "least", "10 %", "median", "90 %", "most"]]
    for source, entry in documents.manifest["sources"].items():
        units, shards = entry.get("columns", {}), entry["train"]["shards"]
        for k, (name, unit) in enumerate(units.items()):
            scores = np.concatenate([np.load(documents.folder / shard["scores_file"])[:, k] for shard in shards])
            scored = scores[scores != UNSCORED]
            values = np.quantile(scored, [0, 0.1, 0.5, 0.9, 1], method="nearest") / unit if len(scored) else []
            rows.append([source, name, *(f"{value:.4g}" for value in values), *[""] * (5 - len(values))])
    return rows


def aligned(rows: Table) -> str:
    """Columns of words to the left, of numbers to the right."""
    columns = []
    for head, *cells in zip(*rows, strict=True):
        width = max(map(len, (head, *cells)))
        number = all(re.fullmatch(r"[-\d.,e]+", cell) for cell in cells)
        columns.append([cell.rjust(width) if number else cell.ljust(width) for cell in (head, *cells)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))
