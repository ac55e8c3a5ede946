"""Attention and rotary embedding as a GPU has them, against what a CPU computes; what the flash kernel asks for."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask

from tests.fake_cuda.counts import Counts, to_device
from thriftlab.kernels import sltrain_linear as sltrain
from thriftlab.optim import LAYERS, convert
from thriftlab.train import attention
from thriftlab.train.attention import as_dense, attend, block_mask, continued, dense_mask, why_no_flash
from thriftlab.train.model import GPT, PRESETS, ModelConfig, rotary, rotate
from thriftlab.train.windows import autocast

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = dict(preset=None, dim=32, layers=2, heads=2, hidden=40, vocab_size=19)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------------------------------- rotary


def real_rotary(monkeypatch, length, head_dim, theta=10000.0):
    """What `rotary` gives on a device that is no CPU."""

    class Elsewhere:
        type = "cuda"

    arange = torch.arange
    with monkeypatch.context() as patch:
        patch.setattr(torch, "arange", lambda *args, device: arange(*args))
        return rotary(length, head_dim, theta, Elsewhere())


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_real_and_complex_rotations_are_one(dtype, rtol, monkeypatch):
    """Both round angles to fp32; a sum of two products then rounds a few times."""
    x = draw(2, 50, 3, 8, dtype=dtype)
    ours, theirs = rotary(50, 8, 500.0, CPU), real_rotary(monkeypatch, 50, 8, 500.0)
    assert ours.is_complex() and not theirs.is_complex() and theirs.dtype == torch.float32
    found = []
    for rope in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = rotate(leaf, rope)
        assert y.dtype == dtype and y.shape == x.shape
        found.append((y, *torch.autograd.grad(y, leaf, draw(*y.shape, seed=1, dtype=dtype))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=4 * rtol)


def test_a_real_rotation_is_the_equation(monkeypatch):
    x, y = draw(1, 7, 1, 6, dtype=torch.float64), torch.empty(1, 7, 1, 6, dtype=torch.float64)
    for t in range(7):
        for i in range(3):
            angle = t * 100.0 ** (-2 * i / 6)
            a, b = x[0, t, 0, 2 * i], x[0, t, 0, 2 * i + 1]
            y[0, t, 0, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
            y[0, t, 0, 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    torch.testing.assert_close(rotate(x, real_rotary(monkeypatch, 7, 6, 100.0)), y, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- documents


@st.composite
def documents(draw):
    """Ascending numbers, [batch, seq], which may leave some out; lengths about the borders of blocks."""
    length = draw(st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 255, 256, 257, 300, 384])))
    starts = st.lists(st.integers(0, length - 1), max_size=5)
    rows = draw(st.lists(starts, min_size=1, max_size=3))
    table = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, places in zip(table, rows, strict=True):
        row[places] = 1
    return table.cumsum(1) * draw(st.integers(1, 3)) + draw(st.integers(-2, 2))


@settings(deadline=None, max_examples=60)
@given(documents())
def test_blocks_are_those_that_looking_at_every_pair_finds(docs):
    """torch's own, which makes the dense mask first."""
    ours, length = block_mask(docs), docs.shape[1]

    def visible(b, h, q, k):
        return (docs[b, q] == docs[b, k]) & (q >= k)

    theirs = create_block_mask(visible, len(docs), None, length, length, device="cpu")
    for kind in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, kind), getattr(theirs, kind)), kind
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for count, places in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        first = torch.arange(getattr(ours, places).shape[-1]) < getattr(ours, count)[..., None]
        assert torch.equal(getattr(ours, places)[first], getattr(theirs, places)[first])
    assert ours.shape == (len(docs), 1, length, length)
    assert torch.equal(as_dense(ours), dense_mask(docs)) and torch.equal(as_dense(dense_mask(docs)), dense_mask(docs))
    assert as_dense(None) is None
    assert torch.equal(continued(ours), continued(dense_mask(docs)))
    assert torch.equal(continued(ours), docs[:, 1:] == docs[:, :-1])


def some_documents(batch=2, length=200):
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) < 0.02
    return starts.cumsum(1)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_by_blocks_is_attention_by_the_dense_mask(kv_heads, monkeypatch):
    """Its gradients too, which torch gives on a CPU where it is not asked whether it should."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex.flex_attention)
    docs, found = some_documents(), []
    for mask in (dense_mask(docs), block_mask(docs)):
        leaves = [draw(2, heads, 200, 16, seed=i).requires_grad_() for i, heads in enumerate((4, kv_heads, kv_heads))]
        y = attend(*leaves, mask)
        found.append((y, *torch.autograd.grad(y, leaves, draw(*y.shape, seed=9))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_attention_by_blocks_forward(monkeypatch):
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex.flex_attention)
    docs, (q, k, v) = some_documents(), (draw(2, heads, 200, 16, seed=i) for i, heads in enumerate((4, 2, 2)))
    torch.testing.assert_close(attend(q, k, v, block_mask(docs)), attend(q, k, v, dense_mask(docs)))


KINDS = {"q": "lost", "k": "cola", "v": "lowrank", "o": "relora", "gate": "sltrain", "up": "lora"}  # and down: a Linear


@pytest.mark.slow
def test_a_model_of_all_layers_as_a_gpu_has_it_compiles_as_one_graph(monkeypatch):
    """Blocks of documents, real rotations, recomputed activations; against the same as a CPU has it."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    x, docs, found = torch.randint(19, (2, 150), generator=torch.Generator().manual_seed(1)), some_documents(2, 150), []
    assert {*KINDS.values(), "dense"} == {*LAYERS}
    for on_gpu in (False, True):
        model = GPT(
            ModelConfig(**{**SMALL, "layers": 1}, kv_heads=1, qk_norm=True, smeared_keys=True),
            activation_checkpointing=on_gpu,
        )
        for place, name in KINDS.items():
            convert(model, LAYERS[name], [rf"\.{place}\."], rank=4)
        model.init_weights(0)
        run = model
        if on_gpu:
            rope = real_rotary(monkeypatch, 150, 16)
            monkeypatch.setattr("thriftlab.train.model.document_mask", block_mask)
            monkeypatch.setattr("thriftlab.train.model.rotary", lambda *given, rope=rope: rope)
            torch._dynamo.reset()
            run = torch.compile(model, fullgraph=True, backend="aot_eager")
        losses = run(x, x, docs)
        losses.sum().backward()
        found.append([losses, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1, a.abs().max().item()))


# ---------------------------------------------------------------------------------------------------- on a GPU


def a_step(options, with_documents, checkpointing=False):
    """What forward and backward of a model do on a device, and with what attention is called there."""
    calls = []
    plain = F.scaled_dot_product_attention

    def called(q, k, v, **kwargs):
        calls.append(([str(t.dtype) for t in (q, k, v)], q.shape[-1], kwargs["attn_mask"] is None, kwargs["is_causal"]))
        heads = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(heads, dim=1) for t in (k, v))
        return (q * k * v).to(v.dtype)  # of the right shape; torch's own without a GPU has products in fp32

    F.scaled_dot_product_attention = called
    try:
        with META:
            model = GPT(ModelConfig(**options), activation_checkpointing=checkpointing)
        to_device(model)
        tokens = torch.empty(2, 256, dtype=torch.int64, device="cuda")
        with Counts() as counts:
            with autocast(tokens.device, "bf16"):
                losses = model(tokens, tokens, tokens if with_documents else None)
            losses.sum().backward()
    finally:
        F.scaled_dot_product_attention = plain
    assert all(p.grad.dtype == torch.float32 and p.grad.is_cuda for p in model.parameters())
    return calls, counts.counted


@pytest.mark.parametrize("with_documents, checkpointing", [(False, False), (True, True)])
def test_what_a_step_of_the_model_asks_of_a_gpu(fake_cuda, with_documents, checkpointing):
    options = {**SMALL, "dim": 64, "kv_heads": 1, "qk_norm": True, "smeared_keys": True}
    calls, counted = fake_cuda(a_step, options, with_documents, checkpointing)
    assert not any(sum(counter.values()) for counter in (counted.reads, counted.to_device, counted.to_host))
    assert {dtype for dtype, _ in counted.products} == {"bfloat16"}
    assert len(calls) == 2 + 2 * checkpointing
    for dtypes, head_dim, unmasked, causal in calls:
        assert unmasked and causal and not why_no_flash(torch.bfloat16, head_dim), "flash takes it"
        assert dtypes[2] == "torch.bfloat16"  # q and k are normed, and autocast gives all three one dtype
    assert not any("complex" in name for name in counted.launches)


def sltrain_kernels():
    """Forward and backward of the operators, whose insides a whole step does not show."""
    shapes = ((6, 12), (5, 12), (40, 5), (7,))
    x, low, up, value = (torch.empty(shape, device="cuda") for shape in shapes)
    index = torch.empty(7, dtype=torch.int64, device="cuda")
    with Counts() as counts:
        y = sltrain.forward(x, low, up, value, index, 0.5, torch.bfloat16)
        sltrain.backward(y, x, low, up, value, index, 0.5, torch.bfloat16)
    return counts.counted


def test_sltrain_asks_nothing_of_the_device(fake_cuda):
    counted = fake_cuda(sltrain_kernels)
    assert not any(sum(counter.values()) for counter in (counted.reads, counted.to_device, counted.to_host))
    assert sum(counted.products.values()) == 7, "each product once, of the whole weight"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_heads_that_flash_takes(preset):
    config = ModelConfig(preset=preset)
    assert not why_no_flash(torch.bfloat16, config.dim // config.heads)


def test_what_keeps_attention_from_the_flash_kernel_is_said():
    assert "float32; use train.precision=bf16" in why_no_flash(torch.float32, 64)
    for head_dim in (12, 264):
        assert f"heads of {head_dim} are no multiple of 8 up to 256" in why_no_flash(torch.bfloat16, head_dim)
    assert not why_no_flash(torch.bfloat16, 256)
