"""Launchers through triton's own path, with a stand-in for a GPU's driver: what is compiled, and the host's work."""

import pytest
import torch

from tests.tools.calls import calls_of
from tests.tools.fake_driver import fake_driver
from thriftlab.kernels import norm_rows

SHAPES = [(32, 64), (64, 96), (10, 7)]  # the last begins its rows anywhere


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def step(shapes=SHAPES):
    """What a step of Fira launches, on new tensors."""
    weights, grads, firsts, seconds = ([torch.zeros(shape) for shape in shapes] for _ in range(4))
    rows = [shape[0] >= shape[1] for shape in shapes]
    factors = norm_rows.norms(grads, rows)
    norm_rows.adam_small(grads, firsts, seconds, torch.ones(len(shapes)), (0.9, 0.999), 1e-8, rows)
    norm_rows.scale_add(weights, grads, factors, rows)
    norm_rows.scale_add(weights, grads, factors, rows, keep=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_two_steps_take_one_binary(architecture):
    """Addresses and numbers change from step to step, and nothing is compiled again."""
    with fake_driver(architecture) as launches:
        step()
        first = list(launches)
        launches.clear()
        step()
    assert [launch.kernel for launch in launches] == [
        kernel for kernel in ("norms_kernel", "adam_kernel", "scale_add_kernel", "scale_add_kernel") for _ in range(2)
    ]
    assert all(one.compiled is two.compiled for one, two in zip(first, launches, strict=True))
    assert first[4].compiled is first[6].compiled, "another factor is the same kernel"
    assert all(launch.compiled.metadata.target.arch == architecture for launch in launches)
    assert len({id(launch.compiled) for launch in launches}) == 6, "two of each: aligned and not"
    assert all("cubin" in launch.compiled.asm for launch in launches)


@pytest.mark.slow
def test_the_hosts_work_for_many_tensors():
    """A step of 300 matrices: calls of Python and C for one more of them, not counting those for a launch."""
    with fake_driver(90):
        few, many = (calls_of(lambda count=count: step([(32, 64)] * count)) for count in (30, 300))
    assert (many - few) / 270 <= 30  # of them 8 make the tensors
    assert few < 1600
