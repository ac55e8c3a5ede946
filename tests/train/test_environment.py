"""What the environment and the machine say of ranks and devices: taken, or refused in one line."""

import socket
import warnings

import pytest
import torch

from thriftlab.data.errors import BackendError
from thriftlab.launch import cli
from thriftlab.train.backends import device, make_backend
from thriftlab.train.backends.device import choose_device, choose_own_device, warn_of_idle_gpu
from thriftlab.train.backends.environment import OF_RANKS, read_environment
from thriftlab.train.backends.rendezvous import LostRank, meet

TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*OF_RANKS, "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def without(*names, **changes):
    return {key: value for key, value in {**TWO, **changes}.items() if key not in names}


WRONG = [
    ({"RANK": "", "WORLD_SIZE": ""}, "WORLD_SIZE is empty in the environment"),
    ({"RANK": "0"}, "WORLD_SIZE is missing in the environment"),
    ({"LOCAL_RANK": "0"}, "WORLD_SIZE is missing in the environment"),
    ({"RANK": "", "WORLD_SIZE": "1"}, "RANK is empty in the environment"),
    ({"WORLD_SIZE": "2"}, "RANK is missing in the environment"),
    (without(RANK="one"), "RANK = 'one' in the environment is no number"),
    (without(RANK="-1"), "RANK = '-1' in the environment is no number"),
    (without(RANK="2"), "RANK = 2 in the environment is not below WORLD_SIZE = 2"),
    (without(WORLD_SIZE="0"), "WORLD_SIZE = '0' in the environment is no number from 1 on"),
    (without(LOCAL_RANK=""), "LOCAL_RANK is empty in the environment"),
    (without("MASTER_ADDR"), "MASTER_ADDR is missing in the environment"),
    (without(MASTER_ADDR=""), "MASTER_ADDR is missing in the environment"),
    (without("MASTER_PORT"), "MASTER_PORT is missing in the environment"),
    (without(MASTER_PORT="http"), "MASTER_PORT = 'http' in the environment is no number"),
    (without(MASTER_PORT="99999"), "MASTER_PORT = '99999' in the environment is no number"),
]


@pytest.mark.parametrize("variables, message", WRONG)
def test_a_part_of_an_environment_is_refused_in_one_line(variables, message, monkeypatch, capsys, tmp_path):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", f"out={tmp_path}/out"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]
    assert "torchrun" in said[0] and f"unset {next(iter(sorted(variables, key=[*TWO].index)))}" in said[0]


def test_one_rank_of_one_is_one_process(monkeypatch):
    for variables in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"MASTER_ADDR": "x"}):
        for name in OF_RANKS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert read_environment()[:2] == (0, 1) and make_backend("auto").name == "single"


@pytest.mark.parametrize(
    "command", ["compare adamw", "study lost", "submit", "reference run=x", "launch", "bench optim"]
)
def test_commands_that_are_one_process_refuse_to_be_a_rank(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(command.split()) == 2
    assert "is one process and was started as a rank (WORLD_SIZE = 2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert cli.main(command.split()) == 2
    assert "start it without torchrun, or after: unset RANK WORLD_SIZE" in capsys.readouterr().err


def test_a_meeting_point_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LostRank, match=f"MASTER_ADDR = 127.0.0.1, MASTER_PORT = {port}: .*; name the machine"):
            meet("127.0.0.1", port, 0, 2)


# --------------------------------------------------------------------------------------------------------- devices


@pytest.fixture
def gpus(monkeypatch):
    """So many GPUs, of which nothing is asked but their number."""

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    return see


def test_the_device_that_was_asked_for(gpus):
    gpus(0)
    assert str(choose_device("auto")) == str(choose_device("cpu")) == "cpu"
    gpus(2)
    assert [str(choose_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    assert [str(choose_own_device("auto", rank)) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert str(choose_own_device("cpu", None)) == "cpu"
    assert str(make_backend("single", "cuda:1").device) == "cuda:1"


@pytest.mark.parametrize(
    "count, choose, message",
    [
        (0, lambda: choose_device("cuda"), "backend.device = cuda: torch .* without CUDA; .* backend.device=cpu"),
        (2, lambda: choose_device("cuda:2"), r"backend.device = cuda:2: torch sees 2 GPU\(s\), cuda:0 to cuda:1"),
        (
            1,
            lambda: choose_own_device("auto", 1),
            "rank 1 of this machine has no GPU of its own: torch sees 1; start",
        ),
        (2, lambda: choose_own_device("cuda", None), "LOCAL_RANK is missing in the environment"),
        (2, lambda: choose_own_device("cuda:1", 0), "is one GPU, and each rank needs its own"),
    ],
)
def test_a_device_that_cannot_be_had(count, choose, message, gpus, monkeypatch):
    gpus(count)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match=message) as caught:
        choose()
    assert "\n" not in str(caught.value)


def test_what_is_no_device(capsys):
    for wrong in ("gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "0"):
        assert cli.main(["train", f"backend.device={wrong}"]) == 2
        assert "it takes auto, cpu, cuda, or one GPU by its number, as cuda:1" in capsys.readouterr().err


def test_a_gpu_that_is_left_idle_is_said_aloud(gpus, monkeypatch, tmp_path):
    gpus(0)
    monkeypatch.setattr(device, "has_nvidia", lambda: True)
    with pytest.warns(RuntimeWarning, match="this machine has an NVIDIA GPU, but the CPU is used: torch"):
        make_backend("auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_backend("auto", "cpu")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        warn_of_idle_gpu("auto")
    monkeypatch.undo()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.has_nvidia()
