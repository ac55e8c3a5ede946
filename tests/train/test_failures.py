"""A rank that is killed, hangs or is refused: a message that says so, in bounded time, and a run that goes on."""

import json
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from tests.tools import gang
from tests.tools.runs import assert_same, run_status, traces
from tests.tools.tiny import tiny_config
from tests.tools.waiting import PATIENCE, before_step
from thriftlab.train import loop
from thriftlab.train.backends import rendezvous
from thriftlab.train.config.schema import RunConfig

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(config, file, *options):
    file.write_text(json.dumps(config.model_dump(mode="json")))
    command = [*TORCHRUN, *options, "-m", "thriftlab.launch", "train", "--config", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


DIES = """
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    while not list(Path(__file__).parent.glob("broken/checkpoints/step-*")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_rank_costs_a_restart_from_the_last_checkpoint(tiny_data, tmp_path):
    longer = {"budget": {"tokens": 24 * 8 * 32}, "checkpoint": {"every": 10, "keep": 2}}
    dies = before_step(tmp_path / "dies.py", 14, DIES)
    whole, broken = (tiny_config(tiny_data, tmp_path / name, **longer) for name in ("whole", "broken"))
    broken = broken.model_copy(update={"plugins": (dies,)})
    process = torchrun(broken, tmp_path / "run.json", "--max-restarts", "1")
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert list(tmp_path.glob("broken/checkpoints/step-00000024"))
    assert "another rank's connection closed: it crashed or was killed" in said and "Traceback" not in said
    assert (tmp_path / "broken" / "status").read_text() == "done\n"
    gang.ranks(2, run_status, whole.model_dump())
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))


def hang(tree, step):
    """The second rank stops moving in that step."""
    plain, seen = loop.one_step, []

    def one_step(*parts):
        seen.append(parts)
        if os.environ["RANK"] == "1" and len(seen) == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        return plain(*parts)

    loop.one_step = one_step
    try:
        loop.run(RunConfig.model_validate(tree))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_within_the_timeout(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "out", backend={"timeout": 6.0})
    address = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": gang.free_port()}
    (first, said), (second, _) = (
        gang.start(hang, config.model_dump(), 3, RANK=rank, LOCAL_RANK=rank, **address) for rank in (0, 1)
    )
    try:
        assert said.poll(PATIENCE), "the other rank waits for ever"
        message = said.recv()
    finally:
        second.kill()
        first.kill()
    assert message.startswith("LostRank: rank 0 of 2: no answer within backend.timeout = 6 s; rank 1 hangs")
    assert f"newest checkpoint in {tmp_path / 'out'}, start the same command again" in message
    assert (tmp_path / "out" / "status").read_text() == "failed\n"


NCCL = "NCCL error in: ../csrc/ProcessGroupNCCL.cpp:3356, {}, NCCL version 2.27.3\n{}"


@pytest.mark.parametrize(
    "said, message",
    [
        (NCCL.format("unhandled cuda error", "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda "
                     "failure 2 'out of memory'"), "NCCL failed: Cuda failure 2 'out of memory' (NCCL_DEBUG=INFO says"),
        (NCCL.format("remote process exited or there was a network error", "ncclRemoteError: A call failed"),
         "another rank's connection closed"),
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]", "another rank's connection closed"),
    ],
)  # fmt: skip
def test_what_nccl_says_is_passed_on(said, message, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(rendezvous.LostRank, match=re.escape(message)) as caught:
        with rendezvous.named_losses("runs/x", 600):
            raise torch.distributed.DistBackendError(said) if "NCCL" in said else RuntimeError(said)
    assert "\n" not in str(caught.value) and "start the same command again" in str(caught.value)


def test_a_rank_that_never_comes_is_named(monkeypatch):
    monkeypatch.setattr(rendezvous.distributed_c10d, "default_pg_timeout", timedelta(seconds=600))
    clock = SimpleNamespace(monotonic=iter(range(0, 10_000, 200)).__next__, sleep=lambda seconds: None)
    monkeypatch.setattr(rendezvous, "time", clock)
    with pytest.raises(rendezvous.LostRank, match="rank 1 and rank 2 did not start within backend.timeout"):
        rendezvous.meet("127.0.0.1", gang.free_port(), 0, 3)


def meet_twice(word):
    """The word of a start, after a dead one has left its keys in the same store."""
    host = torch.distributed.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=os.environ["RANK"] == "0")
    if os.environ["RANK"] == "0":
        for rank in range(2):
            host.set(f"hello/{rank}", f"dead {rank}")
            host.set(f"welcome/dead {rank}", "dead")
        host.set("all dead", "")
    host.wait(["all dead"])  # else the last of the dead might write over a hello of the living
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    store = rendezvous.meet("127.0.0.1", int(os.environ["MASTER_PORT"]), int(os.environ["RANK"]), 2)
    store.set(f"{word}/{os.environ['RANK']}", os.environ["RANK"])
    met = [store.get(f"{word}/{rank}") for rank in range(2)]
    store.set(f"{word}/{os.environ['RANK']} has read", "")
    if os.environ["RANK"] == "0":  # the store ends with its host
        store.wait([f"{word}/1 has read"])
    return met


def test_a_new_start_does_not_meet_the_dead(monkeypatch):
    assert gang.ranks(2, meet_twice, "here") == [[b"0", b"1"]] * 2


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_its_message_and_no_pages_of_trace(tmp_path):
    process = torchrun(tiny_config(tmp_path / "none", tmp_path / "out"), tmp_path / "run.json")
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and f"error: {tmp_path / 'none'}" in said
    assert f"traceback : {tmp_path / 'none'}" in said, said  # torchrun's summary has it too
    assert said.count("Traceback") <= 1 and len(said.splitlines()) < 60, said


@pytest.mark.parametrize("torchrun, code", [(False, 143), (True, 0)])
def test_a_stop_file_is_no_crash_to_torchrun(tiny_data, tmp_path, monkeypatch, torchrun, code):
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "STOP").touch()
    with pytest.raises(loop.Interrupted, match="as .*STOP asks; without it the same command resumes") as stopped:
        loop.run(tiny_config(tiny_data, tmp_path / "out"))
    assert stopped.value.code == code
    assert (tmp_path / "out" / "status").read_text() == "preempted\n"
