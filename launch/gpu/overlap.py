"""python -m thriftlab.launch.gpu.overlap CONFIG OUT: one rank, which times backward alone and with Owned's sums.

Not for people: pair.py starts two of it. On a GPU the seconds lie between two CUDA events.
"""

import json
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from thriftlab.launch.probe import batches_of, opened
from thriftlab.launch.timing import gpu_seconds, wall_seconds
from thriftlab.train.backends.owned import Owned
from thriftlab.train.build import Run
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.feed import arrive
from thriftlab.train.windows import autocast, split_windows

ROUNDS = 5


def overlap(run: Run) -> dict[str, float]:
    """Median seconds of a backward alone, of one with the sums during it, and of one with the sums after it."""
    backend = run.backend
    assert isinstance(backend, Owned)
    tokens = arrive(batches_of(run)(0), backend.device, None).tokens
    inputs, targets = split_windows(tokens)

    def backward(last: bool) -> Callable[[], None]:
        with autocast(backend.device, run.config.train.precision):
            loss = backend.module(inputs, targets, None).sum()

        def call() -> None:
            with backend.micro_batch(last=True) if last else nullcontext():
                loss.backward()

        return call

    def after() -> Callable[[], None]:
        call = backward(last=False)

        def both() -> None:
            call()
            with backend.micro_batch(last=True):
                pass

        return both

    ways = {"alone": lambda: backward(last=False), "during": lambda: backward(last=True), "after": after}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + ROUNDS):  # the first one warms
        for name, way in ways.items():
            call = way()
            backend.share(None)  # both begin at once
            on_gpu = backend.device.type == "cuda"
            seconds[name].append(gpu_seconds(call) if on_gpu else wall_seconds(call, backend.device))
            backend.optimizer.zero_grad(set_to_none=True)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def main(config: str, out: str) -> None:
    with opened(RunConfig.model_validate(json.loads(Path(config).read_text()))) as run:
        found = overlap(run)
        if run.backend.rank == 0:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
