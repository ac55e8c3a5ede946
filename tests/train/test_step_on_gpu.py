"""Whole train steps on fake CUDA tensors, at the shapes of llama-1b: the host reads once, late, and copies one batch.

Proved: devices, host reads, copies, collectives, of the trainer and of each method, layer and signal. Not proved: what
DDP's reducer and DeepSpeed's engine do, which fake tensors cannot run.
"""

import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from thriftlab.optim import LAYERS, METHODS
from thriftlab.train.signals import SIGNALS

ROWS, SEQ, WORLD, VOCABULARY = 4, 64, 8, 32000
SIGNAL = {  # settings beside those that are default
    "rho1": {"reference": "-"},
    "doremi": {"reference": "-"},
    "curriculum": {"until": 1.0},
    "extremes": {"w_max": 2.0, "norm": "quantile"},
}
MATRICES = r"\.(attn|mlp)\."


def make_model(layer=None, **options):
    from tests.fake_cuda.counts import to_device
    from thriftlab.optim import convert
    from thriftlab.train.model import GPT, ModelConfig

    with torch.device("meta"):
        model = GPT(ModelConfig(preset="llama-1b", layers=2, vocab_size=VOCABULARY))
        if layer:
            convert(model, LAYERS[layer], [MATRICES], **options)
    return to_device(model)


def make_backend(name, model, optimizer):
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from thriftlab.train.backends.base import Backend
    from thriftlab.train.backends.owned import Owned

    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    backend = object.__new__({"single": Backend, "owned": Owned}[name])
    backend.device = torch.device("cuda", 0)
    if name != "single":
        backend.rank, backend.world = 0, WORLD
    backend.prepare(model, optimizer)
    return backend


def step_twice(backend="single", method="adamw", hyper=None, signal="uniform", statistics="exact", rows=ROWS, **parts):
    """What the second of two steps takes, as the loop takes them: the first one is read when the second is queued."""
    from tests.fake_cuda.counts import Counts
    from thriftlab.data.loader import Batch
    from thriftlab.optim import split_groups
    from thriftlab.train import feed, loop, unread
    from thriftlab.train.objective import Objective

    model = make_model(**parts)
    optimizer = METHODS[method](split_groups(model, include=[MATRICES]), **(hyper or {}))
    import inspect  # TEMPORARY

    if "applied" not in inspect.signature(METHODS[method].step).parameters:
        optimizer.step = lambda applied=None: type(optimizer).step(optimizer)
    backend = make_backend(backend, model, optimizer)
    options = SIGNAL.get(signal, {})
    look_up = (lambda batch: torch.zeros(ROWS, SEQ)) if "reference" in options else None
    objective = Objective(
        SIGNALS[signal](**options), ["a", "b"], statistics, delimiter=0, reference=look_up, device=backend.device
    )
    told = []
    run = SimpleNamespace(
        config=SimpleNamespace(
            seed=0,
            train=SimpleNamespace(
                micro_batch_size=rows,
                batch_size=ROWS * backend.world,
                precision="bf16",
                clip=1.0,
                dropout=0.1,
                max_skipped_steps=9,
            ),
            data=SimpleNamespace(sequence_length=SEQ),
            log=SimpleNamespace(every=1),
        ),
        backend=backend,
        model=model,
        optimizer=optimizer,
        objective=objective,
        mask_delimiter=None,
        chief=True,
    )
    with Counts() as counts, mock.patch("torch.cuda.is_initialized", lambda: True):
        log = SimpleNamespace(step=lambda result, lr, seconds: told.append(result))
        counters = unread.Counters()
        waiting = unread.Unread(run, counters, log)
        seen = []
        for step in range(2):
            batch = Batch(torch.randint(VOCABULARY, (ROWS, SEQ + 1)), torch.zeros(ROWS), torch.arange(ROWS))
            batch = feed.pack(batch, look_up)
            counts.counted = type(counts.counted)(*(type(c)() for c in counts.counted))
            halt, seconds = loop.agree(backend, False, counters.seconds, waiting.asked or [0.0, 0.0])
            loop.seed_step(run, step)
            loop.aim(run, step, 0.5, loop.asks(backend, halt, seconds))
            numbers = loop.one_step(run, batch)
            seen.append(counts.counted.reads.total())
            waiting.add(numbers, 1.0, time.perf_counter())
    return counts.counted, seen[-1], told


def hold(found, collectives=False):
    counted, before, told = found
    assert before == 0, counted.reads
    assert counted.reads == {"synchronize": 1}, counted.reads
    assert counted.to_host.total() == 1, counted.to_host
    assert counted.to_device.total() == 1, counted.to_device
    assert not any(waits for _, waits in [*counted.to_host, *counted.to_device])
    assert bool(counted.collectives) == collectives
    assert {device for _, device, _ in counted.collectives} <= {"cuda"}, counted.collectives
    assert len(told) == 1


@pytest.mark.parametrize("backend", ["single", "owned"])
def test_methods(fake_cuda, backend):
    hold(fake_cuda(step_twice, backend), backend == "owned")
