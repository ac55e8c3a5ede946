"""What is read one step late on a GPU: the same lines, checkpoints and refusals, here with the delay on a CPU."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tools import gang, scale
from tests.tools.runs import LAYERWISE, assert_same, stop_at, stop_rank, traces
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import UserError
from thriftlab.data.loader import Batch, read_ahead
from thriftlab.optim import METHODS
from thriftlab.optim.core.hyper import hyperparameters
from thriftlab.optim.state.keys import keyed_generator
from thriftlab.train import late, loop, memory, unread
from thriftlab.train.backends import make_backend
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.feed import pack, unpack
from thriftlab.train.log import Counters
from thriftlab.train.loop import run
from thriftlab.train.model import GPT
from thriftlab.train.records import stop
from thriftlab.train.records.record import read_metrics
from thriftlab.train.step import StepResult


def delay():
    """Of a GPU: one step stays unread, and numbers are copied."""
    begin = unread.Unread.__init__

    def init(self, *args):
        begin(self, *args)
        self.kept = 1

    unread.Unread.__init__, unread.send = init, late.copied


@pytest.fixture
def delayed(monkeypatch):
    monkeypatch.setattr(unread.Unread, "__init__", unread.Unread.__init__)
    monkeypatch.setattr(unread, "send", unread.send)
    return delay


@pytest.fixture
def spoil(monkeypatch):
    """Spoils the loss in some steps, counted from the call."""
    forward = GPT.forward

    def spoil(*steps):
        count = itertools.count()

        def spoiled(self, *arguments):
            loss = forward(self, *arguments)
            return loss * torch.nan if torch.is_grad_enabled() and next(count) in steps else loss

        monkeypatch.setattr(GPT, "forward", spoiled)

    return spoil


CASES = [
    {"optim": {"name": "galore", "rank": 4, "gap": 3}, "eval": {"every": 3, "tokens": 500}},
    {"signal": {"name": "linupper"}, "log": {"every": 2, "progress": False}},
    {"signal": {"name": "coba", "every": 2, "window": 4, "warmup": 2, "tokens": 64}},
]


@pytest.mark.parametrize("case", CASES, ids=["refresh", "signal", "validated"])
def test_the_same_lines_and_checkpoints(tiny_data, tmp_path, spoil, delayed, case):
    """With two steps that are refused, of which one would have refreshed a subspace."""
    train = {"micro_batch_size": 8, "max_skipped_steps": 5}
    spoil(3, 5)
    plain = run(tiny_config(tiny_data, tmp_path / "plain", train=train, **case))
    spoil(3, 5)
    delayed()
    run(tiny_config(tiny_data, tmp_path / "late", train=train, **case))
    assert plain["skipped_steps"] == 2
    assert_same(traces(tmp_path / "late"), traces(tmp_path / "plain"))


def test_a_late_run_resumes_bitwise(tiny_data, tmp_path, delayed):
    run(tiny_config(tiny_data, tmp_path / "whole"))
    delayed()
    stop_at(tiny_config(tiny_data, tmp_path / "broken"), 3)
    run(tiny_config(tiny_data, tmp_path / "broken"))
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))


def test_divergence_is_named_by_its_steps(tiny_data, tmp_path, spoil, delayed):
    delayed()
    spoil(2, 3)
    with pytest.raises(UserError, match="not finite in the 2 steps up to step 4, and"):
        run(tiny_config(tiny_data, tmp_path, train={"micro_batch_size": 8, "max_skipped_steps": 2}))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_layerwise_step_that_went_wrong_is_not_saved(tiny_data, tmp_path, spoil, delayed):
    delayed()
    spoil(3)
    with pytest.raises(UserError, match="they are not saved"):
        run(tiny_config(tiny_data, tmp_path, train={**LAYERWISE, "micro_batch_size": 8}))
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]


# ---------------------------------------------------------------------------------------- what the device decides


def held(backend):
    """Copies of the weights and the state of this rank."""
    return {key: piece.tensor.numpy().copy() for key, piece in {**backend.weights(), **backend.states()}.items()}


REFUSED = (2, 4, 6)  # with gap=3: of a plain step, of a refresh, and of one just after it


def refused_steps(method, asks_first, name="single"):
    """Steps of which some are refused; all that this rank has after each."""
    backend = make_backend(name)
    hyper = {key: value for key, value in HYPER.items() if key in hyperparameters(METHODS[method])}
    model, optimizer = scale.make(METHODS[method], **hyper)
    backend.prepare(model, optimizer)
    backend.asks_first = lambda: asks_first
    history = []
    for step in range(8):
        inputs, targets = scale.batch(step, backend.rank, backend.world)
        with backend.micro_batch(last=True):
            backend.backward(backend.module(inputs, targets).sum())
        factor = torch.nan if step in REFUSED else 0.01
        norm, applied = backend.step(torch.tensor(factor, dtype=torch.float64), 1.0)
        assert bool(applied) == (step not in REFUSED) == bool(norm.isfinite())
        history.append(held(backend))
    backend.close()
    return history


def hold(told, asked):
    for step in REFUSED:
        assert told[step].keys() == told[step - 1].keys()
        assert all((told[step][key] == array).all() for key, array in told[step - 1].items()), step
    for ours, theirs in zip(told, asked, strict=True):
        assert ours.keys() == theirs.keys()
        for key, array in theirs.items():
            np.testing.assert_allclose(ours[key], array, rtol=1e-4, atol=1e-6)


HYPER = {"gap": 3, "rank": 2, "density": 0.3, "lr": 0.01, "weight_decay": 0.1}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_the_device_refuses_leaves_every_bit(method):
    """And what comes after is as if there had been none."""
    hold(*(refused_steps(method, first) for first in (False, True)))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), [("adamw", "ddp"), ("galore", "owned"), ("frugal", "fsdp2")])
def test_several_ranks_refuse_together(method, name):
    told, asked = (gang.ranks(2, refused_steps, method, first, name) for first in (False, True))
    for rank in range(2):
        hold(told[rank], asked[rank])


# ------------------------------------------------------------------------------------------------ what ranks agree on


def ask_with_the_step():
    """As GPUs do; and how often it was agreed before a step."""
    asks, agree, before = loop.asks, loop.agree, []

    def spy(backend, halt, seconds, answered=()):
        before.append(not answered)
        return agree(backend, halt, seconds, answered)

    loop.asks = lambda backend, *asked: asks(SimpleNamespace(device=torch.device("cuda"), **ranks(backend)), *asked)
    loop.agree = spy
    return before


def ranks(backend):
    return {"rank": backend.rank, "world": backend.world}


def stopped_late(tree, step):
    delay()
    before = ask_with_the_step()
    return stop_rank(tree, step), sum(before)


def ended_late(tree):
    delay()
    before = ask_with_the_step()
    run(RunConfig.model_validate(tree))
    return sum(before)


@pytest.mark.slow
def test_ranks_stop_together_by_what_travelled_with_a_step(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "whole")
    assert gang.ranks(2, ended_late, config.model_dump()) == [2, 2]  # then they have answers
    tree = tiny_config(tiny_data, tmp_path / "broken").model_dump()
    (first, _), (second, _) = gang.ranks(2, stopped_late, tree, 3)
    assert first == second and "stopped after step 5" in first  # heard before step 4, asked with it, read after step 5
    gang.ranks(2, ended_late, tree)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))


def test_the_clock_is_the_first_ranks():
    gpus = [SimpleNamespace(rank=rank, world=2, device=torch.device("cuda")) for rank in (0, 1)]
    first, second = (
        torch.tensor(loop.asks(gpu, halt, 7.0 + halt)) for gpu, halt in zip(gpus, (False, True), strict=True)
    )
    assert loop.agree(gpus[0], False, 9.0, (first + second).tolist()) == (True, 7.0)
    alone = SimpleNamespace(rank=0, world=1, device=torch.device("cuda"))
    assert loop.asks(alone, True, 7.0) == () and loop.agree(alone, True, 7.0) == (True, 7.0)


# ------------------------------------------------------------------------------------------------------------- clocks


def test_all_time_is_of_some_step(monkeypatch):
    """Steps begin at 0, 10 and 20; numbers come 4 after that; at the end the host waits 3 for the last."""
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(unread.time, "perf_counter", lambda: now.time)
    monkeypatch.setattr(unread, "result_of", lambda backend, numbers: StepResult(1.0, 1.0, 100, True))
    monkeypatch.setattr(unread, "send", lambda numbers: lambda: setattr(now, "time", now.time + 3))
    told, counters = [], Counters()
    log = SimpleNamespace(step=lambda result, lr, seconds: (told.append((counters.step, lr, seconds)), later(50)))
    train = SimpleNamespace(max_skipped_steps=1)
    parts = SimpleNamespace(backend=SimpleNamespace(device=torch.device("cuda")), config=SimpleNamespace(train=train))

    def later(seconds):
        now.time += seconds

    steps = unread.Unread(parts, counters, log)
    for step in range(3):
        began = now.time
        later(1)
        steps.add({}, float(step), began)
        later(100)  # evaluates, or whatever
    steps.read_all()
    assert told == [(1, 0.0, 1 + 1 + 3), (2, 1.0, 1 + 3), (3, 2.0, 3)]
    assert (counters.seconds, counters.timed_seconds, counters.timed_tokens) == (12.0, 3.0, 100)


def test_a_stop_file_is_looked_for_once_a_second(tmp_path, monkeypatch):
    now, looks = SimpleNamespace(time=100.0), []
    monkeypatch.setattr(stop.time, "monotonic", lambda: now.time)
    monkeypatch.setattr(stop, "stop_file", lambda out: not looks.append(out))
    asked = stop.stop_file_lately(tmp_path)
    answers = []
    for seconds in (0, 0.5, 0.4, 0.2, 5):
        now.time += seconds
        answers.append(asked())
    assert answers == [True, False, False, True, True] and len(looks) == 3


def test_draws_are_those_of_manual_seed():
    parts = SimpleNamespace(config=SimpleNamespace(seed=5), backend=SimpleNamespace(rank=3, device=torch.device("cpu")))
    loop.seed_step(parts, 7)
    drawn = torch.rand(4)
    torch.manual_seed(keyed_generator(5, "rank 3", 7).initial_seed())
    assert torch.equal(drawn, torch.rand(4))


# ------------------------------------------------------------------------------------------------------------- copies


@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=6, max_size=6),
    source=st.integers(0, 2**31 - 1),
    sample=st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=2),
    reference=st.none() | st.lists(st.floats(width=32), min_size=4, max_size=4),
)
def test_what_is_packed_arrives(tokens, source, sample, reference):
    batch = Batch(torch.tensor(tokens).view(2, 3), torch.full((2,), source), torch.tensor(sample))
    losses = None if reference is None else torch.tensor(reference).view(2, 2)
    words, length = pack(batch, None if losses is None else lambda of: losses if of is batch else None)
    assert words.dtype == torch.int32
    there = unpack(words, length)
    assert all(a.dtype == torch.int64 and torch.equal(a, b) for a, b in zip(there, batch, strict=False))
    assert (there.reference is None) == (losses is None)
    if losses is not None:
        assert torch.equal(there.reference.view(torch.int32), losses.view(torch.int32))


def test_numbers_travel_together_and_unchanged():
    numbers = {
        "a": torch.tensor(2**53 - 1),
        "b": torch.tensor([0.1, torch.nan, torch.inf]),
        "c": torch.zeros(0),
        "d": torch.tensor(True),
        "e": torch.tensor([[1e-45, 1.0]]),
    }
    there = late.copied(numbers)()
    assert there.keys() == numbers.keys()
    for name, number in numbers.items():
        assert there[name].dtype == torch.float64 and there[name].shape == number.shape
        assert torch.equal(there[name].to(number.dtype).nan_to_num(7), number.nan_to_num(7))
    assert late.send(numbers)() is numbers


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_reading_ahead_keeps_the_order_and_the_error(device):
    def read(item):
        if item == 3:
            raise OSError("disk is gone")
        return 2 * item

    found = []
    with pytest.raises(OSError, match="disk is gone"):
        for value in read_ahead(read, range(5), torch.device(device)):
            found.append(value)
    assert found == [0, 2, 4]
    assert [*read_ahead(read, [], torch.device(device))] == []
    assert [*read_ahead(read, [7], torch.device(device))] == [14]


# ------------------------------------------------------------------------------------------------------------- memory


def test_each_phase_has_its_own_peak(monkeypatch):
    """Of a stand-in for the allocator, whose peak is at least what is there when it is reset."""
    there = SimpleNamespace(now=0, peak=5)  # 5: of somebody before us

    def take(most, left):
        there.peak, there.now = max(there.peak, most), left

    monkeypatch.setattr(memory.torch.cuda, "init", lambda: None)
    monkeypatch.setattr(memory.torch.cuda, "reset_peak_memory_stats", lambda device: setattr(there, "peak", there.now))
    monkeypatch.setattr(memory.torch.cuda, "max_memory_allocated", lambda device: there.peak)
    peaks = memory.Peaks(torch.device("cuda"))
    take(3, 2)
    with peaks.during("witness"):
        take(90, 2)
    peaks.enter("step")
    take(20, 4)
    with peaks.during("evaluation"):
        take(8, 4)
    take(21, 4)
    with pytest.raises(KeyError), peaks.during("checkpoint"):
        take(6, 5)
        raise KeyError
    take(10, 0)
    assert peaks.told() == {"build": 3, "witness": 90, "step": 21, "evaluation": 8, "checkpoint": 6}
    assert memory.Peaks(torch.device("cpu")).told() is None


def test_the_record_of_a_gpu_has_them_and_the_witness_apart(tiny_data, tmp_path, monkeypatch):
    phases = {"build": 3, "witness": 90, "step": 21, "evaluation": 8, "checkpoint": 6}
    monkeypatch.setattr(memory.Peaks, "told", lambda self: phases)
    told = run(tiny_config(tiny_data, tmp_path / "gpu"))["memory"]
    assert (told["phases"], told["peak_bytes"]) == (phases, 21)
    monkeypatch.undo()
    told = run(tiny_config(tiny_data, tmp_path / "cpu"))["memory"]
    assert "phases" not in told and told["peak_bytes"] > 2**20


def test_a_run_tells_its_phases(tiny_data, tmp_path, monkeypatch):
    entered, enter = [], memory.Peaks.enter
    monkeypatch.setattr(memory.Peaks, "enter", lambda self, phase: (entered.append(phase), enter(self, phase)))
    run(tiny_config(tiny_data, tmp_path, checkpoint={"every": 4}, eval={"every": 3, "tokens": 500}))
    assert entered == ["step", *["evaluation", "step"] * 1, *["checkpoint", "step"], *["evaluation", "step"] * 2,
                       *["checkpoint", "step"]]  # fmt: skip
