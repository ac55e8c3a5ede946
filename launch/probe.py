"""A run that is built to be measured: real parts, of made-up text, stepped one at a time.

`thriftlab bench step` and `thriftlab check gpu` time what `thriftlab train` does, and no copy of it.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from thriftlab.data.loader import batches
from thriftlab.data.prepare.pipeline import PrepareConfig, prepare
from thriftlab.train.backends import make_backend
from thriftlab.train.build import Run, build
from thriftlab.train.config.parse import Settings, validate
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.loop import one_step
from thriftlab.train.step import StepResult


def made_up_text(folder: Path, documents: int) -> Path:
    """Prepares so many documents of some 1,200 bytes each, in tokens of one byte."""
    source = {"path": f"synthetic:documents={documents}", "licence": "none"}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of seconds
        prepare(PrepareConfig(out=folder, inputs={"made_up": source}, tokenizer="bytes"))
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
    """The parts of a run in one process."""
    backend = make_backend(config.backend.name, config.backend.device, **config.backend.options())
    try:
        yield build(config, backend)
    finally:
        backend.close()


def stepper(run: Run) -> Callable[[], StepResult]:
    """A function that takes the next step of the run each time it is called."""
    batch, numbers = batches(run.plan, run.backend.rank, run.backend.world, run.backend.device), count()
    return lambda: one_step(run, batch(next(numbers)))
