"""Near duplicates as clusters: the document that stayed, and those that were dropped for it."""

import re
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from thriftlab.data.order import permute
from thriftlab.data.prepare.report.documents import Documents, Row

LARGEST, OTHERS = 20, 5  # clusters that are shown
MEMBERS = 6  # of a cluster, whose texts are shown
SHOWN = 2000  # characters of each


class Cluster(NamedTuple):
    size: int  # with the one that stayed
    members: list[Row]  # up to MEMBERS, the one that stayed first; with number, source, id and text


def clusters(documents: Documents) -> tuple[int, list[Cluster]]:
    """How many there are, and the LARGEST of them, then OTHERS that a fixed draw picks."""
    dropped = pc.field("stage") == "near"
    stayed = [batch.column(0).to_numpy() for batch in documents.batches(["of"], dropped)]
    roots, counts = np.unique(np.concatenate([*stayed, np.empty(0, np.int64)]), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rest = order[LARGEST:]
    drawn = permute(np.arange(min(OTHERS, len(rest))), len(rest), 0, 0) if len(rest) else np.empty(0, np.int64)
    shown = np.concatenate([order[:LARGEST], rest[drawn]])
    members = _members(documents, roots[shown].tolist())
    sizes = (counts[shown] + 1).tolist()
    return len(roots), [Cluster(size, members[root]) for size, root in zip(sizes, roots[shown].tolist(), strict=True)]


def _members(documents: Documents, roots: list[int]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {root: [] for root in roots}
    concerned = pc.field("number").isin(roots) | pc.field("of").isin(roots)
    for row in documents.rows(concerned, ["source", "number", "id", "stage", "split", "of", "text"]):
        mine, is_root = found.get(row["of"] if row["stage"] == "near" else row["number"]), row["stage"] != "near"
        if mine is not None and (is_root or len(mine) < MEMBERS):
            row["text"] = (_text(documents, row) or "")[:SHOWN]
            mine.insert(0 if is_root else len(mine), row)
    return {root: rows[:MEMBERS] for root, rows in found.items()}


def _text(documents: Documents, row: Row) -> str | None:
    if row.get("text") is None and row["stage"] == "kept":
        return documents.decoded_at(documents.place(row))
    return row.get("text")


def differing(text: str, other: str) -> list[tuple[bool, str]]:
    """A text in pieces, each with whether it differs from the other text; compared by words."""
    words, others = re.findall(r"\s+|\S+", text), re.findall(r"\s+|\S+", other)
    steps = SequenceMatcher(None, others, words, autojunk=False).get_opcodes()
    return [(tag != "equal", "".join(words[a:b])) for tag, _, _, a, b in steps if b > a]
