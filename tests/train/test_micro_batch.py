"""Windows of one forward: what fits, what a window needs, and that a run keeps what it chose."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.runs import LONG, assert_same, stop_at, traces
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import UserError
from thriftlab.optim import LAYERS, convert
from thriftlab.train import build, loop, micro_batch
from thriftlab.train.backends import make_backend
from thriftlab.train.checkpoints.reader import latest
from thriftlab.train.micro_batch import SPARE, Need, named_shortage, need_of, windows_that_fit
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.storages import Storages

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------------- what fits


@given(free=st.integers(0, 2000), kept=st.integers(0, 500), fixed=st.integers(0, 100), window=st.integers(1, 300),
       most=st.integers(1, 600))  # fmt: skip
def test_as_many_as_fit_in_as_few_pieces_as_possible(free, kept, fixed, window, most):
    found = windows_that_fit(free, kept, Need(fixed, window), most)
    fit = [n for n in range(1, most + 1) if kept + fixed + n * window <= (1 - SPARE) * free]
    largest = max(fit, default=1)
    pieces = next(count for count in range(1, most + 1) if count * largest >= most)
    assert found <= largest and pieces * found >= most, "no more pieces than the largest would need"
    assert (found - 1) * pieces < most, "and no windows more than that takes"


def test_numbers_of_an_80_gb_gpu():
    need = Need(fixed=2 * 10**9, window=2048 * 2_000_000)  # llama-1b at 2048 tokens
    assert windows_that_fit(74 * 10**9, 16 * 10**9, need, 256) == 11  # 48.6 GB for 4.1 each; 24 pieces
    assert windows_that_fit(74 * 10**9, 16 * 10**9, need, 8) == 8
    assert windows_that_fit(10**9, 16 * 10**9, need, 8) == 1, "to try is all that is left"


# --------------------------------------------------------------------------------------------------- what it needs


def test_bytes_that_are_alive_at_once():
    known = torch.zeros(100)
    with Storages([known]) as storages:
        a = known + 1  # 400
        b = a.view(10, 10).t()  # none
        c = torch.cat([a, a])  # 800
        del a
        assert (storages.now, storages.peak) == (1200, 1200), "b keeps it"
        del b
        assert (storages.now, storages.peak) == (800, 1200)
        c.add_(1)  # none
        d = torch.ones(50, dtype=torch.float64)  # 400
        known.view(10, 10)  # none
        assert (storages.now, storages.peak) == (1200, 1200)
        del c, d
    assert (storages.now, storages.peak) == (0, 1200)


def test_what_autograd_keeps_is_alive():
    x = torch.zeros(10, requires_grad=True)
    with Storages([x]) as storages:
        y = x.exp().sum()  # exp(x) is kept: 40, and the sum: 4
        assert storages.now == 44
        del y
        assert storages.now == 0


SIZES = dict(preset=None, dim=32, layers=2, heads=2, hidden=48, vocab_size=64)
MADE = {
    "plain": ({}, {}, None), "grouped": (dict(kv_heads=1, qk_norm=True, tied=True), {}, None),
    "checkpointing": ({}, dict(activation_checkpointing=True), None), "dropout": ({}, dict(dropout=0.1), None),
    "lost": ({}, {}, "lost"),
}  # fmt: skip


@pytest.mark.parametrize("name, precision", [*((name, "bf16") for name in MADE), ("plain", "fp32")])
def test_what_is_counted_without_memory_is_what_is_held(name, precision):
    sizes, options, layer = MADE[name]
    length, many, documents = 40, 6, name == "plain"

    def made():
        model = GPT(ModelConfig(**SIZES, **sizes), loss_keep_bytes=None, **options)
        if layer:
            convert(model, LAYERS[layer], [r"\.(attn|mlp)\."], rank=4)
        return model

    with torch.device("meta"):
        model = made()
    need = need_of(model, CPU, many, length, precision, documents, name == "dropout")
    model = made()
    model.init_weights(0)
    held = {}
    for windows in (many // 2, many):
        tokens = torch.arange(windows * length).view(windows, length) % 64
        keys = torch.arange(windows) if name == "dropout" else None
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        known = [*model.parameters(), *model.buffers(), *grads, tokens, *([] if keys is None else [keys])]
        with Storages(known) as storages:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                losses = model(tokens, tokens, tokens if documents else None, keys)
            losses.sum().backward()
        held[windows] = storages.peak
    assert need.window == pytest.approx((held[many] - held[many // 2]) / (many - many // 2), rel=0.005)
    assert need.fixed + many * need.window == pytest.approx(held[many], rel=0.005)


# ------------------------------------------------------------------------------------------------------ kept with a run


@pytest.fixture
def gpu(monkeypatch):
    """A CPU whose micro-batch is asked of its memory, as a GPU's is; the answers, the last one first."""
    answers, asked = [], []
    monkeypatch.setattr(build, "micro_batch_size", lambda config, backend, waits: config.train.micro_batch_size)

    def fitting(run):
        asked.append(answers.pop())
        return asked[-1]

    monkeypatch.setattr(micro_batch, "fitting", fitting)
    return answers, asked


@pytest.mark.slow
def test_a_run_goes_on_with_the_micro_batch_that_it_began_with(tiny_data, tmp_path, gpu, capfd):
    answers, asked = gpu
    answers += [4, 3, 3]  # the last is never asked for
    config = tiny_config(tiny_data, tmp_path / "out", **LONG)
    loop.run(tiny_config(tiny_data, tmp_path / "whole", **LONG))
    stop_at(config, 8)
    assert latest(tmp_path / "out" / "checkpoints").meta["counters"]["micro_batch_size"] == 3
    entry = loop.run(config)
    assert asked == [3, 3] and answers == [4]
    assert entry["speed"]["micro_batch_size"] == 3
    assert "micro-batches of 3 windows, as many as the memory of the GPU holds" in capfd.readouterr().err
    assert_same(traces(tmp_path / "out"), traces(tmp_path / "whole"))
    given = tiny_config(tiny_data, tmp_path / "given", train={"micro_batch_size": 2})
    assert loop.run(given)["speed"]["micro_batch_size"] == 2 and answers == [4]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["train"]["micro_batch_size"] is None, "what was asked for stays"


def test_what_a_gpu_is_asked_for(tiny_data, tmp_path, monkeypatch):
    config = tiny_config(tiny_data, tmp_path / "out", data={"document_mask": True}, train={"precision": "bf16"})
    seen, run = [], build.build(config, make_backend("single"))
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 10**9)
    monkeypatch.setattr(micro_batch, "need_of", lambda *given: seen.append(given[1:]) or Need(0, 10**8))
    assert micro_batch.fitting(run) == 8 and seen == [(CPU, 8, 32, "bf16", True, False)]
    assert micro_batch.kept_bytes(run) == 3 * sum(p.nbytes for p in run.model.parameters())  # a gradient, two moments
    monkeypatch.setattr(run.backend, "share", lambda value: [value, 3])
    assert micro_batch.fitting(run) == 3, "the rank with the least memory decides for all"


def test_a_lack_of_memory_is_one_line(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "out", train={"micro_batch_size": 4})
    with pytest.raises(UserError, match=r"memory of the GPU is not enough \(CUDA out of memory\); set train") as caught:
        with named_shortage(config):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
    assert "below 4, or train.activation_checkpointing=true" in str(caught.value) and "\n" not in str(caught.value)
