"""Dropout: a stream of splitmix64 for each row and place, so no way of computing a step changes what is dropped."""

import itertools
import math
import struct

import pytest
import torch

from tests.tools import gang
from tests.tools.gradients import Gradients
from tests.tools.runs import LAYERWISE, LONG, NORMAL, assert_same, stop_at, traces
from tests.tools.tiny import tiny_config
from thriftlab.data.loader import Batch
from thriftlab.data.shards import open_dataset
from thriftlab.optim.state.keys import keyed_seed
from thriftlab.train import loop
from thriftlab.train.backends import make_backend
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.dropout import draws, dropout, row_keys
from thriftlab.train.evaluate import evaluate
from thriftlab.train.loop import run
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.records.record import read_metrics
from thriftlab.train.step import train_step

CPU = torch.device("cpu")
WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15
ROWS, SEQ = 8, 7
CONFIG = ModelConfig(preset=None, dim=10, layers=2, heads=1, hidden=13, vocab_size=17, tied=True, init_std=0.3)


# ---------------------------------------------------------------------------------------- a slow reference, in integers


def finalise(x):
    """splitmix64's, as published."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def splitmix64(state):
    """The endless stream of a generator in this state."""
    while True:
        state = (state + GOLDEN) % WORD
        yield finalise(state)


def key_of(seed, row):
    return finalise((row * GOLDEN + keyed_seed(seed, "dropout", 0)) % WORD)


def reference_draws(key, place, count):
    words = itertools.islice(splitmix64(finalise((key + place) % WORD)), -(-count // 4))
    lanes = [lane for word in words for lane in struct.unpack("<4h", struct.pack("<Q", word))]
    return lanes[:count]


def factors(seed, rows, place, shape, rate):
    """What dropout multiplies an output of these rows by."""
    dropped = round(rate * 65536)
    lanes = [reference_draws(key_of(seed, row), place, math.prod(shape)) for row in rows]
    kept = torch.tensor(lanes) + 32768 >= dropped
    return kept.view(-1, shape[-1]).double() * (65536 / (65536 - dropped))


def signed(word):
    return word - WORD if word >= WORD // 2 else word


# ---------------------------------------------------------------------------------------------------------- the draws


@pytest.mark.parametrize("count", [1, 3, 4, 70])
def test_draws_are_those_of_the_slow_reference(count):
    rows = [0, 1, 12345, 2**40]
    for seed, place in ((0, 0), (7, 3), (2**62, 64)):
        keys = torch.cat([row_keys(seed, row, 1, 0, 1, CPU) for row in rows])
        assert keys.tolist() == [signed(key_of(seed, row)) for row in rows]
        assert draws(keys, place, count).tolist() == [reference_draws(key_of(seed, row), place, count) for row in rows]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_have_the_keys_of_their_rows(world):
    whole = row_keys(3, 40, 8, 0, 1, CPU)
    assert whole.unique().numel() == 8 and torch.equal(whole[3:], row_keys(3, 43, 5, 0, 1, CPU))
    for rank in range(world):
        assert torch.equal(row_keys(3, 40, 8, rank, world, CPU), whole[rank::world])


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.99])
def test_the_share_that_is_dropped_and_the_scale_of_the_rest(rate):
    x, keys = torch.ones(256 * 50, 40), row_keys(1, 0, 256, 0, 1, CPU)
    y = dropout(x, rate, keys, 2)
    n, exact = x.numel(), round(rate * 65536) / 65536
    assert abs((y == 0).sum().item() - n * exact) < 5 * math.sqrt(n * exact * (1 - exact))
    level, dropped = draws(keys, 2, 2000).int() + 32768, round(rate * 65536)
    assert (level == dropped).any() and torch.equal(y == 0, (level < dropped).view_as(y))
    assert y[y != 0].unique().tolist() == [pytest.approx(1 / (1 - exact), rel=1e-6)]
    for axes in ((0, 2), (0, 1)):  # alike in every position and in every feature
        share = (y == 0).double().view(256, 50, 40).mean(axes)
        assert ((share - exact).abs() < 6 * math.sqrt(exact * (1 - exact) * len(share) / n)).all()


def test_nothing_is_dropped_without_keys_or_at_rate_zero():
    x = torch.randn(12, 5)
    assert dropout(x, 0.5, None, 0) is x
    assert torch.equal(dropout(x, 0.0, row_keys(0, 0, 3, 0, 1, CPU), 0), x)


def mask(seed, row, place, n=40_000):
    return dropout(torch.ones(n // 10, 10), 0.3, row_keys(seed, row, 1, 0, 1, CPU), place).flatten() == 0


@pytest.mark.parametrize("other", [(0, 6, 1), (0, 37, 1), (0, 5, 2), (0, 5, 0), (1, 5, 1)], ids=str)
def test_rows_steps_places_and_seeds_are_independent(other):
    a, b = mask(0, 5, 1), mask(*other)
    assert abs((a & b).sum().item() - len(a) * 0.09) < 5 * math.sqrt(len(a) * 0.09 * 0.91)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 10, 40])
def test_entries_of_a_row_are_independent(lag):
    a = mask(0, 5, 1)
    both = (a[lag:] & a[:-lag]).sum().item()
    assert abs(both - len(a) * 0.09) < 5 * math.sqrt(len(a) * 0.09 * 0.91) + lag


# ---------------------------------------------------------------------------------------------------------- the model


def model_of(rate, checkpointing=False, dtype=torch.float64):
    model = GPT(CONFIG, checkpointing, dropout=rate).to(dtype)
    model.init_weights(0)
    return model


def loss_and_gradients(model, *more):
    loss = model(*more).sum()
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def windows():
    tokens = torch.randint(17, (ROWS, SEQ + 1), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def multiply(place, rate):
    return lambda _, __, output: output * factors(4, range(24, 24 + ROWS), place, (SEQ, 10), rate)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_places_are_those_of_gpt2(checkpointing):
    """After the embedding, and what attention and MLP add: by hooks on a model that drops nothing."""
    rate, plain = 0.3, model_of(0.0)
    outputs = [plain.embed, *(part for block in plain.layers for part in (block.attn, block.mlp))]
    for place, module in enumerate(outputs):
        module.register_forward_hook(multiply(place, rate))
    ours = loss_and_gradients(model_of(rate, checkpointing), *windows(), None, row_keys(4, 24, ROWS, 0, 1, CPU))
    for a, b in zip(ours, loss_and_gradients(plain, *windows()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_recomputed_activations_have_the_same_entries_dropped():
    keys = row_keys(4, 24, ROWS, 0, 1, CPU)
    a, b = (loss_and_gradients(model_of(0.3, recompute), *windows(), None, keys) for recompute in (False, True))
    assert all(map(torch.equal, a, b))


def test_without_keys_the_model_is_the_one_without_dropout():
    a, b = (loss_and_gradients(model_of(rate, dtype=torch.float32), *windows()) for rate in (0.0, 0.9))
    assert all(map(torch.equal, a, b))
    assert [*model_of(0.9).state_dict()] == [*model_of(0.0).state_dict()]


def test_the_draws_are_an_operator_that_can_be_compiled():
    torch.library.opcheck(draws, (row_keys(4, 24, ROWS, 0, 1, CPU), 2, 70))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_it_drops_the_same(compiler):
    """Inductor, which takes long, on one dropout: its own arithmetic would go wrong at these sizes."""
    model, keys = model_of(0.3, dtype=torch.float32), row_keys(4, 24, ROWS, 0, 1, CPU)
    if compiler == "inductor":
        x = torch.ones(ROWS * SEQ, 10)
        assert torch.equal(torch.compile(dropout)(x, 0.3, keys, 1), dropout(x, 0.3, keys, 1))
    else:
        loss = torch.compile(model, backend=compiler)(*windows(), None, keys)
        torch.testing.assert_close(loss, model(*windows(), None, keys), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_held_out_losses_are_without_dropout(tiny_data):
    sizes, found, backend = CONFIG.model_copy(update={"vocab_size": 257}), [], make_backend("single")
    for rate in (0.0, 0.9):
        model = GPT(sizes, dropout=rate)
        model.init_weights(0)
        backend.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        found.append(evaluate(backend, open_dataset(tiny_data), 32, 8, "fp32", max_tokens=500))
    assert found[0] == found[1]


# -------------------------------------------------------------------------------------------------- steps of all kinds


def gradients(name, options, sizes):
    """Per micro-batch size: loss, and the gradient that reaches the optimizer."""
    backend, results = make_backend(name, **options), []
    inputs, targets = windows()
    tokens = torch.cat([inputs, targets[:, -1:]], 1)[backend.rank :: backend.world]
    batch = Batch(tokens, torch.zeros(len(tokens)), torch.arange(len(tokens)))
    keys = row_keys(4, 24, ROWS, backend.rank, backend.world, CPU)
    for size in sizes:
        model = model_of(0.3)
        optimizer = Gradients(model.parameters())
        backend.prepare(model, optimizer)
        result = train_step(backend, batch, None, size, "fp32", None, row_keys=keys)
        results.append((result.loss, [g.numpy() for g in optimizer.seen[0]]))
    backend.close()
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_one_gradient_for_every_split(world):
    loss, *grads = loss_and_gradients(model_of(0.3), *windows(), None, row_keys(4, 24, ROWS, 0, 1, CPU))
    count, sizes = ROWS * SEQ, [1, 2, 4]
    split = [gradients("single", {}, sizes)] if world == 1 else gang.ranks(2, gradients, "ddp", {}, sizes)
    for got_loss, got in itertools.chain(*split):
        assert got_loss == pytest.approx(loss.item() / count, abs=1e-12)
        for a, b in zip(got, grads, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b / count, rtol=0, atol=1e-12)


DROPPED = {"dropout": 0.2}


def losses(out):
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def trained(data, out, /, **sections):
    sections["train"] = {**DROPPED, **sections.get("train", {})}
    run(tiny_config(data, out, **sections))
    return losses(out)


def test_a_run_tells_the_model_its_rows(tiny_data, tmp_path, monkeypatch):
    seen, step = [], loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda *args: (seen.append(args[-1]), step(*args))[1])
    dropped = trained(tiny_data, tmp_path / "dropped")
    assert [keys.tolist() for keys in seen] == [[signed(key_of(0, 8 * t + j)) for j in range(8)] for t in range(8)]
    seen.clear()
    assert trained(tiny_data, tmp_path / "off", train={"dropout": 0.0}) != dropped and seen == [None] * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "train", [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_size": 4}, {"deterministic": True},
              {"activation_checkpointing": True}, {"activation_checkpointing": True, "micro_batch_size": 2}], ids=str
)  # fmt: skip
def test_how_a_batch_is_computed_does_not_matter(tiny_data, tmp_path, train):
    plain = trained(tiny_data, tmp_path / "plain")
    assert trained(tiny_data, tmp_path / "other", train=train) == pytest.approx(plain, abs=2e-6)


@pytest.mark.slow
def test_a_forward_ahead_drops_what_the_step_drops(tiny_data, tmp_path):
    """A signal that has to know all losses first: with several micro-batches they come from a forward of their own."""
    signal = {"name": "linupper"}
    plain = trained(tiny_data, tmp_path / "plain", signal=signal, train={"micro_batch_size": 8})
    ahead = trained(tiny_data, tmp_path / "ahead", signal=signal, train={"micro_batch_size": 2})
    assert ahead == pytest.approx(plain, abs=5e-6)


@pytest.mark.slow
def test_layerwise_updates_are_the_normal_ones(tiny_data, tmp_path):
    for name, train in (("normal", NORMAL), ("layerwise", LAYERWISE)):
        trained(tiny_data, tmp_path / name, train=train)
    normal, layerwise = (traces(tmp_path / name) for name in ("normal", "layerwise"))
    assert losses(tmp_path / "normal") == losses(tmp_path / "layerwise")
    for name, tensor in normal[1]["model"].items():
        assert tensor.tobytes() == layerwise[1]["model"][name].tobytes(), name


@pytest.mark.slow
def test_stopped_and_resumed_is_unbroken(tiny_data, tmp_path):
    trained(tiny_data, tmp_path / "whole", **LONG)
    config = tiny_config(tiny_data, tmp_path / "broken", train=DROPPED, **LONG)
    for step in (1, 8, 17):
        stop_at(config, step)
    run(config)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))


def run_on_ranks(tree):
    run(RunConfig.model_validate(tree))


@pytest.mark.slow
@pytest.mark.parametrize("backend", [{}, {"name": "owned"}, {"name": "deepspeed", "stage": 3}], ids=str)
def test_two_ranks_are_one(tiny_data, tmp_path, backend):
    plain = trained(tiny_data, tmp_path / "plain")
    config = tiny_config(tiny_data, tmp_path / "ranks", train=DROPPED, backend=backend)
    gang.ranks(2, run_on_ranks, config.model_dump())
    assert losses(tmp_path / "ranks") == pytest.approx(plain, abs=5e-6)


def test_other_seeds_and_rates_drop_other_entries():
    keys = {seed: row_keys(seed, 0, ROWS, 0, 1, CPU) for seed in (0, 1)}
    found = [model_of(rate)(*windows(), None, keys[seed]) for rate, seed in ((0.3, 0), (0.3, 1), (0.2, 0))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_no_random_state_of_torch_is_read_or_written():
    model = model_of(0.3)
    before = torch.get_rng_state()
    a = model(*windows(), None, row_keys(0, 0, ROWS, 0, 1, CPU))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(model(*windows(), None, row_keys(0, 0, ROWS, 0, 1, CPU)), a)
