"""A small prepared data set and a small run, for tests of the trainer."""

from pathlib import Path

from thriftlab.data.corpora.synthetic import generate
from thriftlab.data.shards import token_dtype, write_manifest, write_shards, write_tokenizer
from thriftlab.data.tokens import encode_document, load_tokenizer
from thriftlab.train.config.schema import RunConfig


def prepare_tiny(folder: Path) -> Path:
    """Two sources of made-up text in bytes, about 60 kB to train on and 6 kB held out."""
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer("bytes")
    sources = {}
    for domain, name in enumerate(("plain", "noisy")):
        splits = {}
        for split, documents in (("train", 20), ("validation", 2)):
            texts = generate(documents=documents, noise=0.1 * domain, domain=domain, seed=len(split))
            encoded = (encode_document(tokenizer, text) for text in texts)
            splits[split] = write_shards(folder, name, split, encoded, token_dtype(tokenizer.vocab_size))
        sources[name] = {**splits, "licence": "none", "provenance": {"reader": "synthetic"}}
    write_manifest(
        folder,
        {
            "format": 1,
            "tokenizer": write_tokenizer(folder, tokenizer),
            "dtype": token_dtype(tokenizer.vocab_size),
            "sources": sources,
            "prepare": {},
            "drops": {},
        },
    )
    return folder


def tiny_config(data: Path, out: Path, /, **sections) -> RunConfig:
    """Eight steps of a two-layer model; sections are merged one level deep."""
    base = {
        "out": str(out),
        "data": {"path": str(data), "sequence_length": 32},
        "model": {"preset": None, "dim": 32, "layers": 2, "heads": 2, "hidden": 48, "tied": True},
        "train": {"batch_size": 8, "threads": 1},
        "budget": {"tokens": 8 * 8 * 32},
        "log": {"every": 1, "progress": False},
        "checkpoint": {"every": 2, "keep": 2},
        "eval": {"tokens": 1000},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return RunConfig.model_validate(base)
