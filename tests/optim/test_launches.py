"""Launches, host reads and addresses of a step on a GPU, counted on fake CUDA tensors of the sizes of llama-1b."""

import re
from pathlib import Path

import pytest
import torch

from tests.measure.launches import FUSED, KEPT_WIDE, LAYERS, METHODS, count, made, waits

DOCS = Path(__file__).parents[2] / "docs/measurements.md"
IN_ALL, A_MATRIX, WITH_CHOICE = 20, 20, 22  # the last: Muon's products, and which rows they are of
COUNTERS = ("step", "start")
NO_REFRESH = (
    "adamw",
    "signsgd",
    "muon",
    "normuon",
    "scale",
    "rmnp",
    "sinkgd",
    "adam-mini",
    "dion2",
    "adamw, tables by ember",
)


def committed():
    """The table: method -> launches of the whole model, a matrix, with two layers, reads, reads of a refresh."""
    section = DOCS.read_text().split("## Launches")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([a-z].*?) \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \| (\d+) \| (\d+) \|$", section, re.M)
    return {name: [float(cell.replace(",", "")) for cell in cells] for name, *cells in rows}


def test_the_table_is_of_all_methods_and_within_what_is_promised():
    table = committed()
    assert [*table] == KEPT_WIDE
    assert all(reads == 0 for *_, reads, _ in table.values())
    for name in KEPT_WIDE:
        whole, each, *_ = table[name]
        assert each <= (WITH_CHOICE if name == "dion2" else A_MATRIX), name
        assert whole <= IN_ALL or name not in ("adamw", "signsgd")


@pytest.mark.parametrize("name", KEPT_WIDE)
def test_a_step_takes_no_more_launches_than_the_table_says(fake_cuda, name):
    row, table = fake_cuda(count, name, "llama-1b", LAYERS, True), committed()
    assert row.launches() <= table[name][2]
    assert waits(row.plain) == 0 and not row.plain.to_device
    assert waits(row.first) <= table[name][4]


@pytest.mark.parametrize("name", ["adamw", "signsgd"])
def test_all_tensors_of_the_whole_model_take_few(fake_cuda, name):
    for deferred in (True, False):
        assert fake_cuda(count, name, "llama-1b", None, deferred).launches() <= IN_ALL


@pytest.mark.parametrize("name", ["adamw", "frugal, columns"])
def test_weights_in_few_bits_do_not_make_the_host_wait(fake_cuda, name):
    """Nor a first step more often than it does for fp32."""
    row, plain = (fake_cuda(count, name, "llama-1b", 1, True, weights) for weights in ("bf16+8", "fp32"))
    assert waits(row.plain) == 0 and not row.plain.to_device
    assert waits(row.first) == waits(plain.first)


@pytest.mark.parametrize("name", FUSED)
def test_a_step_by_kernels_takes_three_launches_a_group(fake_cuda, name):
    """Of two groups. In llama-1b rows of 5461 columns begin anywhere, and take a launch of their own."""
    row = fake_cuda(count, name, "llama-1b", LAYERS, True, "fp32", "auto")
    assert 2 <= row.launches() <= 3 * 2
    assert set(row.plain.launches) <= {"begin_step", "step_entries", "step_tiles"}
    assert waits(row.plain) == 0 and not row.plain.to_device


def few(name):
    """Hyper-parameters for a small model."""
    return {"rank": 8} if "rank" in METHODS[name][1] else {}


def captured(name):
    """Two plain steps as a CUDA graph would take them: what they launch, with which numbers, and what moved."""
    from tests.fake_cuda import stand_ins
    from tests.fake_cuda.counts import Counts

    with Counts():
        lr = torch.full((), 1e-3, device="cuda")
        _, optimizer = made(name, "nano", LAYERS, lr=lr, **few(name))
        applied = torch.ones((), device="cuda")
        optimizer.step(applied=applied)
    steps, kept = [], []
    stand_ins.captures.append(None)
    for _ in range(3):
        kept.append([id(value) for state in optimizer.state.values() for value in state.values()])
        with Counts() as counts:
            optimizer.step(applied=applied)
        steps.append(counts.counted)
    stand_ins.captures.clear()
    counters = [state[key].device.type for state in optimizer.state.values() for key in COUNTERS if key in state]
    return steps, kept[0] == kept[1] == kept[2], set(counters)


@pytest.mark.parametrize("name", [*KEPT_WIDE, "frugal, columns, bf16"])
def test_a_plain_step_can_be_captured(fake_cuda, name):
    """No read, no copy, no new state, and the same launches with the same numbers: what changes lies on the device."""
    (_, one, two), stays, counters = fake_cuda(captured, name)
    assert stays and counters <= {"cuda"}
    for counted in (one, two):
        assert waits(counted) == 0 and not counted.to_device and not counted.to_host
    assert one.scalars == two.scalars and one.launches == two.launches


def after_replays():
    """A graph counts behind the host's back: afterwards the host asks."""
    from tests.fake_cuda import stand_ins
    from tests.fake_cuda.counts import Counts

    _, optimizer = made("frugal, columns", "nano", LAYERS)
    optimizer.step()
    stand_ins.captures.append(None)
    optimizer.step()
    stand_ins.captures.clear()
    found = []
    for _ in range(2):
        with Counts() as counts:
            optimizer.step()
        found.append(counts.counted)
    return found


def test_after_a_capture_the_host_asks_how_far_a_counter_is(fake_cuda):
    assert [waits(counted) for counted in fake_cuda(after_replays)] == [1, 1]


def refreshed(name):
    """Eight steps, some of them refused, with a refresh every third: waits of each step, and where the counters are."""
    from tests.fake_cuda.counts import Counts, true_of

    _, optimizer = made(name, "nano", LAYERS, gap=3, **few(name))
    found = []
    for refuse in (0, 0, 1, 0, 0, 1, 0, 0):
        with Counts() as counts:
            optimizer.step(applied=torch.full((), 1.0 - refuse, device="cuda"))
        state = next(state for state in optimizer.state.values() if "start" in state)
        found.append((waits(counts.counted), *(true_of(state[key]).tolist() for key in COUNTERS)))
    return found


@pytest.mark.parametrize("name", [name for name in KEPT_WIDE if name not in NO_REFRESH])
def test_a_refresh_waits_once_for_all_matrices(fake_cuda, name):
    """Beyond what the search for singular vectors asks; a refused step is found out where a refresh may be due."""
    svd = name.startswith(("galore", "fira", "subtrack", "soap", "conda")) or name == "frugal, svd"
    found = fake_cuda(refreshed, name)
    if not svd:
        late = name.startswith("stable-spam")  # resets come with every third step, not after it
        assert [waits for waits, *_ in found] == ([1, 0, 1, 1, 0, 0, 1, 1] if late else [1, 0, 0, 1, 1, 0, 0, 1])
        assert not late or [start for *_, start in found] == [0, 0, 0, 2, 2, 2, 2, 5]
    assert [step for _, step, _ in found] == [1, 2, 2, 3, 4, 4, 5, 6]
    if name.startswith("frugal") and "blocks" not in name:  # whose moments begin anew at a refresh
        assert [start for *_, start in found] == [0, 0, 0, 0, 3, 3, 3, 3]


def told_at_first():
    """Where the counters are after steps of which one is refused, and of which later ones are without the word."""
    from tests.fake_cuda.counts import Counts, true_of

    _, optimizer = made("frugal, columns", "nano", LAYERS, gap=3)
    found = []
    for told in (1.0, 0.0, None, None, None):
        with Counts():
            optimizer.step(**({} if told is None else {"applied": torch.full((), told, device="cuda")}))
        state = next(state for state in optimizer.state.values() if "start" in state)
        found.append(tuple(true_of(state[key]).tolist() for key in COUNTERS))
    return found


def test_the_host_remembers_that_it_does_not_know_a_counter(fake_cuda):
    assert fake_cuda(told_at_first) == [(1, 0), (1, 0), (2, 0), (3, 0), (4, 3)]
