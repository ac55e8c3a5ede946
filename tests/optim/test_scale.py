"""SCALE against a float64 oracle written from the paper's algorithm 1, and against a trajectory."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.tools.peers import farthest, groups_of
from thriftlab.optim import Scale, split_groups
from thriftlab.optim.core.listing import listing
from thriftlab.optim.core.normalised import descend_columns, descend_rows
from thriftlab.train.model import GPT, ModelConfig

HYPER = dict(lr=0.02, weight_decay=0.1)
SHAPES = {"embed": (17, 6), "q": (6, 6), "up": (9, 6), "down": (6, 9), "norm": (6,), "head": (17, 6)}


def gradient(name, step, shapes=SHAPES):
    rng = np.random.default_rng(100 * step + list(shapes).index(name))
    grad = rng.normal(size=shapes[name]) * 10.0 ** rng.integers(-4, 3)
    if name == "embed":
        grad[rng.permutation(len(grad))[:9]] = 0.0
    return grad


def oracle_length(row, rms):
    total = math.sqrt(sum(x * x for x in row))
    return total / math.sqrt(len(row)) if rms else total


def normalised(x, rms, eps=1e-8):
    """Each row divided by its length, one after the other."""
    return np.array([row / max(oracle_length(row, rms), eps) for row in x])


class Oracle:
    """One tensor."""

    def __init__(self, w, role, *, lr, weight_decay, beta=0.9, rms=False, plain=1.0, betas=(0.9, 0.999), eps=1e-8):
        self.w, self.role, self.lr, self.wd, self.rms = w, role, lr, weight_decay, rms
        self.beta, self.plain, self.betas, self.eps = beta, plain, betas, eps
        self.h = self.m = self.v = np.zeros_like(w)
        self.k = 0

    def step(self, g):
        self.w = (1 - self.lr * self.wd) * self.w
        if self.role == "matrix":
            self.w = self.w - self.lr * normalised(g, self.rms)
        elif self.role == "input":
            self.w = self.w - self.lr * normalised(g.T, self.rms).T
        elif self.role == "output":
            self.h = self.beta * self.h + (1 - self.beta) * g
            self.w = self.w - self.lr * normalised(self.h, self.rms)
        else:
            (b1, b2), self.k = self.betas, self.k + 1
            self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
            factor = math.sqrt(1 - b2**self.k) / (1 - b1**self.k)
            self.w = self.w - self.lr * self.plain * factor * self.m / (np.sqrt(self.v) + self.eps)


ROLE = {"embed": "input", "head": "output", "norm": "vector"}


@pytest.mark.parametrize("length", ["norm", "rms"])
def test_a_step_in_float64_is_the_papers(length):
    params = {name: nn.Parameter(torch.tensor(gradient(name, 99))) for name in SHAPES}
    optimizer = Scale(groups_of(params), length=length, momentum=0.8, plain_lr_scale=3.0, betas=(0.7, 0.9), **HYPER)
    how = dict(rms=length == "rms", beta=0.8, plain=3.0, betas=(0.7, 0.9), **HYPER)
    oracles = {n: Oracle(p.detach().numpy().copy(), ROLE.get(n, "matrix"), **how) for n, p in params.items()}
    for step in range(20):
        for name, p in params.items():
            p.grad = torch.tensor(gradient(name, step))
            oracles[name].step(gradient(name, step))
        optimizer.step()
        for name, p in params.items():
            assert np.allclose(p.detach().numpy(), oracles[name].w, rtol=1e-12, atol=1e-12), (step, name)
    kept = {name: [key for key, t in optimizer.state[p].items() if t.ndim] for name, p in params.items()}
    assert kept.pop("head") == ["momentum_buffer"] and kept.pop("norm") == ["exp_avg", "exp_avg_sq"]
    assert not any(kept.values())


def test_the_trajectory_of_the_published_code():
    """`length="rms"` and an Adam of the vectors with 20 times the lr are its settings."""
    hyper = dict(lr=1e-3, momentum=0.9, length="rms", plain_lr_scale=20.0)
    far = farthest("scale_60m", lambda params: Scale(groups_of(params), **hyper), lr=1e-3)
    assert max(far.values()) <= 5e-4, far


def test_a_factor_of_a_row_of_the_gradient_changes_nothing():
    ends = []
    for factor in (1.0, 2.0**9):
        p = nn.Parameter(torch.zeros(9, 6, dtype=torch.float64))
        optimizer = Scale([("w", p)], lr=0.1)
        for step in range(5):
            p.grad = torch.tensor(gradient("up", step))
            p.grad[3] *= factor
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("role", ["matrix", "input", "output"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (1, 7), (7, 1), (5, 3), (700, 300)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hostile_shapes_and_rows(dtype, shape, role):
    """Lengths of 1 but for what is zero, which stays; a NaN stays in its row, or column."""
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = Scale([{"params": [p], "split": role == "matrix", "role": role}], lr=1.0, eps=1e-30)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    along = grad.T if role == "input" else grad
    if min(shape) > 1:
        along[0] = 0.0
        along[1, 0] = torch.nan
    p.grad = grad.clone()
    optimizer.step()
    got = (p.detach().T if role == "input" else p.detach()).double()
    if min(shape) > 1:
        assert not got[0].any() and got[1].isnan().all()
        got, along = got[2:], along[2:]
    if min(shape):
        want = -along.double() / along.double().norm(dim=1, keepdim=True)
        assert torch.allclose(
            got, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-6 if dtype != torch.float64 else 1e-14
        )


def test_equal_rows_move_equally_and_a_tiny_row_is_not_blown_up():
    p = nn.Parameter(torch.zeros(3, 4))
    p.grad = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1e-12, 0, 0, 0]])
    Scale([p], lr=1.0).step()
    assert torch.allclose(p[0], p[1], atol=0, rtol=1e-6) and p[2, 0].item() == pytest.approx(-1e-4)


@pytest.mark.parametrize("descend", [descend_rows, descend_columns])
def test_pieces_of_a_long_matrix_are_the_whole(descend):
    grad = torch.randn(5000, 70, generator=torch.Generator().manual_seed(1))
    long, dim = torch.zeros(5000, 70), 1 if descend is descend_rows else 0
    descend([long], [grad], [0.5], 1e-8, False)
    want = -0.5 * grad.double() / grad.double().norm(dim=dim, keepdim=True)
    assert torch.allclose(long.double(), want, rtol=1e-5, atol=0)


def model(tied):
    sizes = ModelConfig(preset=None, dim=8, layers=2, heads=2, hidden=12, vocab_size=19, tied=tied)
    made = GPT(sizes)
    made.init_weights(0)
    return made


def test_roles_are_told_by_modules_and_a_tied_tensor_is_output():
    groups = split_groups(model(False), include=[r"\.(attn|mlp)\."], roles=True)
    found = {group["role"]: group["names"] for group in groups}
    assert found["input"] == ["embed.weight"] and found["output"] == ["lm_head.weight"]
    assert len(found["matrix"]) == 14 and all("norm" in name for name in found["vector"])
    assert {group["role"]: group["split"] for group in groups} == {
        "matrix": True, "input": False, "output": False, "vector": False,
    }  # fmt: skip
    groups = split_groups(model(True), include=[r"\.(attn|mlp)\."], exclude=["mlp.up"], roles=True)
    found = {group["role"]: group["names"] for group in groups}
    assert "input" not in found and found["output"] == ["embed.weight"]
    assert [name for name in found["vector"] if "norm" not in name] == [f"layers.{i}.mlp.up.weight" for i in (0, 1)]


def test_what_is_left_to_adamw_is_said_and_so_is_a_tied_tensor():
    assert "5 of 21 tensors" in (said := listing(Scale(split_groups(model(False), ["attn|mlp"], roles=True))))
    assert "lm_head" not in said and "embed" not in said
    said = listing(Scale(split_groups(model(True), ["attn|mlp"], roles=True)))
    assert "embed.weight: output; a tied embedding is the same tensor" in said
    said = listing(Scale(split_groups(model(False), [r"\.(attn|mlp)\."])))
    assert "embed.weight, lm_head.weight: full AdamW, for no group says" in said
    with pytest.raises(ValueError, match="role='head'"):
        Scale([{"params": [nn.Parameter(torch.zeros(2, 2))], "role": "head"}])


@pytest.mark.parametrize(("kept", "near"), [("bf16", 0.02), ("8bit", 0.1)])
def test_the_momentum_of_the_head_is_kept_in_few_bits(kept, near):
    ends = []
    for state_dtype in ("fp32", kept):
        p = nn.Parameter(torch.zeros(17, 6))
        optimizer = Scale([{"params": [p], "split": False, "role": "output"}], lr=0.1, state_dtype=state_dtype)
        for step in range(20):
            p.grad = torch.randn(17, 6, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        ends.append(p.detach())
        size = {"fp32": 4 * 102, "bf16": 2 * 102, "8bit": 102 + 4}[state_dtype]
        assert sum(t.nbytes for t in optimizer.state[p].values() if t.ndim) == size
    assert 0 < (ends[0] - ends[1]).norm() / ends[0].norm() < near
