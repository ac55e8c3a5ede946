"""What the checks of a GPU do, rehearsed on a CPU with small sizes, and what they call wrong."""

import json
import math
import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.tools import gang
from thriftlab.data.files import finite
from thriftlab.launch.gpu import agree, kernels, machine, methods, model, one, pair, ranks, runs
from thriftlab.launch.gpu.overlap import overlap
from thriftlab.launch.gpu.setting import Finding, Setting
from thriftlab.launch.gpu.trace import Trace
from thriftlab.launch.kernel_cases import Case
from thriftlab.launch.peers import variants
from thriftlab.launch.probe import made_up_text, opened
from thriftlab.optim import LAYERS, METHODS
from thriftlab.train.backends import BACKENDS
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.loop import run
from thriftlab.train.micro_batch import Need

pytestmark = pytest.mark.slow
RANK = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return made_up_text(tmp_path_factory.mktemp("text") / "text", documents=60)


@pytest.fixture
def setting(text, tmp_path):
    return Setting(CPU, True, text, tmp_path)


def last(body, setting):
    """The last line of a check, as the file has it."""
    *_, line = one.lines(body, setting)
    return json.loads(json.dumps(finite(line), allow_nan=False))


def test_machine(setting):
    line = last(machine.machine, setting)
    assert line["numbers"]["versions"]["torch"] == torch.__version__ and "device=cpu" in line["says"]


def test_kernels_where_none_runs(setting):
    line = last(kernels.kernels, setting)
    assert line["status"] == "ok"
    cases = line["numbers"]["cases"]
    assert len(cases) >= 13 and all(len(case["seconds"]["torch"]) == kernels.ROUNDS for case in cases)


@pytest.mark.parametrize(("found", "status"), [(1.0, "ok"), (1.1, "wrong"), (math.nan, "wrong"), (None, "wrong")])
def test_a_kernel_that_differs_or_fails_is_wrong(setting, monkeypatch, found, status):
    def way():
        if found is None:
            raise RuntimeError("an illegal memory access")
        return [torch.tensor([found])]

    case = Case("some", 1e-3, {"torch": lambda: [torch.ones(1)], "triton": way, "compiled": lambda: 1 / 0})
    monkeypatch.setattr(kernels, "cases", lambda device, small: [case])
    line = last(kernels.kernels, setting)
    assert line["status"] == status
    assert not line["wrong"] or "some: triton" in line["wrong"][0]


def test_layers(setting):
    line = last(methods.layers, setting)
    assert line["status"] == "ok", line["wrong"]
    stepped = line["numbers"]["losses"]
    assert {label.split()[0] for label in stepped} == set(LAYERS)
    assert {f"lost init_gain={gain}" for gain in (None, 1.0, "dense")} <= set(stepped)
    assert "lowrank init=svd init_gain=dense" in stepped
    assert all(math.isfinite(loss) for losses in stepped.values() for loss in losses)


def test_a_layer_that_cannot_be_made_is_wrong_and_the_others_go_on(setting, monkeypatch):
    cases = [{"name": "lost", "rank": -1}, {"name": "dense"}]
    monkeypatch.setattr(methods, "layer_cases", lambda: iter(cases))
    line = last(methods.layers, setting)
    assert line["status"] == "wrong" and len(line["wrong"]) == 1 and line["wrong"][0].startswith("lost rank=-1: ")
    assert set(line["numbers"]["losses"]) == {"dense"}
    monkeypatch.setattr(methods, "layer_cases", lambda: iter(cases[:1]))
    assert last(methods.layers, setting)["status"] == "wrong", "the last of them, too"
    monkeypatch.setattr(methods, "layer_cases", lambda: iter(cases[1:]))
    monkeypatch.setattr(methods, "loss_of", lambda run, numbers: math.nan)
    assert "dense: loss [nan, nan]" in last(methods.layers, setting)["wrong"]


def test_methods(setting, monkeypatch):
    refreshes, modes = [], []
    step = methods.make

    def noted(name, groups, hyper, gap):
        refreshes.append(gap)
        return step(name, groups, hyper, gap)

    monkeypatch.setattr(methods, "make", noted)
    monkeypatch.setattr(methods, "no_waiting", lambda device: modes.append(device) or nullcontext())
    line = last(methods.methods, setting)
    assert line["status"] == "ok", line["wrong"]
    done = line["numbers"]["done"]
    assert {label.split()[0] for label in done} == set(METHODS) and set(refreshes) == {1}
    assert {"adamw fp32", "adamw 8bit", "adamw state_dtype=bf16", "signsgd"} <= set(done)
    assert sum(label.endswith((" fp32", " bf16", " 8bit")) for label in done) == 3 * (len(variants()) - 2)
    assert modes == [CPU] * len(done), "the plain step of each may not wait"


def test_a_method_that_waits_is_wrong(setting, monkeypatch):
    monkeypatch.setattr(methods, "method_cases", lambda: iter([("a", "adamw", {}), ("b", "signsgd", {})]))

    class Refusing:
        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError("called a synchronizing CUDA operation\nmore")

    monkeypatch.setattr(methods, "no_waiting", lambda device: Refusing())
    wrong = last(methods.methods, setting)["wrong"]
    assert wrong == [f"{label}: RuntimeError: called a synchronizing CUDA operation" for label in "ab"]


def test_launches(setting):
    line = last(methods.launches, setting)
    rows = line["numbers"]["methods"]
    assert line["status"] == "ok" and set(rows) == set(variants()) and line["numbers"]["matrices"] == 7
    assert all(row["launches"] > 0 and row["per_matrix"] == row["launches"] / 7 for row in rows.values())


def test_refresh(setting, monkeypatch):
    line = last(methods.refresh, setting)
    assert line["status"] == "ok", line["wrong"]
    assert set(line["numbers"]["matrices"]) == {f"{k} {s}" for k in ("svd", "warm_svd") for s in ("96x96", "128x96")}
    monkeypatch.setattr(methods, "refresher", lambda *_: lambda: {"vectors": torch.eye(96)[:, :8]})
    assert len(last(methods.refresh, setting)["wrong"]) == 4


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_a_matrix_of_known_vectors(shape):
    matrix, vectors = methods.known_vectors(shape, 3, CPU)
    assert matrix.shape == shape
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    short = right.T if shape[0] >= shape[1] else left
    assert torch.allclose((short[:, :3].T @ vectors).abs(), torch.eye(3, dtype=torch.float64), atol=1e-5)
    assert values[2] / values[3] == pytest.approx(1.1 * 4 / 3, rel=1e-5)
    turned = torch.tensor([[1.0, 0], [0, 1], [0, 0]]), torch.tensor([[1.0, 0], [0, 0.8], [0, 0.6]])
    assert methods.angle(*(t.double() for t in turned)) == pytest.approx(0.6)


def test_agree(setting):
    line = last(agree.agree, setting)
    assert line["status"] == "ok", line["wrong"]
    rows = line["numbers"]["methods"]
    assert set(rows) == set(variants()) and all(row["far"] == 0 for row in rows.values())
    assert all(rows[label]["integers"] for label in rows if "columns" in label or "rows" in label)


def test_a_device_that_does_something_else_is_wrong(setting, monkeypatch):
    one_of = dict(list(variants().items())[:1])
    monkeypatch.setattr(agree, "variants", lambda: one_of)
    answers = iter([([1.0, 2.0], {"w/count": torch.tensor(3)}), ([1.0, 2.001], {"w/count": torch.tensor(4)})])
    monkeypatch.setattr(agree, "trained", lambda *_: next(answers))
    loss, integer = last(agree.agree, setting)["wrong"]
    assert "1.0e-03 nats from the CPU's" in loss and "1 integers of the state differ, as w/count" in integer


def test_speed(setting):
    line = last(model.speed, setting)
    assert line["status"] == "ok" and "MFU not known" in line["says"]
    assert {"eager", "compiled"} == set(line["numbers"])
    assert all(row["tokens_per_second"] > 0 and row["attention"] for row in line["numbers"].values())


def stand_ins(monkeypatch, kernels, loss=5.0):
    """A GPU of 100 GB on which a step takes a tenth of a second, needs 60 GB and launches these kernels."""
    parts = SimpleNamespace(flops_per_token=1e10)
    monkeypatch.setattr(model, "opened", lambda config: nullcontext(parts))
    monkeypatch.setattr(model, "stepper", lambda run: lambda: loss)
    monkeypatch.setattr(model, "loss_of", lambda run, loss: loss)
    monkeypatch.setattr(model, "timer", lambda device: lambda call: 0.1)
    monkeypatch.setattr(model, "traced", lambda call, device: Trace(kernels, 1.0, 0.9))
    monkeypatch.setattr(model, "peak_allocation", lambda call, device: 10**9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 73 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100 * 10**9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_mfu_is_printed_beside_half(setting, monkeypatch):
    stand_ins(monkeypatch, Counter({"pytorch_flash::flash_fwd_kernel": 1, "gemm": 3}))
    line = last(model.speed, replace(setting, device=CUDA, small=False))
    share = 16384 / 0.1 * 1e10 / 989.5e12  # 165 %: no step is that fast
    assert line["status"] == "ok" and f"MFU {share:.1%}, at or above 50%" in line["says"]
    monkeypatch.setattr(model, "timer", lambda device: lambda call: 0.5)
    assert f"MFU {share / 5:.1%}, below 50%" in last(model.speed, replace(setting, device=CUDA, small=False))["says"]


def test_attention_without_flash_is_wrong(setting, monkeypatch):
    stand_ins(monkeypatch, Counter({"softmax_warp_forward": 1}))
    given = replace(setting, device=CUDA, small=False)
    wrong = last(model.speed, given)["wrong"]
    assert len(wrong) == 2 and "no kernel of flash attention ran, but softmax_warp_forward" in wrong[0]
    wrong = last(model.attention, given)["wrong"]
    assert len(wrong) == 4 and all("neither flash nor flex" in said for said in wrong)


def test_attention(setting):
    line = last(model.attention, setting)
    assert line["status"] == "ok", line["wrong"]
    causal, grouped = "causal", "causal, grouped"
    assert set(line["numbers"]) == {causal, grouped, "document mask", "document mask, grouped"}
    for row in line["numbers"].values():
        assert 0 < abs(row["loss"] - row["loss_of_cpu"]) < 0.02, "bf16 beside fp32"
    assert line["numbers"][causal]["loss"] != line["numbers"][grouped]["loss"]


def test_memory(setting):
    line = last(model.memory, setting)
    assert (
        line["status"] == "ok" and line["says"].startswith("2 x 16: peak") and line["says"].endswith("4 rows: they fit")
    )
    assert 0 < line["numbers"]["planned_bytes"] < 10 * line["numbers"]["peak_bytes"]


def test_a_peak_that_is_not_planned_and_a_size_that_should_not_fit(setting, monkeypatch):
    """As on a GPU of 80 GB with stand-ins for it: 20 GB stay, and a window needs 4 GB."""
    stand_ins(monkeypatch, Counter())
    weights = SimpleNamespace(parameters=lambda: [SimpleNamespace(nbytes=5 * 10**9)])
    config = SimpleNamespace(train=SimpleNamespace(micro_batch_size=48))
    parts = runs_of(dataset=None, model=weights, config=config, micro_batch_size=None)
    monkeypatch.setattr(model, "opened", lambda config: nullcontext(parts))
    monkeypatch.setattr(model, "make_model", lambda config, dataset: (None, None))
    monkeypatch.setattr(model, "need_of", lambda *_: Need(fixed=10**9, window=4 * 10**9))
    monkeypatch.setattr(model, "kept_bytes", lambda run: 15 * 10**9)
    monkeypatch.setattr(model, "free_bytes", lambda device: 75 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 20 * 10**9)
    monkeypatch.setattr(model, "peak_allocation", lambda call, device: 49 * 10**9)
    given = replace(setting, device=CUDA, small=False)

    def step(run):
        def call():
            if run.micro_batch_size > 12:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
            return 5.0

        return call

    monkeypatch.setattr(model, "stepper", step)
    line = last(model.memory, given)
    assert line["status"] == "ok" and line["numbers"]["rows"] == 12, line
    assert line["says"].startswith(
        "12 x 2048: peak 69.0 GB, planned 69.0 GB; 48 rows: the memory of the GPU is not enough"
    )
    assert "train.micro_batch_size" in line["says"]
    monkeypatch.setattr(model, "stepper", lambda run: lambda: 5.0)
    monkeypatch.setattr(model, "peak_allocation", lambda call, device: 69 * 10**9)
    peak, message = last(model.memory, given)["wrong"]
    assert "1.29 of what is planned" in peak and "48 rows ended in no message, though 213 GB are planned" in message


def runs_of(**parts):
    return make_dataclass("Run", parts)(**parts)


def test_machine_on_a_gpu(setting, monkeypatch):
    stand_ins(monkeypatch, Counter())
    for name, value in (("is_available", True), ("get_device_capability", (9, 0)), ("get_arch_list", ["sm_90"])):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(machine, "product_error", lambda device: 1e-6)
    monkeypatch.setattr(machine, "nccl", lambda: "2.29.7")
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    line = last(machine.machine, replace(setting, device=CUDA))
    assert line["numbers"]["peak_flops"] == 989.5e12
    assert line["says"].startswith("NVIDIA H100 80GB HBM3, 100 GB, torch") and "driver 580.1" in line["says"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA X1")
    monkeypatch.setattr(machine, "product_error", lambda device: 0.01)
    monkeypatch.setattr(machine, "compiler", lambda: None)
    wrong = last(machine.machine, replace(setting, device=CUDA))["wrong"]
    assert ["c compiler" in wrong[0], "peak of 'NVIDIA X1'" in wrong[1], "wrong by 1.0e-02" in wrong[2]] == [True] * 3


def test_the_driver_is_asked_and_may_not_answer(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.driver() is None
    for script, version in (("echo 580.159.03", "580.159.03"), ("exit 9", None), ("true", None)):
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        assert machine.driver() == version


def test_a_product_of_matrices():
    assert machine.product_error(CPU) < 1e-6


def test_checkpoint(setting, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    line = last(runs.checkpoint, setting)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "what deterministic products on a GPU need"
    assert line["status"] == "ok" and line["numbers"]["bitwise"] is True
    assert line["numbers"]["bytes"] > 0 and line["numbers"]["blocked_seconds"] >= 0


def test_other_bits_after_a_resume_are_wrong(setting, monkeypatch):
    answers = iter([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
    monkeypatch.setattr(runs, "run", lambda config: None)
    monkeypatch.setattr(runs, "killed", lambda config: 4)
    monkeypatch.setattr(runs, "last_weights", lambda config: next(answers))
    line = last(runs.checkpoint, setting)
    assert line["status"] == "wrong" and "other weights than an unbroken one" in line["wrong"][0]


class InThisProcess:
    """A stand-in for torchrun with one rank, which would take seconds to start."""

    code = 0

    def __init__(self, config, world, folder):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": gang.free_port()}
        given = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, **address}
        os.environ.update({key: str(value) for key, value in given.items()})
        try:
            run(config)
        finally:
            for key in given:
                del os.environ[key]

    def wait(self):
        return self.code


def test_ranks(setting, monkeypatch):
    monkeypatch.setattr(ranks, "torchrun", InThisProcess)
    ends = [lambda: Finding("a", {"first": 1}), lambda: Finding("b", {"second": 2})]
    monkeypatch.setattr(ranks, "started_pairs", lambda setting: ends)
    line = last(ranks.ranks, setting)
    assert line["status"] == "ok" and line["numbers"]["backends"]["owned"]["far"] == 0
    assert line["numbers"]["first"] == 1 and line["says"] == "1 on the CPU; a; b"
    assert len(line["numbers"]["single"]) == 2
    names = [" ".join(map(str, case.values())) for case in ranks.backend_cases()]
    assert {"ddp", "owned", "deepspeed 1", "deepspeed 2", "deepspeed 3"} <= set(names)
    assert {name.split()[0] for name in names} == set(BACKENDS) - {"single"}


def test_ranks_that_fail_or_differ_are_wrong(setting, monkeypatch):
    def failing(config, world, folder):
        runs.Path(config.out).with_suffix(".log").write_text("a\nerror: no NCCL\nb\n")
        return SimpleNamespace(wait=lambda: 1)

    monkeypatch.setattr(ranks, "torchrun", failing)
    monkeypatch.setattr(ranks, "run", lambda config: None)
    monkeypatch.setattr(ranks, "started_pairs", lambda setting: [lambda: Finding("", wrong=["it waits"])])
    losses = iter([[5.0, 4.0], [5.0, 4.1]])
    monkeypatch.setattr(ranks, "losses_of", lambda config: next(losses))
    assert last(ranks.ranks, setting)["wrong"] == ["owned: exit code 1: error: no NCCL | b", "it waits"]
    losses = iter([[5.0, 4.0], [5.0, 4.1]])
    monkeypatch.setattr(ranks, "torchrun", lambda *_: SimpleNamespace(wait=lambda: 0))
    assert "1.0e-01 nats from one process's" in last(ranks.ranks, setting)["wrong"][0]


class Forked(gang.Forked):
    """A rank without the seconds that torch takes to import."""

    def __init__(self, command, stdout, stderr, env):
        super().__init__(command, stdout, {key: env[key] for key in RANK if key in env})

    def kill(self):
        self.process.kill()


def test_a_rank_whose_peer_is_killed_ends_and_says_why(setting, monkeypatch):
    """Through gloo, which notices at once; on GPUs it takes as long as `backend.timeout`."""
    monkeypatch.setattr(pair, "start", Forked)
    monkeypatch.setattr(pair, "GRACE", 300)  # of a machine with other work
    found = pair.bereaved(setting)()
    assert not found.wrong, found
    killed = found.numbers["killed_peer"]
    assert killed["code"] == 2 and len(killed["lines"]) == 1
    assert "another rank's connection closed: it crashed or was killed" in killed["lines"][0]


@pytest.mark.parametrize(("log", "code", "wrong"), [
    ("a\nerror: rank 0 of 2: another rank's connection closed\nb", 2, None),
    ("[rank0]:[E1130] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3", -6, None),
    ("error: no\n", None, "still waits after 20 s, backend.timeout is 8 s"),
    ("Traceback\n", 1, "ended with code 1 and no line that says why"),
    ("error: no\n", 0, "ended with code 0"),
])  # fmt: skip
def test_how_a_rank_ends_whose_peer_is_killed(log, code, wrong):
    found = pair.last_words(log, code, 20.0)
    assert (wrong is None) == (not found.wrong) == bool(found.says) and all(wrong in said for said in found.wrong)


def overlap_of(config):
    with opened(RunConfig.model_validate(config)) as run:
        return overlap(run)


def test_how_much_of_the_sums_backward_hides(setting, monkeypatch):
    config = {}

    def start(words, logs):
        config.update(json.loads(Path(words[1]).read_text()))
        Path(words[2]).write_text(json.dumps(gang.ranks(2, overlap_of, config)[0]))
        return [SimpleNamespace(wait=lambda: 0)] * 2

    monkeypatch.setattr(pair, "pair", start)
    found = pair.hidden(setting)()
    assert (
        set(found.numbers["overlap"]) == {"alone", "during", "after", "hidden"} and config["backend"]["name"] == "owned"
    )
    half = pair.told({"alone": 0.010, "during": 0.012, "after": 0.014})
    assert half.says == "sums of 4.0 ms, 50% of them hidden by backward" and not half.wrong
    assert pair.told({"alone": 0.010, "during": 0.016, "after": 0.014}).wrong
    monkeypatch.setattr(pair, "pair", lambda words, logs: [SimpleNamespace(wait=lambda: 1)] * 2)
    pair.log_of(setting.folder / "overlap", "0").write_text("x\nerror: no NCCL\n")
    assert pair.hidden(setting)().wrong == ["overlap: exit codes [1, 1]: x | error: no NCCL"]


def test_rates(setting):
    line = last(runs.rates, setting)
    assert line["status"] == "ok" and line["numbers"]["loss"] < 6
    assert all(line["numbers"][name] > 0 for name in ("loader", "training", "evaluation"))
