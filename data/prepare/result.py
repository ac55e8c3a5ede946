"""What all parts together come to: the manifest, and the funnel that a reader of the report looks at."""

from typing import Any

from thriftlab.data.corpora.readers import locate
from thriftlab.data.errors import DataError
from thriftlab.data.files import write_json
from thriftlab.data.manifest import file_sha256, write_manifest
from thriftlab.data.prepare.funnel import Funnel
from thriftlab.data.prepare.parts import Parts
from thriftlab.data.prepare.report.page import write_report
from thriftlab.data.prepare.request import PrepareConfig, settings_of_result
from thriftlab.data.prepare.scoring import units
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
