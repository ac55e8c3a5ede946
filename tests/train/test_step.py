"""One gradient, however a batch is split; one decision on all ranks when a step goes wrong."""

import weakref

import pytest
import torch

from tests.tools import gang
from tests.tools.gradients import Gradients
from thriftlab.data.errors import BackendError
from thriftlab.data.loader import Batch
from thriftlab.train.backends import make_backend
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.step import train_step

ROWS = 8
CONFIG = ModelConfig(preset=None, dim=16, layers=2, heads=2, hidden=24, vocab_size=17, init_std=0.3)


def batch_of(rank, world):
    tokens = torch.randint(17, (ROWS, 13), generator=torch.Generator().manual_seed(5))[rank::world]
    return Batch(tokens, torch.zeros(len(tokens)), torch.arange(len(tokens)))


def build(dtype):
    model = GPT(CONFIG).to(dtype)
    model.init_weights(0)
    return model, Gradients(model.parameters())


def gradients(dtype, micro_batch_sizes, max_norm):
    """Per micro-batch size: loss, norm, and the gradient that reaches the optimizer."""
    backend = make_backend("auto")
    results = []
    for size in micro_batch_sizes:
        model, optimizer = build(dtype)
        backend.prepare(model, optimizer)
        result = train_step(backend, batch_of(backend.rank, backend.world), None, size, "fp32", max_norm)
        results.append((result.loss, result.grad_norm, [g.numpy() for g in optimizer.seen[0]]))
    backend.close()
    return results


def expected(dtype, max_norm):
    """The gradient of the mean loss over the whole batch, with autograd alone."""
    model, _ = build(dtype)
    tokens = batch_of(0, 1).tokens
    logits = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([g.norm() for g in grads]).norm()
    factor = 1 if max_norm is None else min(1.0, max_norm / norm)
    return loss.item(), norm.item(), [g * factor for g in grads]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_one_gradient_for_every_split(world, dtype, tolerance):
    sizes = [1, 2, 4, 8]
    for max_norm in (None, 0.1, 100.0):
        loss, norm, exact = expected(dtype, max_norm)
        split = gradients(dtype, sizes, max_norm) if world == 1 else gang.ranks(2, gradients, dtype, sizes, max_norm)
        for rank_results in [split] if world == 1 else split:
            for got_loss, got_norm, got in rank_results:
                assert abs(got_loss - loss) < tolerance * 10
                assert abs(got_norm - norm) < tolerance * 10
                for a, b in zip(got, exact, strict=True):
                    torch.testing.assert_close(torch.from_numpy(a), b, rtol=0, atol=tolerance)


def bad_step(kind, where="norm"):
    """Three steps, of which the second goes wrong on the last rank; which were applied and whether weights moved.

    In the last norm a bad number spoils loss and gradient, added to the output ("") the loss alone.
    """
    backend = make_backend("auto")
    model = GPT(CONFIG)
    model.init_weights(0)
    backend.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    history = []
    for step in range(3):
        spoil = step == 1 and backend.rank == backend.world - 1
        place = model.get_submodule(where)
        handle = place.register_forward_hook(lambda *_: _[2] + kind) if spoil else None
        before = [p.detach().clone() for p in model.parameters()]
        result = train_step(backend, batch_of(backend.rank, backend.world), None, 2, "fp32", 1.0)
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        history.append((result.applied, moved))
        if handle:
            handle.remove()
    weights = [p.detach().numpy().copy() for p in model.parameters()]
    backend.close()
    return history, weights


@pytest.mark.parametrize("where", ["norm", ""])
@pytest.mark.parametrize("kind", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped(kind, where):
    history, _ = bad_step(kind, where)
    assert history == [(True, True), (False, False), (True, True)]


def test_ranks_agree_to_skip_what_one_of_them_spoiled():
    (history, weights), (other_history, other_weights) = gang.ranks(2, bad_step, float("nan"))
    assert history == other_history == [(True, True), (False, False), (True, True)]
    assert all((a == b).all() for a, b in zip(weights, other_weights, strict=True))


def test_bf16_gradients_are_near_the_exact_ones():
    model, optimizer = build(torch.float32)
    backend = make_backend("single")
    backend.prepare(model, optimizer)
    train_step(backend, batch_of(0, 1), None, 8, "bf16", None)
    _, _, exact = expected(torch.float32, None)
    for a, b in zip(optimizer.seen[0], exact, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.05 * b.norm()


def test_ddp_without_torchrun_is_refused_with_the_command():
    with pytest.raises(BackendError, match="torchrun"):
        make_backend("ddp")


def closed_after_its_reducer():
    """Whether the reducer, which holds the group as well, is gone when the group is destroyed."""
    backend = make_backend("ddp")
    backend.prepare(*build(torch.float32))
    reducer, destroy, seen = weakref.ref(backend.replica.reducer), torch.distributed.destroy_process_group, []

    def watched():
        seen.append(reducer() is None)
        destroy()

    torch.distributed.destroy_process_group = watched
    backend.close()
    return seen


def test_the_reducer_goes_before_its_group():
    assert gang.ranks(2, closed_after_its_reducer) == [[True]] * 2
