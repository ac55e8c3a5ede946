"""Launchers through triton's own path, with a stand-in for a GPU's driver: what is compiled, and the host's work."""

import re

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


def loss_and_layer(tokens):
    """What a loss over GPT-2's 50257 tokens and a layer of LOST launch, each both ways."""
    from thriftlab.kernels import branches, cross_entropy_rows

    logits = torch.zeros(tokens, 50272, dtype=torch.bfloat16)[:, :50257]
    _, lse = cross_entropy_rows.ce_stats(logits, torch.zeros(tokens, dtype=torch.int64))
    cross_entropy_rows.ce_grad_(logits, torch.zeros(tokens, dtype=torch.int64), lse, lse)
    x, h = torch.zeros(tokens, 512, dtype=torch.bfloat16), torch.zeros(tokens, 128, dtype=torch.bfloat16)
    index = torch.arange(5)
    grad = branches.join_branches(x, h, index, "silu")
    branches.fold(torch.zeros(512, 128), torch.zeros(512, 5), 0.7, torch.bfloat16)
    branches.part_branches_(grad, h, "silu")
    branches.add_channels_(x, grad[:, 128:133], index)


@pytest.mark.slow
def test_other_numbers_of_tokens_take_the_same_binaries_and_rows_are_read_128_bits_at_a_time():
    with fake_driver(90) as launches:
        loss_and_layer(48)
        first = list(launches)
        launches.clear()
        loss_and_layer(64)
    assert [launch.kernel for launch in launches] == [
        "stats_of_row",
        "grad_of_row",
        "join",
        "join",
        "part",
        "add_columns",
    ]
    assert all(one.compiled is two.compiled for one, two in zip(first, launches, strict=True))
    assert launches[0].grid == (64,) and launches[2].grid == (16, 1)
    for launch in (launches[0], launches[1], launches[4]):
        assert ".v4.b32" in launch.compiled.asm["ptx"], launch.kernel
    assert not re.search(r"(ld|st)\.global\S*\.b16", launches[4].compiled.asm["ptx"])
