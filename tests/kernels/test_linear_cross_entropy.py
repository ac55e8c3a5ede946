"""The loss of every token against a slow float64 reference; what it keeps, what it allocates, what it refuses."""

import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from tests.tools.tiny import tiny_config
from thriftlab.data.shards import open_dataset
from thriftlab.kernels import linear_cross_entropy as module
from thriftlab.kernels.linear_cross_entropy import linear_cross_entropy
from thriftlab.train.build import make_model
from thriftlab.train.model import GPT

MIB = 2**20  # one block of 64 rows of 4096 logits in fp32
SOME = 2 * MIB + 1  # two blocks


def case(tokens, dim, vocab, dtype=torch.float32, seed=0):
    """hidden, weight, targets with a third not predicted, and a weight for every token, some of them zero."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < 0.3] = -100
    upstream = torch.randn(tokens, generator=g) * (torch.rand(tokens, generator=g) < 0.8)
    return hidden, weight, targets, upstream.to(dtype)


def ours(hidden, weight, targets, upstream, keep_bytes=None, loss=linear_cross_entropy):
    """losses, gradient of hidden, gradient of weight."""
    losses = loss(hidden, weight, targets, keep_bytes)
    return losses.detach(), *torch.autograd.grad(losses, (hidden, weight), upstream)


def reference(hidden, weight, targets, upstream):
    """The same in float64, one token at a time, the gradient written out."""
    hidden, weight, upstream = (x.detach().double() for x in (hidden, weight, upstream))
    losses, grad_hidden, grad_weight = torch.zeros(len(hidden)).double(), hidden * 0, weight * 0
    for i, target in enumerate(targets.tolist()):
        if target >= 0:
            logits = weight @ hidden[i]
            losses[i] = torch.logsumexp(logits, 0) - logits[target]
            error = torch.exp(logits - torch.logsumexp(logits, 0))
            error[target] -= 1
            grad_hidden[i] = upstream[i] * (error @ weight)
            grad_weight += upstream[i] * torch.outer(error, hidden[i])
    return losses, grad_hidden, grad_weight


def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# --------------------------------------------------------------------------------------------------- numbers


@given(
    st.integers(0, 40),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 45),
    st.integers(0, 3000),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_blocks_and_any_budget_give_the_reference(tokens, dim, vocab, rows, keep_bytes, seed):
    of_rows = [slice(start, start + rows) for start in range(0, max(1, tokens), rows)]
    inputs = case(tokens, dim, vocab, torch.float64, seed)
    with mock.patch.object(module, "blocks", lambda *_: of_rows):
        kept, recomputed, mixed = (ours(*inputs, keep) for keep in (None, 0, keep_bytes))
    for a, b in zip(kept, reference(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert same(recomputed, kept) and same(mixed, kept)


@pytest.mark.parametrize("keep_bytes", [0, SOME])
@pytest.mark.parametrize("bf16", [False, True])
def test_keeping_changes_no_bit(keep_bytes, bf16):
    inputs = case(300, 32, 4096)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        kept, other = ours(*inputs), ours(*inputs, keep_bytes)
        losses = linear_cross_entropy(*inputs[:3], keep_bytes)
    outside = torch.autograd.grad(losses, inputs[:2], inputs[3])  # a backward after the autocast has ended
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        alone = linear_cross_entropy(*inputs[:3])
    assert same(other, kept) and same((alone, *outside), kept)


def test_gradcheck():
    """Of the recomputed path: it calls each backward many times. Every batch shape has one answer."""
    hidden, weight, targets, _ = case(6, 3, 5, torch.float64)
    assert (targets < 0).any()
    torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h.view(2, 3, 3), w, targets.view(2, 3), 0), (hidden, weight)
    )


def test_single_precision_is_as_near_as_its_rounding_allows():
    inputs = case(300, 4, 4096)  # five blocks
    losses, grad_hidden, grad_weight = (a - b for a, b in zip(ours(*inputs), reference(*inputs), strict=True))
    logit = 4 * inputs[0].abs().max() * inputs[1].abs().max()  # a bound; its products and sums are rounded 8 times
    relative = 2**-24 * (8 * logit + 32)  # of a probability: the logits' errors, exp, log and the vocabulary's sum
    assert losses.abs().max() < relative
    assert grad_hidden.abs().max() < 4 * relative * inputs[1].abs().max() * inputs[3].abs().max()
    assert grad_weight.norm() < 4 * relative * (inputs[0].norm(dim=1) * inputs[3].abs()).sum()


def test_bf16_rounds_the_products_and_not_the_losses():
    hidden, weight, targets, upstream = case(100, 16, 50)
    with torch.autocast("cpu", torch.bfloat16):
        results = ours(hidden, weight, targets, upstream)
    assert all(x.dtype == torch.float32 for x in results)
    rounded = hidden.detach().bfloat16(), weight.detach().bfloat16()
    logits = F.linear(*rounded).double()
    exact = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(results[0].double(), exact, rtol=0, atol=2**-22 * logits.abs().max().item())
    unit = 2**-8  # of bf16: the logits' errors count twice in a probability; and three more roundings
    for a, b in zip(results[1:], reference(*rounded, targets, upstream)[1:], strict=True):
        assert (a - b).norm() < unit * (2 * logits.abs().max() + 3) * b.norm()


def test_the_heads_gradient_is_summed_in_fp32_whatever_the_weight():
    """So weights that agree have gradients that agree, but for one rounding."""
    hidden, weight, targets, upstream = case(640, 8, 4096)  # ten blocks
    narrow = weight.detach().bfloat16().requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(hidden, wide, targets, upstream), ours(hidden, narrow, targets, upstream)
    assert same(a[:2], b[:2]) and torch.equal(a[2].bfloat16(), b[2])


def launched_on_a_gpu():
    from tests.fake_cuda.counts import Counts

    os.environ["THRIFTLAB_KERNELS"] = "triton"  # in a process of its own, where operators stand for launches
    hidden = torch.empty(3000, 16, device="cuda", requires_grad=True)
    weight = torch.empty(50257, 16, device="cuda", requires_grad=True)
    with Counts() as counts, torch.autocast("cuda", torch.bfloat16):
        losses = linear_cross_entropy(hidden, weight, torch.zeros(3000, dtype=torch.int64, device="cuda"), None)
        losses.sum().backward()
    return counts.counted.launches, weight.grad.dtype, counts.counted.reads.total()


@pytest.mark.slow
def test_on_a_gpu_a_block_is_a_launch_each_way_beside_its_products(fake_cuda):
    """2671 rows of 50257 logits are a block: two here."""
    launches, dtype, reads = fake_cuda(launched_on_a_gpu)
    assert launches["ce_stats"] == launches["ce_grad_"] == launches["addmm"] == 2
    assert launches["mm"] == 4 and launches["_log_softmax"] == 0 and dtype == torch.float32 and reads == 0


@pytest.mark.slow
def test_compiled_in_one_graph_with_the_same_bits():
    torch.compiler.reset()
    inputs = case(200, 8, 4096)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    assert same(ours(*inputs, SOME, loss=compiled), ours(*inputs, SOME))


# --------------------------------------------------------------------------------------------------- rows that are out


@pytest.mark.parametrize("keep_bytes", [0, None])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_predicted_is_not_looked_at(keep_bytes, bad):
    hidden, weight, targets, upstream = case(200, 8, 4096)
    clean = ours(hidden, weight, targets, upstream, keep_bytes)
    out = targets < 0
    with torch.no_grad():
        hidden[out] = bad
    upstream[out] = bad
    assert same(ours(hidden, weight, targets, upstream, keep_bytes), clean)
    assert clean[0][out].count_nonzero() == clean[1][out].count_nonzero() == 0


def test_a_weight_of_zero_is_a_token_that_is_not_predicted():
    hidden, weight, targets, upstream = case(200, 8, 4096)
    _, grad_hidden, grad_weight = ours(hidden, weight, targets, upstream)
    out = (upstream == 0) & (targets >= 0)
    assert out.any() and grad_hidden[out].count_nonzero() == 0
    assert torch.equal(ours(hidden, weight, targets.masked_fill(out, -1), upstream)[2], grad_weight)


@pytest.mark.parametrize("keep_bytes", [0, None])
def test_a_predicted_row_that_is_not_finite_poisons_the_head_and_no_other_row(keep_bytes):
    hidden, weight, targets, upstream = case(200, 8, 4096)
    targets[70], upstream[70] = 1, 0
    clean = ours(hidden, weight, targets, upstream, keep_bytes)
    with torch.no_grad():
        hidden[70, 3] = torch.nan
    losses, grad_hidden, grad_weight = ours(hidden, weight, targets, upstream, keep_bytes)
    others = torch.arange(200) != 70
    assert torch.equal(losses[others], clean[0][others]) and torch.equal(grad_hidden[others], clean[1][others])
    assert losses[70].isnan() and grad_hidden[70].isnan().all() and grad_weight.isnan().any()


# --------------------------------------------------------------------------------------------------- memory


def bytes_saved(loss):
    """Of all storages that the graph of `loss()` holds on to."""
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: storages.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) or x, lambda x: x
    ):
        losses = loss()
    return sum(storages.values()), losses


def peak_bytes(work):
    """Largest sum of what the allocator had given out since `work` began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return live.max().item()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("keep_bytes, blocks", [(0, 0), (MIB - 1, 0), (MIB, 1), (SOME, 2), (10 * MIB, 10), (None, 10)])
def test_saves_its_inputs_and_what_the_budget_holds(keep_bytes, blocks, bf16):
    hidden, weight, targets, _ = case(640, 16, 4096)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        saved, losses = bytes_saved(lambda: linear_cross_entropy(hidden, weight, targets, keep_bytes))
    inputs = (hidden.nbytes // 2 if bf16 else hidden.nbytes) + weight.nbytes + targets.nbytes
    assert losses.requires_grad and saved == blocks * MIB + inputs


@pytest.mark.parametrize("keep_bytes, blocks", [(0, 0), (SOME, 2), (None, 10)])
def test_holds_the_budget_and_three_blocks_at_most(keep_bytes, blocks):
    hidden, weight, targets, upstream = case(640, 8, 4096)
    vectors = 10 * targets.nbytes
    peak = peak_bytes(lambda: ours(hidden, weight, targets, upstream, keep_bytes))
    assert peak > min(blocks + 1, 10) * MIB  # it does count; there are ten
    assert peak <= (blocks + 3) * MIB + 2 * hidden.nbytes + weight.nbytes + vectors


@pytest.mark.parametrize("frozen", [False, True])
def test_without_a_backward_nothing_is_kept(frozen):
    hidden, weight, targets, _ = case(640, 8, 4096)

    def forward():
        with torch.set_grad_enabled(frozen):
            return linear_cross_entropy(hidden, weight, targets)

    if frozen:
        hidden, weight = hidden.detach(), weight.detach()
    saved, losses = bytes_saved(forward)
    assert saved == 0 and not losses.requires_grad
    assert peak_bytes(forward) <= 3 * MIB + hidden.nbytes + 10 * targets.nbytes


# --------------------------------------------------------------------------------------------------- refusals, models


def test_kept_blocks_serve_one_backward_and_recomputed_ones_any_number():
    hidden, weight, targets, upstream = case(200, 8, 4096)
    for keep_bytes in (0, SOME, None):
        losses = linear_cross_entropy(hidden, weight, targets, keep_bytes)
        first = torch.autograd.grad(losses, (hidden, weight), upstream, retain_graph=True)
        if keep_bytes == 0:
            assert same(torch.autograd.grad(losses, (hidden, weight), upstream), first)
        else:
            with pytest.raises(RuntimeError, match="in-?place"):
                torch.autograd.grad(losses, (hidden, weight), upstream)


@pytest.mark.parametrize("keep_bytes", [0, None])
def test_refuses_a_double_backward(keep_bytes):
    hidden, weight, targets, upstream = case(9, 3, 5)
    losses = linear_cross_entropy(hidden, weight.detach(), targets, keep_bytes)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(losses, hidden, upstream, create_graph=True)


@pytest.mark.parametrize("keep_bytes", [0, None])
def test_a_model_keeps_what_it_is_told_to(tiny_data, tmp_path, keep_bytes):
    config = tiny_config(tiny_data, tmp_path, train={"loss_keep_bytes": keep_bytes})
    model, _ = make_model(config, open_dataset(tiny_data))
    model.to_empty(device="cpu").init_weights(config.seed)
    plain, tokens = GPT(model.config), torch.arange(32).view(2, 16)
    plain.init_weights(config.seed)
    (saved, losses), (by_default, expected) = (bytes_saved(lambda m=m: m(tokens, tokens)) for m in (model, plain))
    assert by_default - saved == (0 if keep_bytes is None else tokens.numel() * model.config.vocab_size * 4)
    losses.sum().backward(), expected.sum().backward()
    assert same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
