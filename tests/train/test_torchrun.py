"""The command line under torchrun: two ranks train, stop on SIGTERM, and go on."""

import json
import signal
import subprocess
import sys

import pytest

from tests.tools.tiny import tiny_config
from tests.tools.waiting import PATIENCE, before_step, until
from thriftlab.train.checkpoints.reader import latest
from thriftlab.train.records.record import read_record

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
UNTIL_TOLD = """
if list(Path(__file__).parent.glob("out/checkpoints/step-*")):  # the second time
    return
heard, note = [], signal.getsignal(signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda number, frame: (heard.append(number), note(number, frame)))
Path(__file__).with_name("waits-" + os.environ["RANK"]).touch()
while not heard:
    time.sleep(0.01)
"""


def test_two_ranks_stop_and_resume(tiny_data, tmp_path):
    out, waits = tmp_path / "out", before_step(tmp_path / "waits.py", 5, UNTIL_TOLD)
    config = tiny_config(tiny_data, out, budget={"tokens": 20 * 8 * 32}, checkpoint={"every": 0}, plugins=[waits])
    (tmp_path / "run.json").write_text(json.dumps(config.model_dump(mode="json")))
    command = [*TORCHRUN, "-m", "thriftlab.launch", "train", "--config", str(tmp_path / "run.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: all((tmp_path / f"waits-{rank}").exists() for rank in range(2)), process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=PATIENCE)
    assert "the same command resumes" in said and "Traceback" not in said.split("the same command resumes")[0]
    stopped = latest(out / "checkpoints").step
    assert 0 < stopped < 20 and not (out / "record.json").exists()

    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    record = read_record(out / "record.json")
    assert (record["world"], record["budget"]["steps"]) == (2, 20)
    assert done.stdout.count("held-out loss") == 1
