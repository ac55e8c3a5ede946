"""Runs in tests: how to stop one, what it says, and all that it leaves behind, to compare with another's."""

import os
import signal

import pytest
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from thriftlab.train import loop
from thriftlab.train.checkpoints.reader import latest
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.log import Log
from thriftlab.train.loop import Interrupted, run
from thriftlab.train.records.record import read_metrics, read_record

LONG = {"budget": {"tokens": 30 * 8 * 32}, "checkpoint": {"every": 3, "keep": 2}, "eval": {"every": 7, "tokens": 500}}
TIMINGS = {"seconds", "tokens_per_second", "started", "finished", "timed_seconds"}
LAYERWISE = {"clip": None, "max_skipped_steps": 1, "layerwise": True}
NORMAL = {**LAYERWISE, "layerwise": False}


def run_status(tree):
    return run(RunConfig.model_validate(tree))["status"]


def said(tree):
    try:
        return run(RunConfig.model_validate(tree))["status"]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def ended(config):
    return run(config)["results"]["loss"]


def stop_at(config, step):
    """Run until `step` is logged, then as Ctrl-C would."""
    write = Log.write

    def write_and_stop(self, values):
        write(self, values)
        if self.counters.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    Log.write = write_and_stop
    try:
        with pytest.raises(Interrupted) as stopped:
            run(config)
    finally:
        Log.write = write
    assert stopped.value.code == 130 and "same command resumes" in str(stopped.value)


def stop_rank(tree, step):
    """Only the second rank hears the signal; both stop."""
    if os.environ["RANK"] == "1":
        plain = loop.one_step

        def one_step(parts, batch, seen=[0]):  # noqa: B006
            seen[0] += 1
            if seen[0] == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(parts, batch)

        loop.one_step = one_step
    try:
        run(RunConfig.model_validate(tree))
    except Interrupted as stopped:
        return str(stopped)


def traces(out, checkpoint=None):
    """Everything a run leaves that must not depend on its fate; of the newest checkpoint, if none is named."""
    last = out / "checkpoints" / checkpoint if checkpoint else sorted((out / "checkpoints").glob("step-*"))[-1]
    tensors = {group: load_file(last / f"{group}.safetensors") for group in ("model", "optim")}
    metrics = [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(out / "metrics.jsonl")]
    record = read_record(out / "record.json")
    return last.name, tensors, metrics, record["results"], record["skipped_steps"]


def assert_same(a, b):
    assert a[0] == b[0] and a[2:] == b[2:]
    for group in ("model", "optim"):
        assert a[1][group].keys() == b[1][group].keys()
        for name, tensor in a[1][group].items():
            assert tensor.tobytes() == b[1][group][name].tobytes(), name


def saved_buffers(out):
    return load_tensors(latest(out / "checkpoints").path / "buffers.safetensors")
