"""What all parts together come to: the manifest, and the funnel that a reader of the report looks at."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from thriftlab.data.corpora.readers import locate
from thriftlab.data.errors import DataError
from thriftlab.data.files import write_json
from thriftlab.data.manifest import file_sha256, write_manifest
from thriftlab.data.prepare.clean import EMPTY, EXACT, Samples
from thriftlab.data.prepare.histograms import EDGES
from thriftlab.data.prepare.ledger import LEAK_REASON, NEAR_REASON
from thriftlab.data.prepare.parts import HELD, LEAKS, NEAR, TRAIN, Parts
from thriftlab.data.prepare.report import write_report
from thriftlab.data.prepare.request import PrepareConfig, settings_of_result
from thriftlab.data.prepare.scoring import units
from thriftlab.data.prepare.stages import fates
from thriftlab.data.shards import token_dtype, write_tokenizer
from thriftlab.data.tokens import Tokenizer


def check_sources(config: PrepareConfig, parts: Parts) -> list[str]:
    """A line for each part that this Python came without; DataError where nothing is left of a source."""
    notes = []
    left = parts.starts[:, -1] - parts.starts[:, 0]
    for s, (name, source) in enumerate(config.inputs.items()):
        if left[s]:
            continue
        if locate(source.path)[0] != "embedded":
            by_rules = ", or dropped by a rule" if config.rules and source.kind == "web" else ""
            raise DataError(
                f"inputs.{name}: in {source.path} every text is empty or a copy of an earlier one{by_rules}"
            )
        notes.append(f"{name}: absent, this Python came without {source.path}")
    if not left.any():
        raise DataError("this Python came without its documentation; name a text of your own: inputs.NAME.path=FILE")
    if config.rules and not any(source.kind == "web" for source in config.inputs.values()):
        notes.append("rules were counted and dropped nothing: no input has kind=web")
    return notes


def write_result(
    config: PrepareConfig, parts: Parts, tokenizer: Tokenizer, entries: dict[str, Any], made: dict[str, Any]
) -> None:
    """The manifest, last of all files, and what lies beside the shards."""
    out, funnel = parts.work.out, Funnel(config, parts)
    write_json(out / "documents" / "funnel.json", funnel.facts())
    files = sorted(file for file in (out / "documents").iterdir() if not file.name.startswith("."))
    sources = {}
    for s, (name, source) in enumerate(config.inputs.items()):
        if not entries[name]["train"]["shards"]:
            continue
        text = {"reader": locate(source.path)[0], "text_sha256": funnel.text_sums[s]}
        columns = {"columns": units(config)} if units(config) else {}
        sources[name] = (
            entries[name] | columns | {"licence": source.licence, "provenance": text, "drops": funnel.drops[s]}
        )
    listed = {file.relative_to(out).as_posix(): file_sha256(file) for file in files}
    manifest = {
        "tokenizer": write_tokenizer(out, tokenizer),
        "dtype": token_dtype(tokenizer.vocab_size),
        "sources": sources,
        "prepare": settings_of_result(config),
        "drops": {
            reason: sum(each.get(reason, 0) for each in funnel.drops)
            for reason in dict.fromkeys(reason for each in funnel.drops for reason in each)
        },
    }
    name = write_manifest(out, manifest | {"made": made | {"documents": listed}})[:16]
    write_report(out, f"data {name}")  # which reads the manifest, and is then in it
    listed["report.html"] = file_sha256(out / "report.html")
    write_manifest(out, manifest | {"made": made | {"documents": listed}})


class Funnel:
    """The sums over pieces and parts, in their order."""

    def __init__(self, config: PrepareConfig, parts: Parts) -> None:
        self.names, self.work = list(config.inputs), parts.work
        self.parts = parts
        count = len(self.names)
        self.read = [[0, 0] for _ in range(count)]  # documents, bytes
        self.sums = [0] * count
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
            _, reason, acted = key.split("/")
            if acted == "1":
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
                stage, reason, acted = key.split("/")
                samples = self.samples[s].first.get(f"{stage}/{reason}", [])
                by_stage.setdefault(stage, {})[reason + ("" if acted == "1" else " (counted)")] = {
                    "count": count, "bytes": dropped, "acted": acted == "1",
                    "samples": [{"id": identity, "text": text} for _, identity, text in samples],
                }  # fmt: skip
            for stage in ("empty", "rules", "exact", "near", "decontaminate"):
                gone = [each for each in by_stage.get(stage, {}).values() if each["acted"]]
                documents -= sum(each["count"] for each in gone)
                size -= sum(each["bytes"] for each in gone)
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
