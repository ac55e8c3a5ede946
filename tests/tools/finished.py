"""A finished prepared folder made by hand from rows: shards, scores, ledger, funnel, manifest, as docs/folders.md says.

Written from that description and not with the code of the pipeline, so that what reads such folders is tested alone.
"""

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from thriftlab.data.manifest import file_sha256
from thriftlab.data.shards import token_dtype, write_manifest, write_shards, write_tokenizer
from thriftlab.data.tokens import encode_document, load_tokenizer

UNITS = {"score": 65536, "trigram": 65536, "pool": 1}
UNNUMBERED = ("empty", "rules", "exact")
STAGES = ("read", "empty", "rules", "exact", "near", "decontaminate")
SETTINGS = {
    "tokenizer": "bytes", "holdout": 0.05, "holdout_bytes": 0, "near_duplicate": 0.5, "seed": 0, "keep_text": True,
    "rules": [], "rule": {},
}  # fmt: skip


def document(source, id, text, stage="kept", reason=None, split=None, **more):
    """A row for `finish`; of: the id of the document that stayed."""
    split = split or ("train" if stage == "kept" else None)
    return {"source": source, "id": id, "text": text, "stage": stage, "reason": reason, "split": split, **more}


def finish(folder, rows, parts=3, keep_text=True, shard_tokens=2**20, units=UNITS, settings=SETTINGS, tokenizer=None):
    """Writes the folder; returns its rows in the order of the ledger, with key and number."""
    folder, tokenizer = Path(folder), tokenizer or load_tokenizer("bytes")
    sources = list(dict.fromkeys(row["source"] for row in rows))
    for row in rows:
        row["key"] = hashlib.sha256(row["text"].encode()).hexdigest()[:32]
        row["rank"], row["bytes"] = sources.index(row["source"]), len(row["text"].encode())
        row["tokens"] = row["bytes"] + 1 if row["stage"] == "kept" and tokenizer.name == "bytes" else None
        row["part"] = int(row["key"][:8], 16) * parts >> 32
        if row["stage"] == "kept" and tokenizer.name != "bytes":
            row["tokens"] = len(tokenizer.encode(row["text"])) + 1
    rows.sort(key=lambda row: (row["rank"], row["key"], row["id"]))
    numbered = [row for row in rows if row["stage"] not in UNNUMBERED]
    number = {row["id"]: n for n, row in enumerate(numbered)}
    for row in rows:
        row["number"] = number.get(row["id"]) if row["stage"] not in UNNUMBERED else None
        row["of"] = number[row["of"]] if row.get("of") else None
    documents = write_ledger(folder, rows, parts, keep_text, units)
    documents |= write_funnel(folder, rows, sources, units)
    entries = {}
    for source in sources:
        entries[source] = {"licence": "none"} | ({"columns": dict(units)} if units else {})
        for split in ("train", "validation"):
            mine = [row for row in rows if row["source"] == source and row["split"] == split]
            encoded = [encode_document(tokenizer, row["text"]) for row in mine]
            entry = write_shards(folder, source, split, encoded, token_dtype(tokenizer.vocab_size), shard_tokens)
            first = 0
            for shard in entry["shards"] if units else []:
                of_shard = mine[first : first + shard["documents"]]
                first += shard["documents"]
                scores = [[round(row.get(name, 0) * unit) for name, unit in units.items()] for row in of_shard]
                shard["scores_file"] = shard["file"].replace(".bin", ".scores.npy")
                np.save(folder / shard["scores_file"], np.array(scores, np.int32))
                shard["scores_sha256"] = file_sha256(folder / shard["scores_file"])
            entries[source][split] = entry
    write_manifest(folder, {
        "tokenizer": write_tokenizer(folder, tokenizer), "dtype": token_dtype(tokenizer.vocab_size),
        "sources": entries, "prepare": {}, "drops": {},
        "made": {"request": {"settings": settings, "content": {}}, "documents": documents},
    })  # fmt: skip
    return rows


def write_ledger(folder, rows, parts, keep_text, units):
    (folder / "documents").mkdir(parents=True)
    types = {
        "source": pa.dictionary(pa.int16(), pa.string()), "number": pa.int64(), "id": pa.large_string(),
        "key": pa.string(), "stage": pa.string(), "reason": pa.string(), "split": pa.string(), "bytes": pa.int32(),
        "tokens": pa.int32(), "of": pa.int64(), "overlap": pa.float32(),
        **{name: pa.int16() if name == "pool" else pa.float32() for name in units},
    }  # fmt: skip
    if keep_text:
        types["text"] = pa.large_string()
    written = {}
    for part in range(parts):
        mine = [{**row} for row in rows if row["part"] == part]
        for row in mine:
            row["text"] = None if row["stage"] in UNNUMBERED else row["text"]
        name = f"documents/{part:05}.parquet"
        table = pa.Table.from_pylist([{key: row.get(key) for key in types} for row in mine], pa.schema(types))
        pq.write_table(table, folder / name, row_group_size=40)
        written[name] = file_sha256(folder / name)
    return written


def write_funnel(folder, rows, sources, units):
    funnel, reasons = {}, {}
    for source in sources:
        mine, steps = [row for row in rows if row["source"] == source], []
        for k, stage in enumerate(STAGES):
            left = [row for row in mine if row["stage"] == "kept" or STAGES.index(row["stage"]) > k]
            steps.append({"stage": stage, "documents": len(left), "bytes": sum(row["bytes"] for row in left)})
        for split in ("train", "validation"):
            left = [row for row in mine if row["split"] == split]
            steps.append({"stage": split, "documents": len(left), "bytes": sum(row["bytes"] for row in left)})
        funnel[source] = steps
        stages = defaultdict(lambda: defaultdict(list))
        for row in mine:
            if row["reason"]:
                stages[row["stage"]][row["reason"]].append(row)
        reasons[source] = {
            stage: {
                reason: {
                    "count": len(found), "bytes": sum(row["bytes"] for row in found), "acted": True,
                    "samples": [{"id": row["id"], "text": row["text"][:2000]} for row in found[:20]],
                }
                for reason, found in by_reason.items()
            }
            for stage, by_reason in stages.items()
        }  # fmt: skip
    histograms = {"bytes": histogram(rows, sources, "bytes", [0, *(2**k for k in range(4, 20))], {})}
    for name, most in {"score": 1, "trigram": 10}.items():
        if name in units:
            cuts = dict.fromkeys(sources, [0.25, 0.5, 0.75]) if name == "score" else {}
            histograms[name] = histogram(rows, sources, name, [most * k / 20 for k in range(21)], cuts)
    value = {"funnel": funnel, "reasons": reasons, "histograms": histograms, "edits": {sources[0]: {"c4-braces": 12}}}
    (folder / "documents/funnel.json").write_text(json.dumps(value))
    return {"documents/funnel.json": file_sha256(folder / "documents/funnel.json")}


def histogram(rows, sources, name, edges, cuts):
    found = {source: Counter() for source in sources}
    for row in rows:
        if row.get(name) is not None:
            found[row["source"]][min(max(np.searchsorted(edges, row[name], "right") - 1, 0), len(edges) - 2)] += 1
    counts = {source: [counter[k] for k in range(len(edges) - 1)] for source, counter in found.items()}
    return {"edges": edges, "counts": counts, "cuts": cuts}
