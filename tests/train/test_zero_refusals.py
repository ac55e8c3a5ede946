"""What DeepSpeed would do wrong or nobody has proved right is refused, with the reason and what works."""

import dataclasses
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.tools import zero_cases
from thriftlab.data.errors import BackendError
from thriftlab.optim.core.fragments import Fragment
from thriftlab.train.backends import make_backend
from thriftlab.train.backends.zero.engine import engine_settings, merged, overlapped
from thriftlab.train.backends.zero.layout import VERSION, Layout, refuse, verify
from thriftlab.train.backends.zero.optimizer import ShardedMethod
from thriftlab.train.config.schema import RunConfig

OVERLAP = {"zero_optimization": {"overlap_comm": True}}


def layout(*places, flat=None):
    flat = torch.arange(12.0) if flat is None else flat
    return Layout(flat, {f.name: (f, at) for f, at in places})


MODEL = {"a": torch.arange(6.0), "b": torch.arange(6.0, 12.0)}
SHAPES = {"a": (2, 3), "b": (6,)}
RIGHT = [(Fragment("a", (2, 3), 0, 6), 0), (Fragment("b", (6,), 0, 6), 6)]


def test_a_layout_is_compared_with_the_model():
    assert verify(layout(*RIGHT), SHAPES, MODEL.__getitem__, lambda said: [said]) == [[f for f, _ in RIGHT]]


@pytest.mark.parametrize(
    "places, message",
    [
        ([RIGHT[0], (RIGHT[1][0], 5)], "'b': entries 0 to 6 are not the model's"),
        ([RIGHT[0]], "'b': entries 0 to 6 are held by nobody"),
        ([RIGHT[0], (Fragment("b", (6,), 2, 6), 8)], "'b': entries 0 to 2 are held by nobody"),
        ([*RIGHT, (Fragment("c", (6,), 0, 6), 6)], "'c'.* not parameters"),
    ],
)
def test_a_layout_that_is_not_the_models_is_refused(places, message):
    with pytest.raises(BackendError, match=message):
        verify(layout(*places), SHAPES, MODEL.__getitem__, lambda said: [said])


def test_entries_that_two_ranks_hold_are_refused():
    with pytest.raises(BackendError, match="held twice"):
        verify(layout(*RIGHT), SHAPES, MODEL.__getitem__, lambda said: [said, said])


def test_values_that_differ_on_another_rank_only_are_refused_here_too():
    with pytest.raises(BackendError, match="'b': entries 0 to 3 are not"):
        share = lambda said: [said, ([], ["'b': entries 0 to 3 are not the model's"])]  # noqa: E731
        verify(layout(*RIGHT), SHAPES, MODEL.__getitem__, share)


@dataclasses.dataclass
class Zero:
    offload_optimizer: object = None
    offload_param: object = None
    round_robin_gradients: bool = False
    zero_hpz_partition_size: int = 1
    zero_quantized_gradients: bool = False
    zero_quantized_weights: bool = False


def engine(load_universal_checkpoint=False, has_moe_layers=False, mpu=None, optimizer=None, bits=(), **zero):
    config = SimpleNamespace(
        load_universal_checkpoint=load_universal_checkpoint, zero_config=Zero(**zero),
        bfloat16_config=SimpleNamespace(enabled="bf16" in bits), float16_config=SimpleNamespace(enabled="fp16" in bits),
    )  # fmt: skip
    ours = object()
    return SimpleNamespace(
        _config=config, has_moe_layers=has_moe_layers, mpu=mpu, sequence_parallel_size=1,
        basic_optimizer=ours, optimizer=optimizer or ours,
    )  # fmt: skip


class DeepSpeedZeroOptimizer:
    pass


@pytest.mark.parametrize(
    "what, message",
    [
        ({"load_universal_checkpoint": True}, "universal checkpoint"),
        ({"has_moe_layers": True}, "mixture of experts"),
        ({"mpu": object()}, "parallelism"),
        ({"bits": ["bf16"]}, "bf16 or fp16 section.*torch_autocast"),
        ({"bits": ["fp16"]}, "bf16 or fp16 section.*torch_autocast"),
        ({"optimizer": SimpleNamespace()}, "SimpleNamespace.*torch_autocast"),
        ({"optimizer": DeepSpeedZeroOptimizer()}, f"has no single_partition.*deepspeed=={VERSION}"),
        ({"offload_optimizer": SimpleNamespace(device="cpu")}, "offloading"),
        ({"round_robin_gradients": True}, "round_robin"),
        ({"zero_hpz_partition_size": 2}, "hpZ"),
        ({"zero_quantized_weights": True}, "quantised"),
    ],
)
def test_what_is_not_proved_is_refused(what, message):
    refuse(engine())
    with pytest.raises(BackendError, match=message):
        refuse(engine(**what))


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("deepspeed.__version__", "0.20.0")
    with pytest.raises(BackendError, match=f"version 0.20.0.*deepspeed=={VERSION}"):
        refuse(engine())


def test_an_optimizer_that_nobody_attached_does_not_stand_still():
    net, method = zero_cases.build("galore")
    sharded = ShardedMethod(method, net)
    sharded.step()  # as DeepSpeed does once, before there are gradients
    net(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    with pytest.raises(RuntimeError, match="attach"):
        sharded.step()


def test_a_parameter_that_nobody_trains_is_refused():
    net, method = zero_cases.build("galore")
    net.norm.weight.requires_grad_(False)
    with pytest.raises(BackendError, match="does not train 'norm.weight'; use .*backend.name=owned"):
        ShardedMethod(method, net)


def test_deepspeeds_own_checkpoint_is_refused():
    net, method = zero_cases.build("galore")
    with pytest.raises(RuntimeError, match="save_checkpoint"):
        ShardedMethod(method, net).state_dict()


def test_settings_of_the_user_are_added_and_ours_stay():
    ours = engine_settings(1, "fp32")
    assert merged(ours, OVERLAP)["zero_optimization"] == {**ours["zero_optimization"], "overlap_comm": True}
    for theirs in ({"gradient_clipping": 1.0}, {"zero_optimization": {"stage": 2}}):
        with pytest.raises(BackendError, match="backend.settings"):
            merged(ours, theirs)


def test_gradients_are_reduced_during_backward_unless_somebody_says_otherwise():
    for stage in (1, 2):
        zero = overlapped(engine_settings(stage, "fp32"))["zero_optimization"]
        assert zero["overlap_comm"] and zero["stage"] == stage and zero["reduce_bucket_size"] == 2**26
        theirs = {"zero_optimization": {"overlap_comm": False}}
        assert not overlapped(merged(engine_settings(stage, "fp32"), theirs))["zero_optimization"]["overlap_comm"]
    for stage in (0, 3):
        assert overlapped(engine_settings(stage, "fp32")) == engine_settings(stage, "fp32")


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(
    "theirs, message",
    [
        ({"bf16": {"enabled": True}}, r"set bf16: .*train\.precision=bf16"),
        ({"fp16": {"enabled": True}}, r"set fp16: .*train\.precision=bf16"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"set zero_optimization\.offload_opt.*stage"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, r"set zero_optimization\.offload_param.*stage"),
        ({"expert_parallel": {"enabled": True}}, "set expert_parallel: .*dense"),
        ({"checkpoint": {"load_universal": True}}, "set checkpoint: .*resume the run"),
        ({"elasticity": {"enabled": True}}, "set elasticity: .*resume the run"),
        ({"optimizer": {"type": "Adam"}}, r"set optimizer: .*optim\.name"),
        ({"gradient_accumulation_steps": 2}, r"set gradient_accumulation_steps: .*train\.micro_batch_size"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_ranks_meet(stage, theirs, message):
    with pytest.raises(BackendError, match=message):
        make_backend("deepspeed", stage=stage, settings=theirs)


@pytest.mark.parametrize(
    "theirs, message",
    [
        ({"zero_optimisation": {}}, "knows no key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ({"steps_per_print": 5, "foo": 1}, "DeepSpeed knows no key 'foo'"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com = True: Extra inputs"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "zero_optimization.reduce_bucket_size = 'big': Input"),
        ({"flops_profiler": {"enable": True}}, "knows no key 'flops_profiler.enable'; did you mean 'enabled'?"),
        ({"aio": {"x": 1}}, "DeepSpeed knows no key 'aio.x'"),
        ({"tensorboard": {"x": 1}}, "tensorboard.x = 1: Extra inputs"),
        ({"flops_profiler": 3}, "DeepSpeed says"),
    ],
)
def test_settings_that_deepspeed_does_not_know_are_refused_in_one_line(theirs, message):
    with pytest.raises(BackendError) as caught:
        make_backend("deepspeed", stage=2, settings=theirs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_settings_that_deepspeed_knows_get_as_far_as_the_ranks():
    theirs = {
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": False},
        "compile": {},
        "data_efficiency": {"enabled": False},
        "bf16": {"enabled": False},
        "zero_optimization": {"offload_optimizer": {"device": "none"}},
    }
    for stage in range(4):
        with pytest.raises(BackendError, match="needs torchrun"):
            make_backend("deepspeed", stage=stage, settings=theirs)
            make_backend("deepspeed", stage=stage, settings=OVERLAP)


def test_what_is_refused_may_be_switched_off():
    """Files that were made for others say so of what they do not use; the engine is told nothing of it."""
    off = {"fp16": {"enabled": False}, "elasticity": {"enabled": False}}
    ours = engine_settings(2, "fp32")
    assert merged(ours, {**off, "zero_optimization": {"offload_param": {"device": "none"}}}) == ours
    for theirs in ({"fp16": {"enabled": "auto"}}, {"fp16": {}}, {"train_batch_size": 0}):
        with pytest.raises(BackendError, match="backend.settings cannot set"):
            merged(ours, theirs)


def test_the_missing_package_names_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        BackendError, match=rf"deepspeed {re.escape(VERSION)}: pip install 'thriftlab\[train\]'; or use"
    ):
        make_backend("deepspeed", stage=1)


@pytest.mark.parametrize(
    "backend", [{"name": "ddp", "stage": 1}, {"stage": 2}, {"name": "owned", "settings": {"a": 1}}]
)
def test_a_stage_belongs_to_a_backend_that_has_stages(backend):
    with pytest.raises(ValueError, match="belongs to deepspeed"):
        RunConfig(backend=backend)
