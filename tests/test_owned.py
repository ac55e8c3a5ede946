"""Owned: one process's numbers, a share of its state, each rule once, nothing sent but the plan."""

import functools

import gang
import pytest
import torch
import torch.distributed as dist
from methods import MAKERS
from scale import alone, batch, distance, make, one_step, weights_of

from thriftlab.optim import AdamW, Frugal, Muon, state_bytes
from thriftlab.train.backend import BackendError, make_backend
from thriftlab.train.owned import Item, assign, items


def together(cases, steps, dtype=torch.float32, **how):
    """Weights and norms of each named method on this rank."""
    backend, results = make_backend("owned"), {}
    for name in cases:
        model, optimizer = make(MAKERS[name], dtype)
        backend.prepare(model, optimizer)
        norms = [one_step(backend, [batch(t, backend.rank, backend.world)], **how)[0] for t in range(steps)]
        results[name] = {k: w.numpy() for k, w in weights_of(model).items()}, norms
    backend.close()
    return results


def held_against_one_process(world, cases, steps, tolerance, **how):
    ranks = gang.ranks(world, functools.partial(together, **how), cases, steps)
    for name in cases:
        weights, norms = alone(MAKERS[name], world, steps, **how)
        for rank in ranks:
            got, got_norms = rank[name]
            assert distance(got, weights) <= tolerance, name
            assert got_norms == norms if tolerance == 0 else got_norms == pytest.approx(norms, rel=1e-5), name


def test_two_ranks_are_bitwise_one_process():
    held_against_one_process(2, list(MAKERS), steps=10, tolerance=0)


def test_clipping_keeps_that():
    held_against_one_process(2, ["adamw", "columns", "galore"], steps=6, tolerance=0, max_norm=0.05)


def test_accumulation_is_summation_noise():
    held_against_one_process(2, ["adamw", "rows, keep", "fira"], 6, tolerance=1e-6, max_norm=0.5, micro_batches=3)


@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks_are_summation_noise(world):
    held_against_one_process(world, ["adamw", "fira"], steps={3: 50, 4: 20}[world], tolerance=5e-6)


@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks_are_summation_noise_however_it_is_amplified(world):
    """In fp64, where a first Adam step on a tiny gradient, or a sign, makes of noise no more than noise."""
    exact = [name for name in MAKERS if name != "muon"]  # its iteration in bf16 is another amplifier
    held_against_one_process(world, exact[world == 4 :: world - 2], 6, tolerance=1e-7, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ no pretence


def audited(cases, steps):
    """Of each method on this rank: what it stepped, what it sent, and the bytes of its state against the plan."""
    backend, results = make_backend("owned"), []
    sent = {"reduce": 0, "broadcast": 0}
    for verb in sent:
        plain = getattr(dist, verb)

        def counted(flat, *arguments, verb=verb, plain=plain, **keywords):
            sent[verb] += flat.numel()
            return plain(flat, *arguments, **keywords)

        setattr(dist, verb, counted)
    for method, hyper in cases:
        model, optimizer = make(method, **hyper)
        stepped = []
        plain_update = optimizer.update

        def update(names, *rest, plain=plain_update, stepped=stepped):
            stepped.extend(names)
            plain(names, *rest)

        optimizer.update = update
        backend.prepare(model, optimizer)
        before = dict(sent)
        for t in range(steps):
            one_step(backend, [batch(t, backend.rank, backend.world)])
        results.append((stepped, {verb: sent[verb] - before[verb] for verb in sent}, state_bytes(optimizer)))
    backend.close()
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_each_rule_runs_once_and_what_is_sent_and_kept_is_the_plan(world):
    cases = [
        (AdamW, {}),
        (Frugal, {"subspace": "columns"}),
        (Frugal, {"density": 1.0}),
        (Muon, {}),
        (AdamW, {"state_dtype": "8bit"}),
    ]
    ranks = gang.ranks(world, audited, cases, 3)
    for (method, hyper), *results in zip(cases, *ranks, strict=True):
        model, optimizer = make(method, **hyper)
        entries = sum(p.numel() for p in model.parameters())
        plan, planned = assign(items(optimizer), world), items(optimizer)
        assert sorted(name for stepped, _, _ in results for name in stepped) == sorted([i.name for i in planned] * 3)
        for rank, (stepped, sent, kept) in enumerate(results):
            assert set(stepped) == {name for name, owner in plan.items() if owner == rank}
            assert sent == {"reduce": 3 * entries, "broadcast": 3 * entries}
            assert kept == sum(item.state_bytes for item in planned if plan[item.name] == rank)
            total = sum(item.state_bytes for item in planned)
            assert kept <= total / world + max(item.state_bytes for item in planned)


def test_work_is_balanced_and_no_rank_has_more_state_than_its_share():
    layers = [(f"{i}.{kind}", n) for i in range(24) for kind, n in (("attn", 1024), ("mlp", 2736), ("mlp2", 2736))]
    shapes = [("embed", 32000 * 1024, 32000 * 1024), *((name, 1024 * n * 1024, 1024 * n) for name, n in layers)]
    for world in (2, 3, 8, 64, 512):
        parts = [Item(name, work, 8 * numel) for name, work, numel in shapes]
        plan = assign(parts, world)
        share = [[i for i in parts if plan[i.name] == rank] for rank in range(world)]
        largest = max(i.state_bytes for i in parts)
        assert (
            max(sum(i.state_bytes for i in own) for own in share) <= sum(i.state_bytes for i in parts) / world + largest
        )
        heaviest, mean = max(i.work for i in parts), sum(i.work for i in parts) / world
        assert max(sum(i.work for i in own) for own in share) <= mean + heaviest
        assert assign(parts[::-1], world) == plan


# ---------------------------------------------------------------------------------------------------- what goes wrong


def with_a_bad_number(where):
    """Three steps, the second with a NaN in one gradient of the last rank: what counted, and the weights."""
    backend = make_backend("owned")
    model, optimizer = make(AdamW)
    backend.prepare(model, optimizer)
    counted = []
    for t in range(3):
        spoil = t == 1 and backend.rank == backend.world - 1
        hook = dict(model.named_parameters())[where].register_hook(lambda g: g * float("nan")) if spoil else None
        counted.append(one_step(backend, [batch(t, backend.rank, backend.world)], max_norm=1.0)[1])
        if hook:
            hook.remove()
    backend.close()
    return counted, {k: w.numpy() for k, w in weights_of(model).items()}


@pytest.mark.parametrize("where", ["embed.weight", "layers.1.mlp.up.weight"])
def test_a_bad_number_on_one_rank_is_one_decision(where):
    (counted, weights), (other, other_weights) = gang.ranks(2, with_a_bad_number, where)
    assert counted == other == [True, False, True]
    assert distance(weights, other_weights) == 0


def in_all_modes(steps):
    """Weights under activation checkpointing, bf16 and torch.compile."""
    backend, results = make_backend("owned"), {}
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # all but the C++ compiler
    for mode in ("plain", "checkpointing", "bf16", "compile"):
        model, optimizer = make(AdamW, checkpointing=mode == "checkpointing")
        backend.prepare(model, optimizer, compiled=mode == "compile")
        for t in range(steps):
            precision = "bf16" if mode == "bf16" else "fp32"
            one_step(backend, [batch(t, backend.rank, backend.world)], precision=precision)
        results[mode] = {k: w.numpy() for k, w in weights_of(model).items()}
    backend.close()
    return results


def test_checkpointing_bf16_and_compile_work():
    results, others = gang.ranks(2, in_all_modes, 2)
    plain = results["plain"]
    assert distance(results["checkpointing"], plain) == 0
    assert 0 < distance(results["bf16"], plain) < 1e-2
    assert distance(results["compile"], plain) < 1e-5
    for mode in results:
        assert distance(results[mode], others[mode]) == 0


class Foreign(torch.optim.Adam):
    pass


def refused():
    backend = make_backend("owned")
    model = make(AdamW)[0]
    try:
        backend.prepare(model, Foreign(model.parameters()))
    except BackendError as error:
        return str(error)
    finally:
        backend.close()


def test_a_foreign_optimizer_is_refused_with_what_works():
    assert all("Foreign" in said and "backend.name=ddp" in said for said in gang.ranks(2, refused))


def test_one_process_is_told_to_use_torchrun():
    with pytest.raises(BackendError, match="backend owned needs torchrun"):
        make_backend("owned")
