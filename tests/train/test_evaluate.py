"""The ruler against brute force: every held-out token once, whatever the batch and the world."""

import math

import numpy as np
import pytest
import torch

from tests.tools import gang
from thriftlab.data.shards import open_dataset
from thriftlab.train.backends import make_backend
from thriftlab.train.evaluate import evaluate
from thriftlab.train.model import GPT, ModelConfig

CONFIG = ModelConfig(preset=None, dim=16, layers=1, heads=2, hidden=24, vocab_size=257, init_std=0.3)


def measure(path, lengths_and_batches, **options):
    backend = make_backend("auto")
    model = GPT(CONFIG)
    model.init_weights(0)
    backend.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    dataset = open_dataset(path)
    results = [evaluate(backend, dataset, length, batch, "fp32", **options) for length, batch in lengths_and_batches]
    backend.close()
    return results


@torch.no_grad()
def brute_force(path, length, mask=False):
    """One window at a time and one token at a time, in float64; {source: (nats, tokens, bytes)}."""
    model = GPT(CONFIG)
    model.init_weights(0)
    model.double()
    totals = {}
    for source in ("plain", "noisy"):
        stream = np.fromfile(path / source / "validation-00000.bin", dtype="<u2").astype(np.int64)
        nats = tokens = size = 0
        for start in range(0, len(stream) - 1, length):
            window = torch.from_numpy(stream[start : start + length + 1])
            documents = (window[:-1] == 256).cumsum(0)[None] if mask else None
            log_probs = model(window[None, :-1], documents=documents)[0].log_softmax(-1)
            for t, target in enumerate(window[1:].tolist()):
                nats -= log_probs[t, target].item()
                tokens += 1
                size += target != 256
        totals[source] = nats, tokens, size
    return totals


@pytest.mark.parametrize("mask", [False, True])
def test_every_token_counts_once(tiny_data, mask):
    length = 50
    expected = brute_force(tiny_data, length, mask)
    [got] = measure(tiny_data, [(length, 4)], mask_delimiter=256 if mask else None)
    for source, (nats, tokens, size) in expected.items():
        assert (got["sources"][source]["tokens"], got["sources"][source]["bytes"]) == (tokens, size)
        assert got["sources"][source]["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    nats, tokens, size = np.sum(list(expected.values()), axis=0)
    assert got["tokens"] == tokens and got["bytes"] == size
    assert got["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert got["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-6)


def test_all_tokens_but_the_first_of_a_source_are_predicted(tiny_data):
    [got] = measure(tiny_data, [(64, 8)])
    for source in ("plain", "noisy"):
        entry = open_dataset(tiny_data).manifest["sources"][source]["validation"]
        assert got["sources"][source]["tokens"] == entry["tokens"] - 1
        assert got["sources"][source]["bytes"] == entry["bytes"]


@pytest.mark.slow
def test_one_number_for_every_batch_size_and_world(tiny_data):
    cases = [(32, 1), (32, 7), (32, 64), (32, 1000)]
    alone = measure(tiny_data, cases)
    for results in [alone, *gang.ranks(2, measure, tiny_data, cases)]:
        for result in results:
            assert result["tokens"] == alone[0]["tokens"]
            assert result["loss"] == pytest.approx(alone[0]["loss"], rel=1e-6)


def test_a_limit_takes_the_first_whole_windows_of_each_source(tiny_data):
    [got] = measure(tiny_data, [(32, 8)], max_tokens=100)
    assert got["sources"]["plain"]["tokens"] == got["sources"]["noisy"]["tokens"] == 128
