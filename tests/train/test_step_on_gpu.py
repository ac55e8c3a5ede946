"""Whole train steps on fake CUDA tensors, at the shapes of llama-1b: the host reads once, late, and copies one batch.

Proved: devices, host reads, copies and collectives of the trainer with each method, layer and signal. Not proved: what
DDP's reducer does, which fake tensors cannot run. Tensors that are cut: test_sharded_on_gpu.py.
"""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from tests.tools.gpu_steps import OPTIONS, ROWS, SEQ, VOCABULARY, Trainer, hold, second_step
from thriftlab.optim import LAYERS, METHODS
from thriftlab.train.signals import SIGNALS

LOOKED_UP = {"reference": "-"}
WORDS = {"rho1": LOOKED_UP, "doremi": LOOKED_UP, "curriculum": {"until": 1.0}}  # what must be said or would be idle
BESIDE = [  # (signal, its settings, those of the objective, rows of a micro-batch)
    ("linupper", {"unit": "document"}, {"statistics": "lagged"}, 2),
    ("extremes", {"w_max": 2.0, "norm": "quantile"}, {"statistics": "parity"}, 2),
    ("quadratic", {"norm": "mad"}, {"statistics": "rank"}, 2),
    ("curriculum", {"until": 1.0, **LOOKED_UP}, {}, ROWS),
    ("focal", {"detached": True}, {"shuffle": True}, 2),
]


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

    future = SimpleNamespace(then=lambda use: use(SimpleNamespace(value=lambda: [torch.ones(3, device="cuda")])))
    with Counts() as counts, mock.patch("tests.fake_cuda.counts.Done.get_future", lambda _: future, create=True):
        bucket = torch.empty(3, device="cuda")
        summed = sum_gradients(None, SimpleNamespace(buffer=lambda: bucket))
    return counts.counted, summed is bucket


def test_the_hook_of_ddp_waits_for_nothing(fake_cuda):
    counted, in_place = fake_cuda(hooked)
    assert in_place and counted.collectives == {("all_reduce", "cuda", "float32"): 1}
    assert not counted.reads.total() and not counted.to_host and not counted.to_device
