"""Adam-mini against a float64 oracle that walks over blocks, a trajectory of its code, and AdamW."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.tools.peers import farthest, groups_of
from thriftlab.optim import AdamMini, AdamW, split_groups
from thriftlab.optim.state.storage import load
from thriftlab.train.model import GPT, ModelConfig

HEADS = 2  # of four rows
BLOCKS = {  # name -> shape, entries of a block
    "embed.weight": ((17, 6), 6),
    "attn.q.weight": ((8, 6), 24),
    "attn.k.weight": ((4, 6), 24),
    "attn.v.weight": ((4, 6), 6),
    "attn.o.weight": ((6, 8), 8),
    "attn.o.bias": ((6,), 1),
    "norm.weight": ((6,), 6),
    "cube": ((2, 3, 4), 24),
}
HYPER = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)


def gradient(name, step, scale=1.0):
    rng = np.random.default_rng(100 * step + list(BLOCKS).index(name))
    return rng.normal(size=BLOCKS[name][0]) * scale


def oracle(w, grads, entries):
    """The weight after each step, flat, block by block."""
    (b1, b2), found = HYPER["betas"], []
    m, v = np.zeros(w.size), np.zeros(w.size // entries)
    w = w.reshape(-1).copy()
    for t, grad in enumerate(grads, 1):
        g = grad.reshape(-1)
        w = (1 - HYPER["lr"] * HYPER["weight_decay"]) * w
        for block in range(len(v)):
            here = slice(block * entries, (block + 1) * entries)
            m[here] = b1 * m[here] + (1 - b1) * g[here]
            v[block] = b2 * v[block] + (1 - b2) * sum(x * x for x in g[here]) / entries
            down = math.sqrt(v[block] / (1 - b2**t)) + HYPER["eps"]
            w[here] -= HYPER["lr"] * m[here] / (1 - b1**t) / down
        found.append(w.copy())
    return found


@pytest.mark.parametrize("whole", [(), (r"\.v\.",)])
def test_a_step_in_float64_is_the_papers(whole):
    params = {name: nn.Parameter(torch.tensor(gradient(name, 99))) for name in BLOCKS}
    optimizer = AdamMini(params.items(), head_dim=4, whole=whole, **HYPER)
    entries = {name: size for name, (_, size) in BLOCKS.items()} | ({"attn.v.weight": 24} if whole else {})
    grads = {name: [gradient(name, step) for step in range(15)] for name in BLOCKS}
    want = {name: oracle(p.detach().numpy(), grads[name], entries[name]) for name, p in params.items()}
    for step in range(15):
        for name, p in params.items():
            p.grad = torch.tensor(grads[name][step])
        optimizer.step()
        for name, p in params.items():
            assert np.allclose(p.detach().numpy().reshape(-1), want[name][step], rtol=1e-12, atol=1e-12), (step, name)
    sizes = {name: len(optimizer.state[p]["block_sq"]) for name, p in params.items()}
    assert sizes == {name: p.numel() // entries[name] for name, p in params.items()}


def test_the_trajectory_of_the_published_code():
    """Which does not decay norms."""
    hyper = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, head_dim=4)
    far = farthest("adam_mini", lambda params: AdamMini(groups_of(params, vector={"weight_decay": 0.0}), **hyper), 1e-3)
    assert max(far.values()) <= 5e-4, far


def test_on_gradients_of_one_size_in_each_block_it_is_adamw():
    for name, (shape, entries) in BLOCKS.items():
        ours, theirs = (nn.Parameter(torch.tensor(gradient(name, 99))) for _ in range(2))
        mini = AdamMini([(name, ours)], head_dim=4, **HYPER)
        adamw = AdamW([(name, theirs)], **HYPER)
        for step in range(6):
            size = np.random.default_rng(step).uniform(0.1, 3, size=math.prod(shape) // entries).repeat(entries)
            ours.grad = torch.tensor(size.reshape(shape) * np.sign(gradient(name, step)))
            theirs.grad = ours.grad.clone()
            mini.step()
            adamw.step()
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12), name


def test_the_heads_of_a_model_are_found_and_what_does_not_fit_is_said():
    sizes = ModelConfig(preset=None, dim=16, layers=1, heads=4, kv_heads=2, hidden=12, vocab_size=19)
    groups = split_groups(GPT(sizes), ["attn|mlp"])
    optimizer = AdamMini(groups, head_dim=4)
    assert optimizer.remarks() == []
    (group, _) = optimizer.param_groups
    pairs = zip(group["names"], group["params"], strict=True)
    blocks = {name: optimizer.expected_spec(name, p, group)["block_sq"][0][0] for name, p in pairs}
    assert [blocks[f"layers.0.attn.{name}.weight"] for name in "qkvo"] == [4, 2, 8, 16]
    assert "each row is a block" in AdamMini(groups).remarks()[0]
    with pytest.raises(ValueError, match=r"attn.k.weight \(8, 16\): head_dim=5 does not divide"):
        optimizer.expected_spec("attn.k.weight", group["params"][1], {**group, "head_dim": 5})


def test_a_state_of_other_heads_is_refused():
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = AdamMini([("attn.q.weight", p)], head_dim=4)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(ValueError, match="second moments of 2 blocks, and the weight .* has 4"):
        other = AdamMini([("attn.q.weight", p)], head_dim=2)
        saved = optimizer.state_dict()
        saved["param_groups"][0]["head_dim"] = 2
        other.load_state_dict(saved)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (1, 1), (1, 7), (7, 1), (700, 300)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hostile_shapes_and_rows(dtype, shape):
    """In its first step each row of a gradient of ones moves by lr; zero rows stay, a NaN stays in its row."""
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = AdamMini([("w", p)], lr=0.5)
    p.grad = torch.ones_like(p)
    if min(shape) > 1:
        p.grad[0], p.grad[1, 0] = 0.0, torch.nan
    optimizer.step()
    got = p.detach()
    if min(shape) > 1:
        assert not got[0].any() and got[1].isnan().all()
        got = got[2:]
    assert torch.allclose(got, torch.full_like(got, -0.5), rtol=1e-3)


@pytest.mark.parametrize(("kept", "near"), [("bf16", 0.01), ("8bit", 0.1)])
def test_the_first_moment_is_kept_in_few_bits_and_the_second_is_not(kept, near):
    moments = []
    for state_dtype in ("fp32", kept):
        p = nn.Parameter(torch.zeros(16, 16))
        optimizer = AdamMini([("w", p)], state_dtype=state_dtype)
        for step in range(20):
            p.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        state = optimizer.state[p]
        moments.append((load(state, "exp_avg"), state["block_sq"]))
        assert state["block_sq"].dtype == torch.float32
    (m, v), (few, same) = moments
    assert torch.equal(v, same) and 0 < (m - few).norm() / m.norm() < near
