"""Whole train steps on fake CUDA tensors, at the shapes of llama-1b: the host reads once, late, and copies one batch.

Proved: devices, host reads, copies and collectives of the trainer with each method, layer and signal. Not proved: what
DDP's reducer does, which fake tensors cannot run. Tensors that are cut: test_sharded_on_gpu.py.
"""

import time
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from thriftlab.optim import LAYERS, METHODS
from thriftlab.train.signals import SIGNALS

ROWS, SEQ, WORLD, VOCABULARY = 4, 64, 8, 32000
MATRICES = r"\.(attn|mlp)\."
LOOKED_UP = {"reference": "-"}
WORDS = {"rho1": LOOKED_UP, "doremi": LOOKED_UP, "curriculum": {"until": 1.0}}  # what must be said or would be idle
BESIDE = [  # (signal, its settings, those of the objective, rows of a micro-batch)
    ("linupper", {"unit": "document"}, {"statistics": "lagged"}, 2),
    ("extremes", {"w_max": 2.0, "norm": "quantile"}, {"statistics": "parity"}, 2),
    ("quadratic", {"norm": "mad"}, {"statistics": "rank"}, 2),
    ("curriculum", {"until": 1.0, **LOOKED_UP}, {}, ROWS),
    ("focal", {"detached": True}, {"shuffle": True}, 2),
]
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


def steps_of_signals(backend):
    trainer = Trainer(backend)
    trainer.step()
    found = {}
    for signal in SIGNALS:
        trainer.aim_at(signal, WORDS.get(signal))
        found[signal] = trainer.step()
    for case in BESIDE:
        trainer.aim_at(*case)
        found[str(case)] = trainer.step()
    assert all(result.weights for result in trainer.told[-len(BESIDE) + 1 :])
    return found


def hold(found, owned=False, copies=1):
    """The host waits once, for the numbers of the step before, and copies what belongs to the batch."""
    counted, before, told = found
    assert (before, counted.reads, told) == (0, {"synchronize": 1}, 1)
    assert counted.to_host.total() == 1 and counted.to_device.total() == copies, counted.to_device
    assert not any(waits for _, waits in [*counted.to_host, *counted.to_device])
    assert bool(counted.collectives) == owned
    devices = {device for name, device, dtype in counted.collectives if (name, dtype) != ("all_reduce", "uint8")}
    assert devices <= {"cuda"}, counted.collectives


def test_layerwise_updates(fake_cuda):
    hold(fake_cuda(partial(second_step, layerwise=True)))


@pytest.mark.parametrize("backend", ["single", "owned"])
@pytest.mark.parametrize("method", METHODS)
def test_methods(fake_cuda, method, backend):
    hold(fake_cuda(partial(second_step, backend, method, **OPTIONS.get(method, {}))), backend == "owned")


@pytest.mark.parametrize("layer", sorted(LAYERS.keys() - {"dense"}))
def test_layers(fake_cuda, layer):
    hold(fake_cuda(partial(second_step, layer=layer)))


def test_dropout_and_document_mask(fake_cuda):
    hold(fake_cuda(partial(second_step, dropout=0.1, mask=0)))


def test_signals(fake_cuda):
    """The order of the shuffled control is a second copy."""
    for case, found in fake_cuda(steps_of_signals, "owned").items():
        hold(found, owned=True, copies=1 + ("shuffle" in case))


# ------------------------------------------------------------------------------------------- what is not in each step


class Zeros:
    """Windows of one token."""

    sequence_length = SEQ

    def __len__(self):
        return 5

    def __getitem__(self, rows):
        return np.zeros((len(rows), SEQ + 1), np.uint16)

    def tail(self):
        return np.zeros(9, np.uint16)


def evaluation():
    from tests.fake_cuda.counts import Counts
    from thriftlab.train import evaluate as module
    from thriftlab.train.evaluate import evaluate

    backend = Trainer().backend
    module.read_ahead = lambda read, items, device: map(read, items)  # a thread would have no fake tensors
    tokenizer = SimpleNamespace(token_bytes=np.ones(VOCABULARY, np.int64))
    dataset = SimpleNamespace(sources=["a", "b"], tokenizer=tokenizer, windows=lambda *_: Zeros())
    with Counts() as counts, mock.patch("torch.cuda.is_initialized", lambda: True):
        evaluate(backend, dataset, SEQ, 2, "bf16", mask_delimiter=0, pool=Zeros())
    return counts.counted


def test_an_evaluation_waits_once_at_its_end(fake_cuda):
    """Six windows of each source and five of the pool, two at a time, and the bytes of the vocabulary."""
    counted = fake_cuda(evaluation)
    assert not counted.reads.total() and counted.to_host.total() == 1
    assert counted.to_device.total() == 3 + 3 + 3 + 1 and not any(waits for _, waits in counted.to_device)


def copied():
    from tests.fake_cuda.counts import Counts
    from thriftlab.train.backends.pieces import whole
    from thriftlab.train.checkpoints import writer

    pieces = {f"{i}": whole(torch.empty(3, 4, device="cuda").t()) for i in range(3)}
    with Counts() as counts, mock.patch("torch.cuda.is_initialized", lambda: True):
        with mock.patch("torch.Tensor.data_ptr", lambda tensor: id(tensor)):
            copies = writer._snapshot(pieces)
    return counts.counted, {str(piece.tensor.device) for piece in copies.values()}


def test_a_checkpoint_is_copied_while_training_goes_on(fake_cuda):
    counted, devices = fake_cuda(copied)
    assert devices == {"cpu"} and not counted.reads.total()
    assert counted.to_host.total() == 3 and not any(waits for _, waits in counted.to_host)


def hooked():
    from tests.fake_cuda.counts import Counts
    from thriftlab.train.backends.ddp import sum_gradients

    future = SimpleNamespace(then=lambda use: use(SimpleNamespace(value=lambda: ["summed"])))
    with Counts() as counts, mock.patch("tests.fake_cuda.counts.Done.get_future", lambda _: future, create=True):
        summed = sum_gradients(None, SimpleNamespace(buffer=lambda: torch.empty(3, device="cuda")))
    return counts.counted, summed


def test_the_hook_of_ddp_waits_for_nothing(fake_cuda):
    counted, summed = fake_cuda(hooked)
    assert summed == "summed" and counted.collectives == {("all_reduce", "cuda", "float32"): 1}
    assert not counted.reads.total() and not counted.to_host and not counted.to_device
