"""The loss by Liger's kernel: what it is given and what is made of its answer, with a stand-in; where it is refused."""

import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from thriftlab.kernels import dispatch
from thriftlab.kernels import linear_cross_entropy as module
from thriftlab.kernels.linear_cross_entropy import linear_cross_entropy


class StandIn:
    """Per-token losses as Liger defines them: targets are -100 or in the vocabulary, hidden and head bf16."""

    @staticmethod
    def apply(hidden, weight, targets):
        assert hidden.dtype == weight.dtype == torch.bfloat16 and hidden.dim() == 2 and targets.dim() == 1
        assert ((targets == -100) | (targets >= 0)).all() and hidden.isfinite().all()
        assert os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] == "0"
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none") + (targets == -100)


@pytest.fixture
def liger(monkeypatch):
    name = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    stand_in = types.ModuleType(name)
    stand_in.LigerFusedLinearScaledCrossEntropyFunction = StandIn
    for part in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(module, "path", lambda t, op: "liger")
    monkeypatch.setattr(dispatch, "ran", {})
    monkeypatch.setenv("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "1")


def run(hidden, weight, targets, upstream):
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(hidden, weight, targets)
    return losses.detach(), *torch.autograd.grad(losses, (hidden, weight), upstream)


def test_it_is_the_loss_of_plain_torch_and_the_record_says_whose(liger, monkeypatch):
    hidden, weight = torch.randn(2, 6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets, upstream = torch.randint(11, (2, 6)), torch.rand(2, 6)
    targets[0, 1], targets[1, 5], targets[1, 0] = -1, -100, -7
    upstream[1, 5] = torch.nan
    with torch.no_grad():
        hidden[0, 1], hidden[1, 5] = torch.nan, torch.inf
    ours = run(hidden, weight, targets, upstream)
    assert dispatch.ran == {"loss kernel": ["liger, head gradient summed in bf16"]}
    monkeypatch.setattr(module, "path", lambda t, op: "torch")
    theirs = run(hidden, weight, targets, upstream)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6)
    assert ours[0][targets < 0].count_nonzero() == ours[1][targets < 0].count_nonzero() == 0


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU with all that Liger's kernel needs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    versions = {"liger-kernel": (0, 8, 5), "nvidia-cutlass-dsl": (4, 6, 1), "apache-tvm-ffi": (0, 1, 12)}
    monkeypatch.setattr(dispatch, "found", lambda name: versions.get(name, ()))
    dispatch.taken.cache_clear()
    yield versions
    dispatch.taken.cache_clear()


def test_where_it_runs(hopper):
    assert dispatch.impossible("liger", "cuda") is None
    assert dispatch.taken_of("liger", "cuda", torch.bfloat16, "cross_entropy_rows") == "liger"
    assert dispatch.taken_of("liger", "cuda", torch.float32, "branches") == "triton"


@pytest.mark.parametrize("change, precision, words", [
    ({}, "fp32", "train.precision=bf16"),
    ({"nvidia-cutlass-dsl": (4, 5, 9)}, "bf16", "pip install 'nvidia-cutlass-dsl>=4.6'"),
    ({"liger-kernel": (), "apache-tvm-ffi": ()}, "bf16", "pip install 'liger-kernel>=0.8.5' 'apache-tvm-ffi>=0.1'"),
])  # fmt: skip
def test_elsewhere_it_is_refused_in_one_line(hopper, change, precision, words):
    hopper.update(change)
    said = dispatch.impossible("liger", "cuda", precision)
    assert said.startswith("THRIFTLAB_KERNELS=liger: ") and words in said and "\n" not in said


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_another_gpu_would_take_a_fallback_and_is_refused(hopper, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert "9.0" in dispatch.impossible("liger", "cuda")
    assert "9.0" in dispatch.impossible("liger", "cpu")


def test_fp32_is_an_error_where_it_is_met(hopper):
    with pytest.raises(dispatch.KernelError, match="bf16 only"):
        dispatch.taken_of("liger", "cuda", torch.float32, "cross_entropy_rows")


def test_versions_of_packages():
    assert dispatch.found("torch") >= (2, 8) and dispatch.found("no-such-package") == ()
