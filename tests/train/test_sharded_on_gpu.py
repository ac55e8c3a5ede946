"""Steps of cut tensors on fake CUDA tensors, at the shapes of llama-1b: FSDP2 as a whole, and our adapter to DeepSpeed.

FSDP2 itself runs on such tensors, DeepSpeed's engine does not: it is a stand-in that hands over flat gradients. Every
method is stepped as rank 0 of eight, its own matrices and those that travel to owners and back.
"""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.tools.gpu_steps import MATRICES, OPTIONS, VOCABULARY, WORLD, hold, make_group, second_step
from thriftlab.optim import METHODS

STAGES = (2, 3)  # in the other two no tensor is cut, or as in stage 2


def held_by_rows(fragments):
    """By rank, what FSDP2 gives it of the tensors of which rank 0 has these."""
    from thriftlab.optim.core.fragments import Fragment

    held = []
    for rank in range(WORLD):
        held.append([])
        for name, shape, *_ in fragments:
            each, rest = -(-shape[0] // WORLD), torch.Size(shape[1:]).numel()
            first, last = (min(each * place, shape[0]) for place in (rank, rank + 1))
            if first < last:
                held[-1].append(Fragment(name, shape, first * rest, last * rest))
    assert held[0] == fragments
    return held


def second_step_of_fsdp2(method, **options):
    """The mesh is made of true tensors; of what the others say only the fragments matter."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from thriftlab.train.backends import fsdp2, ranks

    def mesh(*args):
        with unset_fake_temporarily():
            return made(*args)

    made = fsdp2.init_device_mesh
    share = mock.patch.object(ranks.Distributed, "share", lambda self, value: held_by_rows(value))
    with mock.patch.object(fsdp2, "init_device_mesh", mesh), share:
        return second_step("fsdp2", method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_methods_under_fsdp2(fake_cuda, method):
    hold(fake_cuda(partial(second_step_of_fsdp2, method, **OPTIONS.get(method, {}))), owned=True)


class DeepSpeedZeroOptimizer:
    """Stages 1 and 2: parameters in a row, which is cut into equal parts."""

    def __init__(self, parameters):
        sizes = [p.numel() for p in parameters]
        self.whole = sum(sizes)
        self.size = -(-self.whole // WORLD)
        self.flat = torch.empty(self.size, device="cuda")
        self.single_partition_of_fp32_groups, self.round_robin_bit16_groups = [self.flat], [parameters]
        self.round_robin_bit16_offsets = [[sum(sizes[:i]) for i in range(len(sizes))]]
        self.real_dp_process_group = [None]


class DeepSpeedZeroOptimizer_Stage3:
    """Every parameter is cut into equal parts."""

    def __init__(self, parameters):
        for p in parameters:
            p.ds_shape, p.ds_numel = p.shape, p.numel()
            p.partition_numel = lambda p=p: -(-p.ds_numel // WORLD)
        self.flat = torch.empty(sum(p.partition_numel() for p in parameters), device="cuda")
        self.fp32_partitioned_groups_flat, self.fp16_groups = [self.flat], [parameters]
        self.dp_process_group = None


def adapter(method, stage):
    """Ours, as `attach` leaves it, whose engine is a stand-in."""
    from tests.fake_cuda.counts import to_device
    from thriftlab.optim import split_groups
    from thriftlab.train.backends.zero import optimizer
    from thriftlab.train.model import GPT, ModelConfig

    with torch.device("meta"):
        model = GPT(ModelConfig(preset="llama-1b", layers=1, vocab_size=VOCABULARY))
    model, kind = to_device(model), METHODS[method]
    rule = kind(split_groups(model, include=[MATRICES], roles=kind.roles), **OPTIONS.get(method, {}))
    sharded = optimizer.ShardedMethod(rule, model)
    zero = {2: DeepSpeedZeroOptimizer, 3: DeepSpeedZeroOptimizer_Stage3}[stage]([*model.parameters()])

    def held(*_):
        """What all ranks read of their engines."""
        found = []
        for rank in range(WORLD):
            with mock.patch("torch.distributed.get_rank", lambda group=None, rank=rank: rank):
                layout = optimizer.read_layout(zero, sharded.names)
            found.append([fragment for fragment, _ in layout.places.values()])
        return found

    engine = SimpleNamespace(module=model, optimizer=zero)
    with mock.patch.object(optimizer, "refuse", lambda _: None), mock.patch.object(optimizer, "verify", held):
        sharded.attach(engine)
    sharded.layout.flat.grad = torch.empty_like(sharded.layout.flat)
    return sharded


def steps_of_adapter(method):
    """By stage what a second step takes: scaling, clipping, exchange and the method's update."""
    from tests.fake_cuda.counts import Counts

    make_group()
    found = {}
    for stage in STAGES:
        sharded = adapter(method, stage)
        for _ in range(2):
            with Counts() as counts, mock.patch("torch.Tensor.data_ptr", lambda t: 4 * t.storage_offset()):
                sharded.scale, sharded.max_norm = torch.ones((), device="cuda"), 1.0
                sharded.step()
        found[stage] = counts.counted
    return found


@pytest.mark.parametrize("method", METHODS)
def test_our_adapter_to_deepspeed(fake_cuda, method):
    for stage, counted in fake_cuda(steps_of_adapter, method).items():
        assert not counted.reads.total() and not counted.to_host and not counted.to_device, (stage, counted.reads)
        assert {device for _, device, _ in counted.collectives} == {"cuda"}
