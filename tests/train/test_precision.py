"""What `auto` is on a device, and products in TF32: of the model alone."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from tests.tools.tiny import tiny_config
from thriftlab.data.errors import ConfigError
from thriftlab.optim import Apollo, Fira, Frugal, GaLore, ReLoRA
from thriftlab.optim.core.method import Method
from thriftlab.optim.layers.base import before_step
from thriftlab.optim.state.dense import Orthogonal
from thriftlab.train.backends.device import best_precision
from thriftlab.train.build import set_torch, warn_of_slow_attention
from thriftlab.train.config.schema import TrainConfig, settled
from thriftlab.train.loop import run


def test_auto_is_bf16_on_a_gpu_that_has_it(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    assert best_precision(torch.device("cuda", 0)) == "fp32" and asked == [False], "an emulated one is slow"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert best_precision(torch.device("cuda", 0)) == "bf16"
    assert best_precision(torch.device("cpu")) == "fp32"


def test_a_run_says_what_auto_was(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "out")
    assert config.train.precision == "auto"
    entry = run(config)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert entry["config"]["train"]["precision"] == written["train"]["precision"] == "fp32"


def test_attention_without_flash_is_said_once_and_on_gpus_alone(tiny_data, tmp_path):
    config = settled(tiny_config(tiny_data, tmp_path / "out"), "fp32")
    gpu, other = (SimpleNamespace(device=torch.device("cuda", rank), rank=rank) for rank in (0, 1))
    with pytest.warns(RuntimeWarning, match="does not take the flash kernel: it computes in float32; use train.prec"):
        warn_of_slow_attention(config, gpu)
    masked = tiny_config(tiny_data, tmp_path / "out", data={"document_mask": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slow_attention(config, other)
        warn_of_slow_attention(config, SimpleNamespace(device=torch.device("cpu"), rank=0))
        warn_of_slow_attention(settled(tiny_config(tiny_data, tmp_path / "out"), "bf16"), gpu)
        warn_of_slow_attention(masked, gpu)


def test_tf32_on_a_cpu_is_refused(tiny_data, tmp_path):
    with pytest.raises(ConfigError, match="train.matmul = tf32 is of GPUs, and this run is on a CPU; leave it out"):
        run(tiny_config(tiny_data, tmp_path / "out", train={"matmul": "tf32"}))


@pytest.fixture
def tf32():
    set_torch(TrainConfig(matmul="tf32"))
    yield
    set_torch(TrainConfig())


def test_what_a_run_asks_of_torch(tf32):
    assert torch.get_float32_matmul_precision() == "high"
    set_torch(TrainConfig())
    assert torch.get_float32_matmul_precision() == "highest"


class Watching(Method):
    def update(self, names, weights, grads, states, group):
        self.seen = torch.get_float32_matmul_precision()
        if group["fails"]:
            raise ValueError("no")

    def spec(self, shape, dtype, **overrides):
        return {}


@pytest.mark.parametrize("fails", [False, True])
def test_the_products_of_an_update_stay_fp32(tf32, fails):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    method = Watching([p], lr=0.1, fails=fails)
    with pytest.raises(ValueError) if fails else torch.no_grad():
        method.step()
    assert method.seen == "highest" and torch.get_float32_matmul_precision() == "high"


class Seeing(Orthogonal):
    """A subspace that writes down how exact products are when they are made."""

    def __init__(self):
        super().__init__(rank=2)
        self.seen = []

    def refresh(self, *given):
        self.seen.append(("refresh", torch.get_float32_matmul_precision()))
        return super().refresh(*given)

    def down(self, *given):
        self.seen.append(("down", torch.get_float32_matmul_precision()))
        return super().down(*given)

    def add_up(self, *given):
        self.seen.append(("add_up", torch.get_float32_matmul_precision()))
        return super().add_up(*given)


@pytest.mark.parametrize("method", [GaLore, Fira, Apollo, Frugal])
def test_coordinates_of_a_plain_step_are_products_as_the_models(tf32, method):
    """GaLore, Fira and APOLLO: down and up. A refresh, and what it carries over, stays exact; so does FRUGAL, whose
    rest has signs."""
    subspace, p = Seeing(), torch.nn.Parameter(torch.ones(6, 4))
    optimizer = method([p], lr=0.1, subspace=subspace, on_refresh="project")
    plain = "highest" if method is Frugal else "high"
    for _ in range(2):
        subspace.seen.clear()
        p.grad = torch.randn(6, 4)
        optimizer.step()
    assert ("down", plain) in subspace.seen and {seen for _, seen in subspace.seen} == {plain}
    assert method is Apollo or ("add_up", plain) in subspace.seen
    optimizer.param_groups[0]["gap"] = 1
    subspace.seen.clear()
    optimizer.step()
    assert ("refresh", "highest") in subspace.seen and ("down", "highest") in subspace.seen
    assert torch.get_float32_matmul_precision() == "high"


def test_the_products_of_a_merge_stay_fp32(tf32, monkeypatch):
    model, seen = torch.nn.Sequential(ReLoRA(4, 4, rank=2, merge_every=1)), []
    monkeypatch.setattr(ReLoRA, "load_factors", lambda *given: seen.append(torch.get_float32_matmul_precision()))
    before_step(model, 1, 0)
    assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
