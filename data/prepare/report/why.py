"""Why a document stayed or was dropped: every decision about it, in words.

The text of a document that rules dropped is not kept. It is read again from the input, where that is still there.
"""

import hashlib
import re
import textwrap
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import pyarrow.compute as pc

from thriftlab.data.corpora import recipes
from thriftlab.data.corpora.packages import DOWNLOADS
from thriftlab.data.corpora.readers import Document, locate, normalise, read
from thriftlab.data.errors import DataError
from thriftlab.data.prepare.clean import point
from thriftlab.data.prepare.report.documents import Documents, Row
from thriftlab.data.prepare.request import Input

SHOWN = 10  # documents in a list
LINES, WIDTH = 20, 100  # of a text that is shown
BRIEF = ["source", "number", "id", "stage", "reason", "split", "text"]


# --- which document is meant? ----------------------------------------------------------------------------------------


def find(documents: Documents, name: str) -> Row:
    """The document of a number, an id, SOURCE/ID, or the end of an id that only one document has. DataError."""
    for condition in _conditions(documents, name):
        found = list(islice(documents.rows(condition), SHOWN + 1))
        exact = [row for row in found if name in (row["id"], f"{row['source']}/{row['id']}", str(row["number"]))]
        if len(found := exact or found) == 1:
            return found[0]
        if found:
            raise _several(documents, f"--document {name}", found)
    raise DataError(
        f"{documents.folder}: no document {name!r} was read; give a number, an id as FILE:LINE, the end of an id, or "
        "--text WORDS"
    )


def _conditions(documents: Documents, name: str) -> Iterator[pc.Expression]:
    if name.isdecimal():
        yield pc.field("number") == int(name)
    source, slash, rest = name.partition("/")
    yield pc.field("id").isin([name, rest] if slash and source in documents.funnel["funnel"] else [name])
    yield pc.ends_with(pc.field("id"), name)


def find_text(documents: Documents, words: str) -> Row:
    """The one document that has these words one after the other, in any case and with any white space. DataError."""
    pattern = r"\s+".join(map(re.escape, words.split()))
    condition, found = pc.match_substring_regex(pc.field("text"), pattern, ignore_case=True), []
    if "text" in documents.ledger.schema.names:
        found = list(islice(documents.rows(condition), SHOWN + 1))
    for source in documents.funnel["funnel"] if not found else []:
        texts = _input(documents, source) or ()
        same = (each.id for each in texts if re.search(pattern, normalise(each.text), re.IGNORECASE))
        found += [row for each in islice(same, SHOWN) for row in documents.rows(pc.field("id") == each)
                  if row["source"] == source]  # fmt: skip
    if len(found) == 1:
        return found[0]
    if found:
        raise _several(documents, "--text", found)
    raise DataError(
        f"{documents.folder}: no document has the words {words!r}, of those whose text was kept or can be read again; "
        "give its id, as --document FILE:LINE"
    )


def _several(documents: Documents, what: str, found: list[Row]) -> DataError:
    lines = [f"  {row['source']}/{row['id']}: {_first_line(row.get('text'))}" for row in found[:SHOWN]]
    more = ["  ..."] if len(found) > SHOWN else []
    return DataError("\n".join([f"{documents.folder}: {what} fits several documents; name one:", *lines, *more]))


# --- its text --------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    text: str
    origin: str  # in words, for who reads it


def text_of(documents: Documents, row: Row) -> Found | None:
    """From the ledger, the shards, the document that it equals, or the input."""
    if row.get("text") is not None:
        return Found(row["text"], "as it was kept")
    if row["stage"] == "kept":
        return Found(documents.decoded_at(documents.place(row)), "from its tokens")
    if row["stage"] == "exact" and (same := original(documents, row)) and same["stage"] != "exact":
        if found := text_of(documents, same):
            return Found(found.text, f"that of {same['id']}")
    for each in _input(documents, row["source"]) or ():
        if each.id == row["id"]:
            return Found(normalise(each.text), "read again from the input, before rules of lines")
    reasons = documents.funnel["reasons"].get(row["source"], {}).get(row["stage"], {})
    samples = reasons.get(row["reason"], {}).get("samples", [])
    return next((Found(each["text"], "its beginning") for each in samples if each["id"] == row["id"]), None)


def _input(documents: Documents, source: str) -> Iterator[Document] | None:
    """The documents of a source, read again; None where that needs a network, or they are gone."""
    prefix = f"inputs.{source}."
    keys = {key.removeprefix(prefix): value for key, value in documents.settings.items() if key.startswith(prefix)}
    try:
        given = Input(**keys)
        reader, place = locate(given.path, given.format)
        if reader == "hf" or reader == "recipe" and not recipes.stamp(place, DOWNLOADS):
            return None
        return _until_damage(read(given.path, source, given.text_key, format=given.format, pass_over=lambda *_: None))
    except ValueError:  # of an older or newer version, or no such file
        return None


def _until_damage(documents: Iterator[Document]) -> Iterator[Document]:
    try:
        yield from documents
    except DataError:
        return


def original(documents: Documents, row: Row) -> Row | None:
    """The document that stayed in place of a copy."""
    if row["of"] is not None:
        return next(documents.rows(pc.field("number") == row["of"]), None)
    same = (pc.field("key") == row["key"]) & (pc.field("stage") != "exact")
    return next((other for other in documents.rows(same) if other["number"] is not None), None)


# --- the decisions ---------------------------------------------------------------------------------------------------


def explain(documents: Documents, row: Row) -> str:
    """Everything that is known of a document."""
    found = text_of(documents, row)
    number = "" if row["number"] is None else f"document {row['number']}, "
    sections = {
        "": [
            f"{row['source']}/{row['id']}",
            f"{number}{row['bytes']:,} bytes, key {row['key']}",
            verdict(documents, row),
        ],
        "rules": _rules(documents, row, found),
        "copies": _copies(documents, row),
        "scores": _scores(documents, row),
        "held-out text": _held_out(documents, row, found),
        "tokens": _tokens(documents, row),
        f"text, {found.origin}" if found else "text": _shown(found),
    }
    blocks = ["\n".join([*([name] if name else []), *(f"  {line}" if name else line for line in lines)])
              for name, lines in sections.items() if lines]  # fmt: skip
    return "\n\n".join(blocks)


def verdict(documents: Documents, row: Row) -> str:
    if row["stage"] == "kept":
        return "kept for training" if row["split"] == "train" else "kept, held out for validation"
    return f"dropped in stage {row['stage']}: {row['reason']}"


def _rules(documents: Documents, row: Row, found: Found | None) -> list[str]:
    """What each rule measured, against its limit."""
    names, thresholds = documents.settings.get("rules") or (), documents.settings.get("rule") or {}
    if not names:
        return ["none were asked for"]
    if row["stage"] == "empty":
        return ["not asked: the document is empty"]
    if not found or found.origin == "its beginning":
        return [f"the text was not kept and cannot be read again; the rule that dropped it: {row['reason']}"
                if row["stage"] == "rules" else "the text was not kept"]  # fmt: skip
    from thriftlab.data.prepare.rules import chosen

    try:
        findings = chosen(names, thresholds).explain(found.text)
    except DataError as error:
        return [f"{error} (a rule of your own: add --plugin FILE.py)"]
    cells = [
        ("passed" if each.passed else "FAILED", each.rule, _number(each.value), _number(each.limit), each.what)
        for each in findings
    ]
    table = _aligned([("", "rule", "value", "limit", "what"), *cells])
    if any(not each.passed for each in findings) and row["stage"] != "rules":
        table.append("rules that failed are only counted: they act on sources with kind=web, and on the text as read")
    return table


def _copies(documents: Documents, row: Row) -> list[str]:
    """What it is a copy of, and what was dropped as a copy of it."""
    if row["stage"] in ("exact", "near"):
        other = original(documents, row)
        if other is None:
            return [f"{row['reason']} of a document that was dropped, too"]
        return [f"{row['reason']} of document {_named(documents, other)}", f"  which was {verdict(documents, other)}"]
    if row["number"] is None:
        return []
    exact = (pc.field("key") == row["key"]) & (pc.field("stage") == "exact")
    near = (pc.field("of") == row["number"]) & (pc.field("stage") == "near")
    lines = []
    for what, condition in (("exact", exact), ("near", near)):
        found = list(islice(documents.rows(condition, BRIEF), SHOWN + 1))
        lines += [f"dropped as {what} duplicate of it: {_named(documents, other)}" for other in found[:SHOWN]]
        lines += ["..."] if len(found) > SHOWN else []
    return lines or ["none"]


def _scores(documents: Documents, row: Row) -> list[str]:
    lines = []
    for name in documents.scores:
        cuts = documents.funnel["histograms"].get(name, {}).get("cuts", {}).get(row["source"], [])
        between = f"   pools are cut at {', '.join(f'{cut:.4g}' for cut in cuts)}" if cuts else ""
        value = "not scored: it was dropped before" if row[name] is None else _number(row[name])
        lines.append(f"{name:8}{value}{between}")
    return lines


def _held_out(documents: Documents, row: Row, found: Found | None) -> list[str]:
    """Whether it is held out and why, and what it has in common with what is."""
    if row["stage"] not in ("kept", "decontaminate"):
        return []
    settings, lines = documents.settings, []
    if found:
        drawn = point(hashlib.sha256(found.text.encode()).digest(), settings["seed"]) / 2**64
        share, least = settings["holdout"], settings["holdout_bytes"]
        if row["split"] != "validation":
            lines.append(f"not held out: its point {drawn:.6f} is not below holdout={share}, nor next in line")
        elif drawn < share:
            lines.append(f"held out: its point {drawn:.6f} is below holdout={share}")
        else:
            lines.append(f"held out: its point {drawn:.6f} is next in line, for holdout_bytes={least}")
    if row["overlap"] is not None:
        limit = settings["near_duplicate"]
        lines.append(f"{row['overlap']:.1%} in common with held-out text; dropped at near_duplicate={limit:.1%}")
    return lines


def _tokens(documents: Documents, row: Row) -> list[str]:
    if row["stage"] != "kept":
        return []
    at = documents.place(row)
    return [f"{row['tokens']:,} in {at.file}, from {at.start:,} to {at.stop:,}; document {at.document} of the file"]


def _shown(found: Found | None) -> list[str]:
    if found is None:
        return ["was not kept, and its input cannot be read again"]
    lines = found.text.splitlines()
    more = [f"... {len(lines) - LINES:,} more lines"] if len(lines) > LINES else []
    return [*(line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..." for line in lines[:LINES]), *more]


def _named(documents: Documents, row: Row) -> str:
    found = text_of(documents, row) if row.get("text") is None and row["stage"] == "kept" else None
    number = "" if row["number"] is None else f"{row['number']}, "
    return f"{number}{row['source']}/{row['id']}: {_first_line(found.text if found else row.get('text'))}"


def _first_line(text: str | None) -> str:
    line = next((line.strip() for line in (text or "").splitlines() if line.strip()), "(text not kept)")
    return textwrap.shorten(line, 70, placeholder=" ...")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
