"""A run's steps on fake CUDA tensors, at the shapes of llama-1b: for the process of the fixture `fake_cuda`."""

import time
from types import SimpleNamespace
from unittest import mock

import torch

from thriftlab.optim import LAYERS, METHODS
from thriftlab.train.signals import SIGNALS

ROWS, SEQ, WORLD, VOCABULARY = 4, 64, 8, 32000
MATRICES = r"\.(attn|mlp)\."
OPTIONS = {"galore": {"rank": 512}, "fira": {"rank": 512}, "apollo": {"rank": 512}}


class Trainer:
    """The loop's steps of a run without data, on fake tensors."""

    def __init__(
        self, backend="single", method="adamw", layer=None, mask=None, dropout=0.0, layerwise=False, **options
    ):
        from tests.fake_cuda.counts import to_device
        from thriftlab.optim import convert, split_groups
        from thriftlab.train import unread
        from thriftlab.train.model import GPT, ModelConfig

        with torch.device("meta"):
            model = GPT(ModelConfig(preset="llama-1b", layers=1, vocab_size=VOCABULARY), dropout=dropout)
            if layer:
                convert(model, LAYERS[layer], [MATRICES], **options)
        model, options = to_device(model), {} if layer else options
        optimizer = METHODS[method](split_groups(model, include=[MATRICES]), **options)
        self.backend, self.told = make_backend(backend, model, optimizer), []
        if layerwise:
            self.backend.update_in_backward()
        self.run = SimpleNamespace(
            backend=self.backend, model=model, optimizer=optimizer, mask_delimiter=mask, chief=True
        )
        train = {"batch_size": ROWS * self.backend.world, "precision": "bf16", "clip": 1.0, "max_skipped_steps": 9}
        self.train = SimpleNamespace(dropout=dropout, **train)
        self.run.config = SimpleNamespace(
            seed=0, train=self.train, data=SimpleNamespace(sequence_length=SEQ), log=SimpleNamespace(every=1)
        )
        self.aim_at("uniform")
        log = SimpleNamespace(step=lambda result, lr, seconds: self.told.append(result))
        self.unread = unread.Unread(self.run, unread.Counters(), log)

    def aim_at(self, signal, settings=None, how=None, rows=ROWS):
        from tests.fake_cuda.counts import Counts
        from thriftlab.train.objective import Objective

        settings = settings or {}
        self.look_up = (lambda batch: torch.zeros(ROWS, SEQ)) if "reference" in settings else None
        with Counts():
            rule = SIGNALS[signal](**settings)
            self.run.objective = Objective(
                rule, ["a", "b"], **(how or {}), delimiter=0, reference=self.look_up, device=self.backend.device
            )
        self.run.micro_batch_size = rows

    def step(self):
        """What one step takes; of that, how often the host has waited before the update was queued."""
        from tests.fake_cuda.counts import Counts
        from thriftlab.data.loader import Batch
        from thriftlab.train import feed, loop

        told = len(self.told)
        with Counts() as counts, mock.patch("torch.cuda.is_initialized", lambda: True):
            batch = Batch(torch.randint(VOCABULARY, (ROWS, SEQ + 1)), torch.zeros(ROWS), torch.arange(ROWS))
            batch = feed.pack(batch, self.look_up)  # in a thread, while the step before is computed
            clock, unread = time.perf_counter(), self.unread
            halt, seconds = loop.agree(self.backend, False, unread.counters.seconds, unread.asked or [0.0, 0.0])
            loop.seed_step(self.run, 3)  # at which no signal wants held-out losses
            loop.aim(self.run, 3, 0.5, loop.asks(self.backend, halt, seconds))
            numbers = loop.one_step(self.run, batch)
            before = counts.counted.reads.total()
            unread.add(numbers, 1.0, clock)
        return counts.counted, before, len(self.told) - told


def make_group():
    """This process is rank 0 of several, whom nothing reaches."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
        dist.new_group = lambda **_: "host"


def make_backend(name, model, optimizer):
    from thriftlab.train.backends import BACKENDS

    make_group()
    backend = object.__new__(BACKENDS[name])
    backend.device = torch.device("cuda", 0)
    if name != "single":
        backend.rank, backend.world = 0, WORLD
    backend.prepare(model, optimizer)
    return backend


def second_step(*args, **options):
    trainer = Trainer(*args, **options)
    trainer.step()
    return trainer.step()


def hold(found, owned=False, copies=1):
    """The host waits once, for the numbers of the step before, and copies what belongs to the batch."""
    counted, before, told = found
    assert (before, counted.reads, told) == (0, {"synchronize": 1}, 1)
    assert counted.to_host.total() == 1 and counted.to_device.total() == copies, counted.to_device
    assert not any(waits for _, waits in [*counted.to_host, *counted.to_device])
    assert bool(counted.collectives) == owned
    devices = {device for name, device, dtype in counted.collectives if (name, dtype) != ("all_reduce", "uint8")}
    assert devices <= {"cuda"}, counted.collectives
