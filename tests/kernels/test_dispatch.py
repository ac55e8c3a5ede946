"""Which way a hot path runs, and what is said where a choice cannot be."""

import logging

import pytest
import torch

from thriftlab.kernels import dispatch

CPU, META = torch.empty(1), torch.empty(1, device="meta")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "ran", {})
    for cached in (dispatch.taken, dispatch.too_old):
        cached.cache_clear()
    yield
    for cached in (dispatch.taken, dispatch.too_old):
        cached.cache_clear()


def way(monkeypatch, choice, tensor=CPU, op="fused_step"):
    monkeypatch.setenv("THRIFTLAB_KERNELS", choice)
    return dispatch.path(tensor, op)


def test_a_cpu_takes_torch_and_a_gpu_kernels_where_there_are_any(monkeypatch):
    assert dispatch.path(CPU, "fused_step") == way(monkeypatch, "auto") == way(monkeypatch, "torch") == "torch"
    assert dispatch.taken("auto", "cuda", "fused_step") == "triton"
    assert dispatch.taken("auto", "cuda", "something else") == "torch"
    assert dispatch.taken("torch", "cuda", "fused_step") == "torch"
    assert way(monkeypatch, "triton", META) == "torch"


def test_the_interpreter_is_taken_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert way(monkeypatch, "auto") == "torch" and way(monkeypatch, "triton") == "triton"


def test_what_is_forced_and_impossible_is_one_line(monkeypatch):
    for choice, word in (("triton", "TRITON_INTERPRET=1"), ("liger", "9.0"), ("cuda", "auto, torch, triton, liger")):
        with pytest.raises(dispatch.KernelError, match=word) as error:
            way(monkeypatch, choice)
        assert str(error.value).startswith(f"THRIFTLAB_KERNELS={choice}: ") and "\n" not in str(error.value)


def test_a_dtype_without_kernel_takes_torch_and_says_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert way(monkeypatch, "triton", CPU.double()) == way(monkeypatch, "triton", CPU.half()) == "torch"
    assert way(monkeypatch, "triton", CPU.bfloat16()) == "triton"
    kinds = ["torch: there is no kernel for float64", "torch: there is no kernel for float16"]
    assert dispatch.ran == {"fused_step": ["triton", *kinds]}


@pytest.mark.slow
def test_compiled_code_takes_it_as_a_constant():
    torch.compiler.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def twice(x):
        return 2 * x if dispatch.path(x, "fused_step") == "torch" else x

    assert twice(torch.ones(1)) == 2 and dispatch.ran == {"fused_step": ["torch"]}


@pytest.mark.parametrize("version, fits", [("3.6.9", False), ("3.7.1", True), ("3.10.0", True), ("4.0.0+git1", True)])
def test_an_old_triton_is_none(monkeypatch, version, fits):
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    assert dispatch.taken("auto", "cuda", "fused_step") == ("triton" if fits else "torch")
    assert (dispatch.impossible("triton", "cuda") is None) == fits


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in dispatch.impossible("triton", "cuda")
    assert dispatch.taken("auto", "cuda", "fused_step") == "torch"


def test_each_way_is_told_once_and_kept(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "thriftlab.kernels")
    for _ in range(2):
        dispatch.path(CPU, "fused_step")
        dispatch.note("fused_step", "torch: lion")
    dispatch.path(CPU, "norm_rows")
    assert [record.getMessage() for record in caplog.records] == [
        "kernels: fused_step runs by torch",
        "kernels: fused_step runs by torch: lion",
        "kernels: norm_rows runs by torch",
    ]
    assert dispatch.ran == {"fused_step": ["torch", "torch: lion"], "norm_rows": ["torch"]}
