"""A run that was killed, stopped or moved is the run that was not: bitwise, in weights, state, metrics and results."""

import itertools
import json
import os
import random
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from tests.tools import gang
from tests.tools.moments import before_each_write
from tests.tools.runs import LONG, assert_same, run_status, stop_at, stop_rank, traces
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import UserError
from thriftlab.train import loop, unread
from thriftlab.train.checkpoints.reader import latest
from thriftlab.train.loop import Interrupted, run
from thriftlab.train.records.record import read_metrics

METHODS = [{"name": "adamw"}, {"name": "signsgd", "lr": 1e-4}, {"name": "frugal", "gap": 7, "subspace": "columns"},
           {"name": "frugal", "gap": 4, "order": "random"}]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("optim", METHODS, ids=lambda o: "-".join(map(str, o.values())))
def test_stopped_and_resumed_is_unbroken(tiny_data, tmp_path, optim):
    run(tiny_config(tiny_data, tmp_path / "whole", optim=optim, **LONG))
    config = tiny_config(tiny_data, tmp_path / "broken", optim=optim, **LONG)
    for step in (1, 8, 17):
        stop_at(config, step)
    run(config)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))


def killed_at_write(tree, number):
    """A run that dies before its n-th change of a file, whichever thread makes it."""
    left = iter(range(number))

    def die(label):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    with before_each_write(die):
        return run_status(tree)


@pytest.mark.slow
def test_killed_twenty_times_is_unbroken(tiny_data, tmp_path):
    chance = random.Random(0)
    longer = {**LONG, "optim": METHODS[2], "budget": {"tokens": 150 * 8 * 32}}
    run(tiny_config(tiny_data, tmp_path / "whole", **longer))
    config, ends = tiny_config(tiny_data, tmp_path / "broken", **longer), []
    for _ in range(20):
        process, _ = gang.start(killed_at_write, config.model_dump(), chance.randint(1, 80))
        process.join()
        ends.append(process.exitcode)
    assert ends == [-signal.SIGKILL] * 20 and latest(tmp_path / "broken" / "checkpoints").step > 9
    run(config)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))


@pytest.mark.slow
def test_two_ranks_resume_bitwise_and_one_rank_sees_the_same_batches(tiny_data, tmp_path):
    whole, broken, moved = (
        tiny_config(tiny_data, tmp_path / name, optim=METHODS[2], **LONG) for name in ("whole", "broken", "moved")
    )
    gang.ranks(2, run_status, whole.model_dump())
    messages = gang.ranks(2, stop_rank, broken.model_dump(), 11)
    assert all("after step 11" in message for message in messages)
    gang.ranks(2, run_status, broken.model_dump())
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))

    gang.ranks(2, stop_rank, moved.model_dump(), 11)
    run(moved)  # one process goes on where two stopped
    for a, b in zip(read_metrics(tmp_path / "moved" / "metrics.jsonl"), traces(tmp_path / "whole")[2], strict=True):
        assert a["tokens"] == b["tokens"]
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)


def test_what_a_module_draws_is_a_function_of_seed_and_step(tiny_data, tmp_path, monkeypatch):
    drawn, plain = [], loop.one_step
    monkeypatch.setattr(loop, "one_step", lambda *a: (drawn.append(torch.rand(1).item()), plain(*a))[1])
    run(tiny_config(tiny_data, tmp_path / "whole"))
    whole, drawn[:] = list(drawn), []
    stop_at(tiny_config(tiny_data, tmp_path / "broken"), 3)
    torch.rand(7)
    run(tiny_config(tiny_data, tmp_path / "broken"))
    assert drawn == whole and len(set(whole)) == 8


# ------------------------------------------------------------------------------------------------ around resuming


def test_a_finished_run_is_not_run_again(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "out")
    first = run(config)
    again = run(config)
    assert again["finished"] == first["finished"]


def test_a_folder_with_another_run_is_refused(tiny_data, tmp_path):
    run(tiny_config(tiny_data, tmp_path / "out"))
    with pytest.raises(UserError, match=r"\(seed: 0 there, 1 now\); choose another out"):
        run(tiny_config(tiny_data, tmp_path / "out", seed=1))
    (tmp_path / "out" / "record.json").unlink()
    with pytest.raises(UserError, match=r"\(seed: 0 there, 1 now\); choose another out"):
        run(tiny_config(tiny_data, tmp_path / "out", seed=1))


def test_a_stop_file_stops(tiny_data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "STOP").touch()
    config = tiny_config(tiny_data, tmp_path / "out")
    with pytest.raises(Interrupted):
        run(config)
    (tmp_path / "out" / "STOP").unlink()
    assert run(config)["status"] == "done"


def test_a_flipped_bit_in_the_newest_checkpoint_costs_one_checkpoint(tiny_data, tmp_path):
    run(tiny_config(tiny_data, tmp_path / "whole", **LONG))
    config = tiny_config(tiny_data, tmp_path / "broken", **LONG)
    stop_at(config, 13)
    newest = latest(tmp_path / "broken" / "checkpoints").path
    raw = bytearray((newest / "model.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 4
    (newest / "model.safetensors").write_bytes(raw)
    with pytest.warns(RuntimeWarning, match="is broken .*model.safetensors.*the one before"):
        run(config)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))


def test_divergence_ends_with_a_message(tiny_data, tmp_path):
    config = tiny_config(
        tiny_data, tmp_path / "out", optim={"name": "adamw", "lr": 1e30}, train={"max_skipped_steps": 3}
    )
    with pytest.raises(UserError, match=r"3 steps.*lower optim.lr"):
        run(config)


def test_two_seeds_differ_and_one_seed_repeats(tiny_data, tmp_path):
    losses = [
        run(tiny_config(tiny_data, tmp_path / str(i), seed=s))["results"]["loss"] for i, s in enumerate((0, 0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_budget_of_seconds_is_kept(tiny_data, tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count(0, 1 / 16).__next__, time=time.time)  # a look is 1/16 s later
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(unread, "time", clock)
    entry = run(tiny_config(tiny_data, tmp_path / "out", budget={"tokens": None, "seconds": 0.5}))
    assert (entry["budget"]["seconds"], entry["budget"]["steps"]) == (0.5, 8)


def test_a_budget_of_flops_is_kept(tiny_data, tmp_path):
    entry = run(tiny_config(tiny_data, tmp_path / "out", budget={"tokens": None, "flops": 1e9}))
    assert 0.9e9 < entry["budget"]["flops"] <= 1e9


def test_the_record_is_complete(tiny_data, tmp_path):
    run(tiny_config(tiny_data, tmp_path / "out"))
    stored = json.loads((tmp_path / "out" / "record.json").read_text())
    for key in ("versions", "machine", "data", "seed", "budget", "results", "memory", "speed", "config"):
        assert stored[key] not in (None, {}, ""), key
    memory = stored["memory"]
    assert memory["state_bytes"] == memory["predicted_state_bytes"] == 2 * memory["parameter_bytes"]


FILES = ["config.json", "metrics.jsonl", "record.json"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_what_a_run_wrote_is_found(tiny_data, tmp_path, name):
    config = tiny_config(tiny_data, tmp_path / "out")
    run(config)
    path = tmp_path / "out" / name
    clean = path.read_bytes()
    for place in random.Random(0).sample(range(len(clean)), 20):
        path.write_bytes(clean[:place] + bytes([clean[place] ^ 1]) + clean[place + 1 :])
        with pytest.raises(UserError, match=re.escape(name)):
            run(config)


def test_a_changed_line_of_an_unfinished_run_is_found(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "out", **LONG)
    stop_at(config, 9)
    metrics = tmp_path / "out" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 4, "tokens": 1', '"step": 4, "tokens": 2'))
    with pytest.raises(UserError, match="not the history of the checkpoint at step 9"):
        run(config)
