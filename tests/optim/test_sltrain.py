"""SLTrain against its equations written out in float64; what it holds at once; counts of LLaMA."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tools.layers import BLOCKS, RANKS, as_printed, on_meta, parameters, tiny, tokens
from tests.tools.products import kept
from tests.tools.runs import LONG, assert_same, ended, saved_buffers, stop_at, traces
from tests.tools.tiny import tiny_config
from thriftlab.kernels import sltrain_linear as kernel
from thriftlab.kernels.lost_linear import product_dtype
from thriftlab.kernels.sltrain_linear import BLOCKS as ROW_BLOCKS
from thriftlab.kernels.sltrain_linear import backward, forward, reference, sltrain_linear
from thriftlab.kernels.sltrain_linear import blocks as row_blocks
from thriftlab.optim import SLTrain, convert
from thriftlab.optim.layers.base import describe, export, rebuild
from thriftlab.optim.state.keys import keyed_generator
from thriftlab.train.loop import run


def tensors(lead=(7,), inner=12, rank=5, out=9, entries=20, dtype=torch.float64, seed=0):
    """x, A, B, v that need gradients, the positions, and a gradient of y."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((*lead, inner), (rank, inner), (out, rank), (entries,), (*lead, out))
    *leaves, grad = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    index = torch.randperm(inner * out, generator=g)[:entries].sort().values
    return [t.requires_grad_() for t in leaves], index, grad


def gradients(function, leaves, index, grad, scale=0.7):
    y = function(*leaves, index, scale)
    return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def filled(weight, **options):
    layer = SLTrain(weight.shape[1], weight.shape[0], dtype=weight.dtype, **options)
    layer.load_dense(weight, keyed_generator(0, "layer.weight", 1))
    return layer


# ------------------------------------------------------------------------------------------------ the product


@given(
    lead=st.sampled_from([(), (1,), (6,), (2, 3), (0,)]), inner=st.integers(1, 20), out=st.integers(1, 40),
    rank=st.integers(1, 6), share=st.floats(0.02, 1.0),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_output_and_gradients_are_those_of_the_dense_weight(lead, inner, out, rank, share):
    entries = max(1, int(share * inner * out))
    leaves, index, grad = tensors(lead, inner, rank, out, entries)
    ours, theirs = (gradients(function, leaves, index, grad) for function in (sltrain_linear, reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("out", [9, 16, 33])
def test_gradients_are_the_differences_of_the_output(out):
    leaves, index, _ = tensors((2, 2), rank=3, out=out)
    assert torch.autograd.gradcheck(lambda *args: sltrain_linear(*args, index, 0.7), leaves)


def test_the_weight_of_the_paper():
    """(alpha / rank) B A, and the values at their positions, row after row."""
    layer = filled(torch.zeros(9, 12, dtype=torch.float64), rank=4, density=0.2, alpha=3.0)
    with torch.no_grad():
        layer.lr_out.normal_(generator=torch.Generator().manual_seed(0))
    weight = 3 / 4 * layer.lr_out @ layer.lr_in
    for position, value in zip(layer.sp_index.tolist(), layer.sp_value, strict=True):
        weight = weight.clone()
        weight[position // 12, position % 12] += value
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ weight.T)
    torch.testing.assert_close(layer.to_dense(), weight)


def test_a_second_run_gives_the_same_bits():
    leaves, index, grad = tensors((300,), inner=64, rank=16, out=48, entries=200, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(sltrain_linear, leaves, index, grad) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_on_a_gpu_the_weight_is_one_block_and_the_positions_are_not_read(monkeypatch):
    index = torch.empty(7, dtype=torch.int64, device="meta")  # whoever reads it fails
    assert list(row_blocks(index, 40, 20)) == [(slice(0, 40), slice(0, 7))]
    leaves, index, grad = tensors((6,), out=33)
    monkeypatch.setattr(kernel, "BLOCKS", 1)
    assert list(row_blocks(index, 33, 12)) == [(slice(0, 33), slice(0, len(index)))], "the same block on a CPU"
    ours, theirs = (gradients(function, leaves, index, grad) for function in (sltrain_linear, reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_it_compiles_as_one_graph():
    leaves, index, grad = tensors((6,), dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(sltrain_linear, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        gradients(compiled, leaves, index, grad), gradients(sltrain_linear, leaves, index, grad), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_operators_are_described_to_the_compiler(dtype):
    """Shapes, strides and dtypes of what they give out, that they change no argument, and their gradient."""
    (x, a, b, v), index, grad = tensors((6,), dtype=torch.float32)
    torch.library.opcheck(torch.ops.thriftlab.sltrain, (x, a, b, v, index, 0.7, dtype))
    plain = (grad.to(dtype), *(t.detach() for t in (x, a, b, v)), index, 0.7, dtype)
    torch.library.opcheck(torch.ops.thriftlab.sltrain_backward, plain)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_close_as_its_roundings(autocast):
    """u: the largest relative error of one rounding; sums are made in fp32.

    W is rounded as a product, as an entry, as a sum, and of rounded factors; G, of which the other gradients are made,
    as a product. To first order.
    """
    leaves, index, grad = tensors((64,), inner=32, rank=16, out=48, entries=60, dtype=torch.bfloat16)
    grad, u = grad.bfloat16(), torch.finfo(torch.bfloat16).eps / 2
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = gradients(reference, exact, index, grad)
    if autocast:  # of the same numbers, kept in fp32
        leaves = [t.detach().float().requires_grad_() for t in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = sltrain_linear(*leaves, index, 0.7)
    found = (y, *torch.autograd.grad(y, leaves, grad))
    assert y.dtype == torch.bfloat16 and all(f.dtype == leaf.dtype for f, leaf in zip(found[1:], leaves, strict=True))

    x, a, b, _ = (t.detach().abs() for t in exact)
    g, weight = grad.double().abs(), reference(torch.eye(32).double(), *exact[1:], index, 0.7).detach().T.abs()
    low = 0.7 * b @ a
    w_error = u * (2 * low + weight)  # of the scaled factor and of their product; of the sum
    g_weight = u * g.T @ x
    bounds = [x @ w_error.T, 2 * u * g @ weight + g @ w_error, 0.7 * (b.T @ g_weight + u * b.T @ g.T @ x),
              0.7 * (g_weight @ a.T + u * g.T @ x @ a.T), g_weight.view(-1)[index]]  # fmt: skip
    for one, true, bound in zip(found, truth, bounds, strict=True):
        error = (one.double() - true).abs()
        assert (error <= 1.01 * (bound + 2 * u * true.abs()) + 1e-5).all()
        assert error.max() > bound.max() / 100, "the bound says something"


# ------------------------------------------------------------------------------------------------ memory


class Temporaries(TorchDispatchMode):
    """The most numbers that are there at once, of tensors of no shape that is `known`, views apart."""

    def __init__(self, known):
        super().__init__()
        self.known, self.now, self.most = known, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and tuple(t.shape) not in self.known and t.numel():
                if t.untyped_storage().data_ptr() not in before:
                    self.now += t.numel()
                    weakref.finalize(t, self.drop, t.numel())
        self.most = max(self.most, self.now)
        return out

    def drop(self, numbers):
        self.now -= numbers


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("inner, out", [(512, 512), (512, 1376), (1376, 512)])
def test_no_more_than_an_eighth_of_the_weight_is_there_at_once(inner, out, autocast):
    """LLaMA-60M's three shapes; beside activations and what has the shape of a parameter."""
    count = 37  # tokens, so that no activation looks like a block
    leaves, index, grad = tensors((count,), inner, 128, out, int(0.03 * inner * out), torch.float32)
    known = {(count, inner), (count, out), *(tuple(t.shape) for t in leaves[1:])}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dtype = product_dtype(leaves[0])
        with Temporaries(known) as plain:
            gradients(reference, leaves, index, grad)
    plain_leaves = [t.detach() for t in leaves]
    with Temporaries(known) as ours:  # of the operators' insides
        forward(*plain_leaves, index, 0.7, dtype)
        backward(grad.to(dtype), *plain_leaves, index, 0.7, dtype)
    assert inner * out / ROW_BLOCKS <= ours.most <= inner * out / 8
    assert plain.most >= inner * out


@pytest.mark.parametrize("autocast", [False, True])
def test_beside_its_arguments_it_keeps_nothing(autocast):
    leaves, index, _ = tensors((64,), inner=32, rank=16, out=24, dtype=torch.float32)
    assert kept(lambda *args: sltrain_linear(*args[:-1]), leaves, index, enabled=autocast) == 0


# ------------------------------------------------------------------------------------------------ the layer


def test_it_starts_as_published():
    """A Kaiming-uniform, B zero, entries within 1 / sqrt(in), anywhere."""
    layer = filled(torch.zeros(300, 200), rank=32, density=0.03)
    bound = 1 / math.sqrt(200)
    assert layer.alpha == 32 and layer.scale == 1.0
    assert not layer.lr_out.any()
    for tensor in (layer.lr_in, layer.sp_value):
        assert 0.99 * bound < tensor.abs().max() <= bound
        spread = bound / math.sqrt(3)
        assert abs(tensor.mean()) < 5 * spread / math.sqrt(tensor.numel())
        assert abs(tensor.std() / spread - 1) < 0.05  # of 1800 numbers: five sigma
    index = layer.sp_index
    assert index.dtype == torch.int64 and len(index) == 1800 and len(index.unique()) == 1800
    assert torch.equal(index, index.sort().values) and 0 <= index[0] and index[-1] < 60000
    for counts in ((index // 200).bincount(minlength=300), (index % 200).bincount(minlength=200)):
        expected = 1800 / len(counts)
        chi = ((counts - expected) ** 2 / (expected * 0.97)).sum().item()
        assert abs(chi - len(counts)) < 5 * math.sqrt(2 * len(counts)), "uniform over rows and over columns"


@pytest.mark.parametrize("rank, alpha", [(128, 32), (256, 16), (512, 8), (1024, 8)])
def test_alpha_is_the_papers_unless_it_is_given(rank, alpha):
    with torch.device("meta"):
        assert SLTrain(2048, 2048, rank=rank).scale == alpha / rank
        assert SLTrain(2048, 2048, rank=rank, alpha=4.0).scale == 4 / rank


def test_a_layer_is_a_function_of_seed_and_name():
    models = [tiny(), tiny(), tiny()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        convert(model, SLTrain, BLOCKS, rank=4, seed=seed)
    first, again, other = (model.layers[0].attn.q for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.sp_index, other.sp_index)
    assert not torch.equal(first.sp_index, models[0].layers[0].attn.k.sp_index)


@pytest.mark.parametrize(
    "options, word",
    [({"rank": 0}, "rank"), ({"rank": 1.5}, "rank"), ({"density": 0.0}, "density"), ({"density": 1.5}, "density"),
     ({"alpha": 0.0}, "alpha")],
)  # fmt: skip
def test_a_wrong_value_is_named(options, word):
    with pytest.raises(ValueError, match=word):
        SLTrain(16, 12, **options)


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_an_export_and_a_description(bias):
    model = nn.Sequential(nn.Linear(24, 32, bias=bias))
    before = model[0].bias
    convert(model, SLTrain, rank=5, density=0.1, alpha=7.0)
    with torch.no_grad():
        model[0].lr_out.normal_()
    assert (model[0].bias is not None) == bias and (not bias or torch.equal(model[0].bias, before))
    fresh = nn.Sequential(nn.Linear(24, 32, bias=bias))
    rebuild(fresh, describe(model))
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(3, 24)
    y = model(x)
    assert torch.equal(fresh(x), y)
    export(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), y)


PRINTED = ["43.53 0.27", "96.55 0.60", "194.29 1.24", "645.55 4.16", "3144.7 21.5"]  # millions; GB, see below


@pytest.mark.parametrize("preset", RANKS)
def test_parameters_and_memory_of_llama(preset):
    """Six bytes a parameter (bf16 and two moments) and eight a position."""
    model = on_meta(preset)
    convert(model, SLTrain, BLOCKS, rank=RANKS[preset], density=0.05 if preset == "llama-7b" else 0.03)
    count, gigabytes = PRINTED[list(RANKS).index(preset)].split()
    positions = sum(b.numel() for b in model.buffers())
    assert as_printed(parameters(model) / 1e6, count) == count
    assert as_printed((6 * parameters(model) + 8 * positions) / 1e9, gigabytes) == gigabytes
    assert {b.dtype for b in model.buffers()} == {torch.int64}
    assert model.flops_per_token(256) == on_meta(preset).flops_per_token(256), "no work is saved"


def test_a_model_of_it_learns():
    model = tiny()
    convert(model, SLTrain, BLOCKS, rank=4, density=0.1)
    model(tokens(), tokens()).sum().backward()
    layer = model.layers[1].mlp.down
    assert layer.lr_out.grad.any() and layer.sp_value.grad.any()
    assert not layer.lr_in.grad.any(), "B is zero"


@pytest.mark.slow
def test_stopped_and_resumed_is_unbroken(tiny_data, tmp_path):
    layer = {"name": "sltrain", "rank": 4, "density": 0.1}
    whole, broken = (tiny_config(tiny_data, tmp_path / name, layer=layer, **LONG) for name in ("whole", "broken"))
    run(whole)
    stop_at(broken, 8)
    run(broken)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))
    assert len(saved_buffers(tmp_path / "broken")) == 14


@pytest.mark.slow
def test_it_trains_in_bf16_and_with_checkpointing(tiny_data, tmp_path):
    ways = {"plain": {}, "checkpointing": {"activation_checkpointing": True}, "bf16": {"precision": "bf16"}}
    layer = {"name": "sltrain", "rank": 4, "density": 0.1}
    loss = {way: ended(tiny_config(tiny_data, tmp_path / way, layer=layer, train=t)) for way, t in ways.items()}
    assert loss["checkpointing"] == loss["plain"]
    assert 0 < abs(loss["bf16"] - loss["plain"]) < 2e-2
