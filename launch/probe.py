"""A run that is built to be measured: real parts, of made-up text, stepped one at a time.

`thriftlab bench step` and `thriftlab check gpu` time what `thriftlab train` does, and no copy of it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from thriftlab.data.corpora.synthetic import generate
from thriftlab.data.loader import Batch, batches
from thriftlab.data.manifest import write_manifest
from thriftlab.data.shards import token_dtype, write_shards, write_tokenizer
from thriftlab.data.tokens import encode_document, load_tokenizer
from thriftlab.train.backends import make_backend
from thriftlab.train.build import Run, build
from thriftlab.train.config.parse import Settings, validate
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.feed import Packed, pack
from thriftlab.train.late import Numbers, send
from thriftlab.train.loop import one_step
from thriftlab.train.micro_batch import named_shortage
from thriftlab.train.step import result_of


def made_up_text(folder: Path, documents: int) -> Path:
    """A data set of so many documents of some 1,200 bytes each, and a tenth as many held out, in tokens of one byte."""
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer("bytes")
    dtype = token_dtype(tokenizer.vocab_size)
    splits = {}
    for seed, (split, size) in enumerate({"train": documents, "validation": 1 + documents // 10}.items()):
        encoded = (encode_document(tokenizer, text) for text in generate(documents=size, seed=seed))
        splits[split] = write_shards(folder, "made_up", split, encoded, dtype)
    source = {**splits, "licence": "none", "provenance": {"reader": "synthetic"}}
    made = {"tokenizer": write_tokenizer(folder, tokenizer), "dtype": dtype, "sources": {"made_up": source}}
    write_manifest(folder, {**made, "prepare": {}, "drops": {}})
    return folder


def configured(*sections: Mapping[str, Any]) -> RunConfig:
    """The configuration that these trees of keys give together; later ones win, key by key."""
    settings = Settings()
    for tree in sections:
        for key, value in tree.items():
            settings.put((key,), value, "measurement")
    return validate(RunConfig, settings)


@contextmanager
def opened(config: RunConfig) -> Iterator[Run]:
    """The parts of a run in one process. UserError where the body needs more memory than the GPU has."""
    backend = make_backend(config.backend.name, config.backend.device, **config.backend.options())
    try:
        with named_shortage(config):
            yield build(config, backend)
    finally:
        backend.close()


def batches_of(run: Run) -> Callable[[int], Batch | Packed]:
    """The batch of a step, on its way as in a run."""
    backend, ready = run.backend, partial(pack, look_up=run.objective.reference)
    return batches(run.plan, backend.rank, backend.world, backend.device, ready)


def stepper(run: Run) -> Callable[[], Numbers]:
    """A function that takes the next step of the run each time it is called, and on a GPU does not wait for it."""
    batch, numbers = batches_of(run), count()
    return lambda: one_step(run, batch(next(numbers)))


def loss_of(run: Run, numbers: Numbers) -> float:
    """Of one step, when it is done."""
    return result_of(run.backend, send(numbers)()).loss
