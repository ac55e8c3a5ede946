"""FRUGAL's single entries where torch is to use deterministic algorithms only: the same bits."""

import pytest
import torch

from thriftlab.optim import Frugal
from thriftlab.optim.state.coordinates import Coordinates
from thriftlab.optim.state.keys import keyed_generator


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def weights_after(steps):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 63).view(9, 7).clone())
    method = Frugal([{"params": [weight], "names": ["w"], "split": True}], lr=0.1, subspace="coordinates", density=0.3,
                    gap=2, on_refresh="project")  # fmt: skip
    for step in range(steps):
        weight.grad = torch.sin(torch.arange(63.0) * (step + 1)).view(9, 7)
        method.step()
    return weight.detach()


def test_a_step_has_the_same_bits(request):
    plain = weights_after(5)
    request.getfixturevalue("deterministic")
    assert torch.equal(weights_after(5), plain)


@pytest.mark.parametrize("transposed", [False, True])
def test_entries_are_written_where_they_were_read(deterministic, transposed):
    matrix = torch.arange(63.0).view(7, 9).T if transposed else torch.arange(63.0).view(9, 7)
    subspace = Coordinates(0.3)
    where = subspace.where(matrix, subspace.refresh(matrix, "w", 0, keyed_generator(0, "w", 0)))
    expected = matrix.reshape(-1).clone()
    expected[where] += 100
    subspace.put(matrix, where, subspace.take(matrix, where) + 100)
    assert torch.equal(matrix.reshape(-1), expected)
