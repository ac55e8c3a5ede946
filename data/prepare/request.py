"""What a preparation is asked to make: its settings, and how a finished folder is known to answer them.

The surprise: inputs are compared by the names, sizes and times of their files, because hashing a corpus takes as long
as reading it; input that has gone since makes no difference, so that a prepared folder outlives its corpus.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from thriftlab.data.corpora import embedded, recipes
from thriftlab.data.corpora.folders import Format, files, formats
from thriftlab.data.corpora.packages import DOWNLOADS
from thriftlab.data.corpora.readers import locate
from thriftlab.data.paths import Expanded, FilePath, expanded
from thriftlab.data.plugins import load_plugin, plugin_sha256
from thriftlab.data.prepare.near import banding
from thriftlab.data.prepare.rules import chosen
from thriftlab.data.shards import SHARD_TOKENS
from thriftlab.data.tokens import load_tokenizer

PrepareRequest = dict[str, dict[str, Any]]


def _expand_place(path: Any) -> Any:
    """As in paths.py; what stands behind hf: may be a folder, too."""
    if isinstance(path, str) and path.startswith("hf:"):
        return f"hf:{expanded(path.removeprefix('hf:'))}"
    return expanded(path) if isinstance(path, str) else path


def split_commas(value: Any) -> Any:
    """A list that was written as `a,b`; anything else as it is. For a pydantic BeforeValidator."""
    return value.split(",") if isinstance(value, str) else value


class Input(BaseModel):
    """Where one source comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, BeforeValidator(_expand_place)] = Field(
        description="file, folder, hf:NAME[:CONFIG[:SPLIT]], embedded[:PART], synthetic[:KEY=VALUE,...], "
        "periodic[:KEY=VALUE,...], recipe:NAME:DOMAIN"
    )
    text_key: str = Field("text", description="key or column that holds the text, of jsonl, parquet and Hugging Face")
    streaming: bool = Field(True, description="read a Hugging Face dataset while it downloads")
    licence: str = Field("unknown", description="licence of the text, kept in the manifest")
    format: Format | None = Field(
        None,
        description="what the files are read as, whatever their names say; each by its suffix unless given",
    )
    kind: Literal["text", "web"] = Field(
        "text", description="web: the rules drop lines and documents; text: what they would drop is only counted"
    )


class Near(BaseModel):
    """Near-duplicates: MinHash of word 5-grams and banding (near.py). Off unless a key is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bands: str | None = Field(None, description="bands x rows of the signature, as 14x8 (FineWeb's)")
    threshold: float | None = Field(
        None, gt=0, lt=1, description="chooses the bands that find half of the pairs of this Jaccard similarity"
    )

    @model_validator(mode="after")
    def _one(self) -> "Near":
        if self.bands and self.threshold:
            raise ValueError("give bands or threshold, not both: a threshold chooses the bands")
        return self

    @property
    def is_on(self) -> bool:
        return bool(self.bands or self.threshold)


class Quality(BaseModel):
    """A classifier trained on sources that are good and sources that are not (scores/classifier.py): column `score`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    positive: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = Field(
        (), description="sources of good text, as essays,speeches"
    )
    negative: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = Field((), description="sources of bad text")

    @model_validator(mode="after")
    def _both(self) -> "Quality":
        if bool(self.positive) != bool(self.negative) or set(self.positive) & set(self.negative):
            raise ValueError("a classifier needs positive and negative sources, and none that is both")
        return self


class Perplexity(BaseModel):
    """Nats per token under a model of text: columns `trigram` and `model`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = Field(
        (), description="sources that a trigram model is trained on (scores/trigram.py): column `trigram`"
    )
    run: FilePath | None = Field(None, description="folder of a finished run, whose model scores: column `model`")


class Pools(BaseModel):
    """Quantile pools by a score: column `pool`, 0 the lowest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["score", "trigram", "model"] | None = Field(None, description="the column that is cut into pools")
    count: int = Field(4, ge=2, le=100, description="number of pools of equally many documents")
    within: Literal["source", "all"] = Field("source", description="cut each source by itself, or all together")


def run_plugin(path: str) -> str:
    load_plugin(path)
    return path


def _embedded() -> dict[str, Input]:
    return {part: Input(path=f"embedded:{part}", licence=embedded.LICENCE) for part in embedded.PARTS}


class PrepareConfig(BaseModel):
    """One prepared data set, completely."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str | None = Field(
        None,
        description="real text of many domains, from public packages: medium. Its inputs come beside those given, and "
        f"out=prepared/medium and tokenizer={recipes.TOKENIZER} unless given",
    )
    leave_out: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = Field(
        (), description="domains of the recipe to do without, as javadoc,spam"
    )
    downloads: Annotated[Path, Expanded] = Field(
        DOWNLOADS, description="where packages of a recipe are kept, and looked for first"
    )
    out: Annotated[Path, Expanded] = Field(Path("prepared/embedded"), description="folder to make")
    inputs: dict[str, Input] = Field(
        default_factory=_embedded, min_length=1, description="sources by name; the embedded corpus unless given"
    )
    tokenizer: FilePath = Field(
        "bytes", description="bytes, gpt2, bpe:VOCABULARY (trained on the training text) or a tokenizer.json"
    )
    holdout: float = Field(0.05, gt=0, lt=0.5, description="share of the documents held out for validation")
    holdout_bytes: int = Field(
        50_000, ge=0, description="bytes to hold out of every source at least, up to a fifth of the source"
    )
    near_duplicate: float = Field(
        0.5, gt=0, le=1, description="share of 8-word shingles in common with held-out text that bars from training"
    )
    rules: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = Field(
        (), description="rules of web text: gopher, c4, fineweb, refinedweb, or single ones (docs/rules.md)"
    )
    rule: dict[str, dict[str, float]] = Field({}, description="thresholds of rules, as rule.gopher-words.least=40")
    near: Near = Near()
    quality: Quality = Quality()
    perplexity: Perplexity = Perplexity()
    pools: Pools = Pools()
    shard_tokens: int = Field(SHARD_TOKENS, ge=1, description="most tokens in a file")
    seed: int = Field(0, ge=0, lt=2**63, description="another seed holds out other documents")
    keep_text: bool = Field(True, description="keep the text of documents, for `thriftlab data show` and `export`")
    force: bool = Field(False, description="replace what was prepared in `out` before")
    engine: Literal["here", "processes", "ray"] = Field(
        "processes", description="who does the work: this process, processes of this machine, or a cluster of Ray"
    )
    workers: int | None = Field(None, ge=1, description="processes; as many as there are usable cores unless given")
    piece_bytes: int = Field(
        2**26, ge=2**10, description="bytes of text that a task reads or holds; its memory is some times that"
    )
    plugins: tuple[Annotated[FilePath, AfterValidator(run_plugin)], ...] = Field(
        (), description="Python files with rules of your own; --plugin FILE.py is the same"
    )

    @model_validator(mode="after")
    def _known(self) -> "PrepareConfig":
        """Refuses rules, sources and columns that there are not, before anything is read."""
        chosen(self.rules, self.rule)
        banding(self.near.bands, self.near.threshold)
        for key, names in (
            ("quality.positive", self.quality.positive),
            ("quality.negative", self.quality.negative),
            ("perplexity.on", self.perplexity.on),
        ):
            if unknown := [name for name in names if name not in self.inputs]:
                raise ValueError(f"{key}: no input {unknown[0]!r}; there is {', '.join(self.inputs)}")
        asked = {"score": self.quality.positive, "trigram": self.perplexity.on, "model": self.perplexity.run}
        if self.pools.by is not None and not asked[self.pools.by]:
            needed = {
                "score": "quality.positive and quality.negative",
                "trigram": "perplexity.on",
                "model": "perplexity.run",
            }
            raise ValueError(f"pools.by={self.pools.by}: there is no such column; set {needed[self.pools.by]}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Beside what is given, what a recipe sets."""
        leave_out = split_commas(given.get("leave_out", ()))
        if given.get("recipe") is None:
            if leave_out:
                raise ValueError("leave_out is for the domains of a recipe, and there is none")
            return given
        settings = recipes.settings(given["recipe"], leave_out)
        if isinstance(inputs := given.get("inputs", {}), dict):
            given = given | {"inputs": settings["inputs"] | inputs}
        return settings | given

    @field_validator("inputs")
    @classmethod
    def _names(cls, inputs: dict[str, Input]) -> dict[str, Input]:
        for name in inputs:
            if not name.replace("-", "_").isidentifier():
                raise ValueError(f"source {name!r} names a folder: use letters, digits, _ and -, a letter first")
        return inputs

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer(cls, name: str) -> str:
        kind, _, size = name.partition(":")
        trained = kind == "bpe" and size.isdecimal() and int(size) >= 257
        if trained or name in ("bytes", "gpt2") or name.endswith(".json"):
            return name
        raise ValueError(f"{name!r} is none of bytes, gpt2, bpe:VOCABULARY (257 or more), path of a tokenizer.json")


class About(Protocol):
    def about(self) -> dict[str, Any]: ...


def request_of(config: PrepareConfig, model: About | None = None) -> PrepareRequest:
    """{"settings": all that the result depends on, "content": what is known of the inputs without reading them}."""
    content = _content(config)
    if model:
        content["the model of perplexity.run"] = json.dumps(model.about(), sort_keys=True)
    return {"settings": _settings(config), "content": content}


def difference(made: PrepareRequest | None, asked: PrepareRequest) -> str | None:
    """How what was made differs from what is asked for, in words."""
    if made is None:
        return "by other means than this command"
    for key in sorted(made["settings"].keys() | asked["settings"].keys()):
        was, now = made["settings"].get(key), asked["settings"].get(key)
        if was != now:
            return f"with {key} = {was} and is asked for with {now}"
    for name, now in asked["content"].items():
        was = made["content"].get(name)
        if now is not None and was != now:
            return f"when {name} was another ({was}, now {now})"
    return None


EVERYWHERE = ("holdout", "holdout_bytes", "near_duplicate", "shard_tokens", "seed")  # in every manifest
SINCE = ("rules", "rule", "near", "quality", "perplexity", "pools", "keep_text")  # left out where they are the default


def settings_of_result(config: PrepareConfig) -> dict[str, Any]:
    """What decides which tokens lie in the folder, without the inputs, the tokenizer, and where a run lies."""
    since = {key: value for key, value in _since(config).items() if key != "keep_text"}
    since.get("perplexity", {}).pop("run", None)
    return config.model_dump(mode="json", include=set(EVERYWHERE)) | since


def _since(config: PrepareConfig) -> dict[str, Any]:
    """The settings that older folders do not have, so that those stay what they are."""
    return config.model_dump(mode="json", include=set(SINCE), exclude_defaults=True)


def _settings(config: PrepareConfig) -> dict[str, Any]:
    settings = config.model_dump(mode="json", include={*EVERYWHERE, "tokenizer"}) | _since(config)
    if config.plugins:
        settings["plugin_sha256"] = [plugin_sha256(path) for path in config.plugins]
    for name, source in config.inputs.items():
        given = source.model_dump(exclude_none=True)
        if source.kind == "text":
            del given["kind"]
        settings |= {f"inputs.{name}.{key}": value for key, value in given.items()}
    return settings


def _content(config: PrepareConfig) -> dict[str, str | None]:
    """What can be known of the inputs without reading them; None where that is nothing."""
    content = {name: _stamp(source, config.downloads) for name, source in config.inputs.items()}
    if not config.tokenizer.startswith("bpe:"):
        content["the tokenizer"] = load_tokenizer(config.tokenizer).sha256
    return content


def _stamp(source: Input, downloads: Path) -> str | None:
    """Names, sizes and times of files; of a recipe, names; of the embedded corpus, the Python."""
    reader, place = locate(source.path, source.format)
    if reader == "recipe":
        return recipes.stamp(place, downloads)
    if reader == "embedded":
        return f"Python {platform.python_version()}"
    path = Path(place.split(":")[0] if reader == "hf" else place)
    if reader in ("synthetic", "periodic") or not path.exists():
        return None
    found = [file for file, _ in formats(path, source.format)] if reader == "files" else files(path)
    listing = [(file.relative_to(path).as_posix(), file.stat()) for file in found]
    text = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in listing)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
