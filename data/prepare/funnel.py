"""The funnel: documents and bytes after each stage, reasons with samples, histograms; sums over pieces and parts."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from thriftlab.data.prepare.clean import EMPTY, EXACT, Samples, taken_apart
from thriftlab.data.prepare.histograms import EDGES
from thriftlab.data.prepare.ledger import LEAK_REASON, NEAR_REASON
from thriftlab.data.prepare.parts import HELD, LEAKS, NEAR, TRAIN, Parts
from thriftlab.data.prepare.request import PrepareConfig
from thriftlab.data.prepare.scoring import units
from thriftlab.data.prepare.stages import fates


class Funnel:
    """The sums over pieces and parts, in their order."""

    def __init__(self, config: PrepareConfig, parts: Parts) -> None:
        self.names, self.work = list(config.inputs), parts.work
        self.parts = parts
        count = len(self.names)
        self.read = [[0, 0] for _ in range(count)]  # documents, bytes
        self.sums, self.edited = [0] * count, [0] * count  # bytes that line rules took from what stayed
        self.tallies: list[dict[str, list[int]]] = [defaultdict(lambda: [0, 0]) for _ in range(count)]
        self.edits: list[Counter[str]] = [Counter() for _ in range(count)]
        self.samples = [Samples() for _ in range(count)]
        self.columns = units(config)
        names = ["bytes", *(name for name in self.columns if name != "pool")]
        self.histograms = {name: np.zeros((count, len(EDGES[name]) - 1), np.int64) for name in names}
        for facts in self.work.all_facts("clean", self.work.facts("pieces")["count"]):
            self._add_piece(facts["source"], facts)
        for facts in self.work.all_facts("unique", parts.count):
            for s in range(count):
                self._count(s, f"exact/{EXACT}/1", facts["copies"][s], facts["copied_bytes"][s])
        for s, fate in enumerate(fates(parts).tolist()):
            self._count(s, f"near/{NEAR_REASON}/1", *fate[NEAR])
            self._count(s, f"decontaminate/{LEAK_REASON}/1", *fate[LEAKS])
        for facts in self.work.all_facts("ledger", parts.count):
            for s, name in enumerate(self.names):
                for reason, found in facts["samples"][name].items():
                    self.samples[s].merge(reason, found)
            for column, counts in facts["histograms"].items():
                self.histograms[column] += np.array(counts)
        self.text_sums = [f"{each % 2**256:064x}" for each in self.sums]
        self.drops = [self._drops(s) for s in range(count)]

    def _add_piece(self, s: int, facts: dict[str, Any]) -> None:
        self.read[s][0] += facts["documents"]
        self.read[s][1] += facts["bytes"]
        self.sums[s] += int(facts["text_sum"], 16)
        self.edits[s].update(facts["edits"])
        self.edited[s] += facts["edited_bytes"]
        for reason, tally in facts["reasons"].items():
            self._count(s, reason, *tally)
        for reason, found in facts["samples"].items():
            self.samples[s].merge(reason, found)

    def _count(self, s: int, reason: str, documents: int, size: int) -> None:
        if documents:
            self.tallies[s][reason][0] += documents
            self.tallies[s][reason][1] += size

    def _drops(self, s: int) -> dict[str, int]:
        """Documents by reason, of what was dropped; the three that can always happen also where they did not."""
        drops = {EMPTY: 0, EXACT: 0, LEAK_REASON: 0}
        for key, (documents, _) in sorted(self.tallies[s].items()):
            _, reason, acted = taken_apart(key)
            if acted:
                drops[reason] = drops.get(reason, 0) + documents
        return drops

    def facts(self) -> dict[str, Any]:
        kept = fates(self.parts)
        funnel, reasons = {}, {}
        for s, name in enumerate(self.names):
            documents, size = self.read[s]
            stages = [{"stage": "read", "documents": documents, "bytes": size}]
            by_stage: dict[str, dict[str, Any]] = {}
            for key, (count, dropped) in sorted(self.tallies[s].items()):
                stage, reason, acted = taken_apart(key)
                samples = self.samples[s].first.get(f"{stage}/{reason}", [])
                by_stage.setdefault(stage, {})[reason if acted else f"{reason} (counted)"] = {
                    "count": count, "bytes": dropped, "acted": acted,
                    "samples": [{"id": identity, "text": text} for _, identity, text in samples],
                }  # fmt: skip
            for stage in ("empty", "rules", "exact", "near", "decontaminate"):
                gone = [each for each in by_stage.get(stage, {}).values() if each["acted"]]
                documents -= sum(each["count"] for each in gone)
                size -= sum(each["bytes"] for each in gone) + (self.edited[s] if stage == "rules" else 0)
                stages.append({"stage": stage, "documents": documents, "bytes": size})
            for split, fate in (("train", TRAIN), ("validation", HELD)):
                stages.append({"stage": split, "documents": int(kept[s, fate, 0]), "bytes": int(kept[s, fate, 1])})
            funnel[name], reasons[name] = stages, by_stage
        return {
            "funnel": funnel,
            "reasons": reasons,
            "edits": dict(zip(self.names, map(dict, self.edits), strict=True)),
            "histograms": {name: self._histogram(name) for name in self.histograms},
        }

    def _histogram(self, name: str) -> dict[str, Any]:
        cuts: dict[str, list[float]] = {}
        if self.work.is_finished("cuts") and (found := self.work.facts("cuts"))["by"] == name:
            ends = ([end / self.columns[name] for end in each] for each in found["cuts"])
            cuts = dict(zip(self.names, ends, strict=True))
        counts = dict(zip(self.names, self.histograms[name].tolist(), strict=True))
        return {"edges": EDGES[name], "counts": counts, "cuts": cuts}
