"""The command line under torchrun: two ranks train, stop on SIGTERM, and go on."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.tools.tiny import tiny_config
from thriftlab.train.checkpoints.reader import latest
from thriftlab.train.records.record import read_record

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_two_ranks_stop_and_resume(tiny_data, tmp_path):
    out = tmp_path / "out"
    config = tiny_config(tiny_data, out, budget={"tokens": 300 * 8 * 32}, checkpoint={"every": 0})
    (tmp_path / "run.json").write_text(json.dumps(config.model_dump(mode="json")))
    command = [*TORCHRUN, "-m", "thriftlab.launch", "train", "--config", str(tmp_path / "run.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):  # until the first step is made
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "the same command resumes" in said and "Traceback" not in said.split("the same command resumes")[0]
    stopped = latest(out / "checkpoints").step
    assert 0 < stopped < 300 and not (out / "record.json").exists()

    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    record = read_record(out / "record.json")
    assert (record["world"], record["budget"]["steps"]) == (2, 300)
    assert done.stdout.count("held-out loss") == 1
