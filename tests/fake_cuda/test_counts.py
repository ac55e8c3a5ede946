"""The counts are what a GPU's host would do: each case says it in words and numbers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.fake_cuda.counts import Counts, to_device


def launches():
    x = torch.empty(3, 4, device="cuda")
    with Counts() as counts:
        y = x.mul(2).add_(1)  # two
        y.view(-1)[2:].t()  # none
        torch.empty_like(x)  # none
        torch._foreach_add_([x, x], 1)  # one
        torch.zeros(3, device="cuda")  # one
        x @ x.T  # one
        torch.ones(3) + 1  # none: on the CPU
    return counts.counted


def reads():
    x, mask = torch.empty(4, device="cuda"), torch.empty(4, dtype=torch.bool, device="cuda")
    with Counts() as counts:
        x.sum().item()
        bool(mask.all())
        torch.equal(x, x)
        torch.cuda.current_stream().synchronize()
        torch.tensor(3).item()  # of the CPU: none
    return counts.counted


def boolean_index():
    x, mask = torch.empty(4, device="cuda"), torch.empty(4, dtype=torch.bool, device="cuda")
    with Counts():
        x[mask]


def copies():
    with Counts() as counts:
        x = torch.ones(3).to("cuda")
        x.cpu()
        x.copy_(torch.ones(3))
        x.bfloat16()
        torch.tensor([1.0], device="cuda")
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)  # alone need not wait
        torch.ones(3, pin_memory=True).to("cuda")
        torch.ones(3).to("cuda", non_blocking=True)
        torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)  # nor does this
    return counts.counted


def truth():
    """Counters on the CPU count, also through views, random draws and comparisons."""
    with Counts():
        step = torch.tensor(0)
        for _ in range(3):
            step += 1
        table = torch.zeros(4, dtype=torch.int64)
        table[2] += 5
        drawn = torch.randperm(10, generator=torch.Generator().manual_seed(1))
        there = torch.zeros((), dtype=torch.int64, device="cuda")
        there += 2
        assert there.is_cuda and int(there) == 2 and int(torch.empty((), device="cuda")) == 1
        return int(step), table.tolist(), drawn.tolist(), bool(step > 2), float(torch.full((), 0.5) * step)


def collectives():
    with Counts() as counts:
        dist.all_reduce(torch.empty(3, device="cuda"))
        dist.broadcast(torch.ones(3), src=0, async_op=True).wait()
    return counts.counted


def backward():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        model[1].weight = model[0].weight
    model = to_device(model)
    with Counts() as counts, torch.autocast("cuda", torch.bfloat16):
        model(torch.empty(2, 8, device="cuda")).sum().backward()
    assert model[0].weight is model[1].weight and model[0].weight.grad.is_cuda
    return counts.counted


def total(counter):
    return sum(counter.values())


def test_views_and_the_cpu_are_no_launches(fake_cuda):
    counted = fake_cuda(launches)
    assert counted.launches == {"mul": 1, "add_": 1, "_foreach_add_": 1, "zeros": 1, "mm": 1}
    assert counted.products.keys() == {("float32", "?")}


def test_what_waits_is_a_read(fake_cuda):
    assert total(fake_cuda(reads).reads) == 4


def test_a_boolean_index_is_an_error(fake_cuda):
    with pytest.raises(RuntimeError, match="waits for the device: index"):
        fake_cuda(boolean_index)


def test_copies_have_a_direction(fake_cuda):
    counted = fake_cuda(copies)
    assert counted.to_device == {("?", True): 5, ("?", False): 1}
    assert counted.to_host == {("?", True): 1, ("?", False): 1}


def test_small_tensors_of_the_cpu_have_values(fake_cuda):
    drawn = torch.randperm(10, generator=torch.Generator().manual_seed(1)).tolist()
    assert fake_cuda(truth) == (3, [0, 0, 5, 0], drawn, True, 1.5)


def test_collectives_tell_their_device(fake_cuda):
    assert fake_cuda(collectives).collectives == {
        ("all_reduce", "cuda", "float32"): 1,
        ("broadcast", "cpu", "float32"): 1,
    }


def test_backward_runs_and_its_products_are_counted(fake_cuda):
    counted = fake_cuda(backward)
    assert total(counted.products) == 5 and {dtype for dtype, _ in counted.products} == {"bfloat16"}


def test_nothing_of_it_is_in_this_process(fake_cuda):
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.empty(1, device="cuda")
