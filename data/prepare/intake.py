"""What is read, found out before it is read: pieces for the tasks, files that are passed over, how many parts.

All of it follows from the sizes of the input, never from the machine.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from thriftlab.data.corpora.folders import PassOver, files
from thriftlab.data.corpora.readers import all_empty, locate
from thriftlab.data.files import printable
from thriftlab.data.prepare.engines.base import Engine
from thriftlab.data.prepare.pieces import PACKED, Unit, is_landed, land, landed, pieces, units, write_piece
from thriftlab.data.prepare.request import PrepareConfig
from thriftlab.data.prepare.work import Work

Passed = dict[str, dict[str, Any]]  # reason -> how many files, and the names of the first
SMALL = 2**23  # bytes, for which a process is not worth its start


def is_small(config: PrepareConfig) -> bool:
    """Whether this process alone is the quickest."""
    size = 0
    for source in config.inputs.values():
        reader, place = locate(source.path, source.format)
        if reader in ("hf", "recipe"):
            return False
        if reader == "files" and Path(place).exists():
            size += PACKED * sum(file.stat().st_size for file in files(place))
    return size < SMALL


def cut(config: PrepareConfig, work: Work, engine: Engine) -> dict[str, Passed]:
    """Leaves the pieces of the input and their number; returns what was passed over, by source."""
    passed: dict[str, Passed] = {name: {} for name in config.inputs}
    found: list[list[Unit | None]] = []  # by source; None: to be landed as a whole
    for name, source in config.inputs.items():
        reader, _ = locate(source.path, source.format)
        found.append(
            list(units(source, config.piece_bytes, tally(passed[name]), engine)) if reader == "files" else [None]
        )
    items = [
        (s, name, unit)
        for s, name in enumerate(config.inputs)
        for unit in found[s]
        if unit is None or is_landed(unit, config.piece_bytes)
    ]
    numbered = [(number, name, unit) for number, (_, name, unit) in enumerate(items)]
    engine.each(partial(land, work, config), [i for i in numbered if not work.is_finished(f"land/{i[0]:05}")], "land")
    ready: list[list[Unit]] = [[] for _ in found]
    number = 0
    for s, name in enumerate(config.inputs):
        for unit in found[s]:
            if unit is not None and not is_landed(unit, config.piece_bytes):
                ready[s].append(unit)
                continue
            more, told = landed(work, number)
            number += 1
            ready[s] += more
            if unit is not None and not more:
                ready[s].append(unit._replace(size=0))  # its task says that it is empty
            for which, reason in told:
                tally(passed[name])(which, reason)
    _finish(work, ready, config.piece_bytes)
    return passed


def _finish(work: Work, ready: Sequence[Sequence[Unit]], piece_bytes: int) -> None:
    if work.is_finished("pieces"):
        return
    cut_up = [piece for s, found in enumerate(ready) for piece in pieces(s, found, piece_bytes)]
    for number, piece in enumerate(cut_up):
        write_piece(work, number, piece)
    size = sum(unit.size for _, found in cut_up for unit in found)
    parts = 1
    while size > parts * piece_bytes:
        parts *= 2
    work.finish("pieces", {"count": len(cut_up), "parts": parts})


def tally(passed: Passed) -> PassOver:
    def tell(name: str, reason: str) -> None:
        told = passed.setdefault(printable(reason), {"count": 0, "first": []})
        told["count"] += 1
        if told["count"] <= 3:
            told["first"].append(printable(name))

    return tell


def tell_empty_files(config: PrepareConfig, work: Work, passed: dict[str, Passed]) -> None:
    """Once all is read: files without a document are passed over, but not all of a source."""
    names = list(config.inputs)
    units_of: list[Counter[str]] = [Counter() for _ in names]
    empty_of: list[Counter[str]] = [Counter() for _ in names]
    for number in range(work.facts("pieces")["count"]):
        piece, facts = work.facts(f"pieces/{number:05}"), work.facts(f"clean/{number:05}")
        units_of[piece["source"]].update(unit[1] for unit in piece["units"])
        empty_of[piece["source"]].update(facts["empty_files"])
    for s, name in enumerate(names):
        without = [file for file, count in empty_of[s].items() if count == units_of[s][file]]
        for file in without:
            tally(passed[name])(file, "empty")
        if units_of[s] and len(without) == len(units_of[s]):
            root = Path(config.inputs[name].path)
            raise all_empty(root if root.is_file() else root / without[0], root)
