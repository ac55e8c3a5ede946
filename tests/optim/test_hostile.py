"""Every registered method on matrices and gradients that no paper thinks of; a new method is there without a line.

NaN gradients of a refused step are in test_applied.py, layouts and dtypes in test_manners.py.
"""

import pytest
import torch
from torch import nn

from tests.tools.manners import OURS, small
from thriftlab.optim import METHODS, split_groups
from thriftlab.train.model import GPT, ModelConfig

SHAPES = {"1 x N": (1, 37), "N x 1": (37, 1), "one": (1, 1), "odd": (5, 3), "tall": (400, 2), "flat": (2, 400)}
GRADIENTS = {
    "zeros": torch.zeros_like,
    "one row": lambda x: torch.zeros_like(x).index_fill(0, torch.tensor([len(x) // 2]), 1.0),
    "one-hot rows": lambda x: torch.zeros_like(x).scatter(1, torch.arange(len(x))[:, None] % x.shape[1], 1.0),
    "one entry": lambda x: torch.zeros_like(x).index_put((torch.tensor([0]), torch.tensor([-1])), torch.ones(())),
    "equal": torch.ones_like,
    "tiny": lambda x: torch.full_like(x, 1e-22),
    "large": lambda x: x.sign() * 1e12,
}
every_own = pytest.mark.parametrize("name", OURS)


def made(name, params, **hyper):
    return METHODS[name](params, **{**small(METHODS[name]), "weight_decay": 0.0, **hyper})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_own
def test_odd_matrices_and_gradients_leave_finite_weights(name, dtype):
    """Each gradient twice, one after the other, so that what one leaves in the state meets the next."""
    weights = {what: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for what, shape in SHAPES.items()}
    params = {what: nn.Parameter(weight.to(dtype)) for what, weight in weights.items()}
    optimizer = made(name, params.items())
    for kind, gradient in GRADIENTS.items():
        for _ in range(2):
            for what, p in params.items():
                p.grad = gradient(weights[what]).to(dtype)
            optimizer.step()
        for what, p in params.items():
            assert p.isfinite().all(), (what, kind)
    for p in params.values():
        for key, value in optimizer.state[p].items():
            assert not value.is_floating_point() or key.startswith(("limiter", "diagnostic")) or value.isfinite().all()


@every_own
def test_what_has_no_gradient_in_any_step_does_not_move(name):
    """Nor does anything that is zero become NaN on the way."""
    params = {what: nn.Parameter(torch.ones(shape)) for what, shape in SHAPES.items()}
    optimizer = made(name, params.items())
    for _ in range(4):
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in params.values())


@every_own
def test_a_nan_stays_in_its_tensor(name):
    params = {what: nn.Parameter(torch.ones(6, 4)) for what in "ab"}
    optimizer = made(name, params.items())
    for step in range(3):
        for what, p in params.items():
            p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            if what == "a" and step:
                p.grad[2, 1] = torch.nan
        optimizer.step()
    assert params["b"].isfinite().all()


@pytest.mark.parametrize("tables", [None, "ember", "own"])
@every_own
def test_a_tied_table_is_one_tensor_that_is_stepped_once(name, tables):
    model = GPT(ModelConfig(preset=None, dim=8, layers=1, heads=2, hidden=12, vocab_size=19, tied=True))
    model.init_weights(0)
    groups = split_groups(model, [r"\.(attn|mlp)\."], roles=True)
    held = [held for group in groups for held in group["names"]]
    assert held.count("embed.weight") == 1 and "lm_head.weight" not in held
    optimizer = made(name, groups, **({"tables": tables} if tables else {}))
    alone = nn.Parameter(model.embed.weight.detach().clone())
    [group] = [group for group in groups if "embed.weight" in group["names"]]
    other = made(name, [{**group, "params": [alone]}], **({"tables": tables} if tables else {}))
    for _ in range(3):
        model.lm_head(model.embed(torch.arange(19))).logsumexp(1).sum().backward()
        alone.grad = model.embed.weight.grad.clone()
        optimizer.step()
        other.step()
        optimizer.zero_grad()
    assert torch.equal(alone, model.embed.weight)
