"""Owned: one process's numbers, a share of its state, each rule once, nothing sent but the plan."""

import functools

import pytest
import torch
import torch.distributed as dist

from tests.tools import gang
from tests.tools.methods import MAKERS
from tests.tools.scale import alone, batch, distance, make, one_step, weights_of
from thriftlab.data.errors import BackendError
from thriftlab.optim import AdamW, Frugal, Muon, state_bytes
from thriftlab.optim.core.owners import Cost, assign
from thriftlab.train.backends import make_backend, owned

EXACT = [name for name in MAKERS if "muon" not in name and "dion2" not in name]  # bf16 amplifies
FP64 = {"steps": 6, "dtype": torch.float64}  # here a first Adam step on a tiny gradient, or a sign, amplifies nothing
LAYERED = {"lost": ["adamw", "columns", "fira", "muon"], "cola": ["adamw"], "lowrank": ["blocks"],
           "sltrain": ["adamw", "galore"], "lora": ["adamw", "blocks"]}  # fmt: skip
RUNS = {  # world -> what -> (methods, tolerance, how)
    2: {
        **{layer: (some, 0, {"steps": 5, "layer": layer}) for layer, some in LAYERED.items()},
        "frozen": (["adamw", "blocks", "fira"], 0, {"steps": 5, "frozen": "mlp.up"}),
        "all": (list(MAKERS), 0, {"steps": 10}),
        "clipped": (["adamw", "columns", "galore"], 0, {"steps": 6, "max_norm": 0.05}),
        "accumulated": (["adamw", "rows, keep", "fira"], 1e-6, {"steps": 6, "max_norm": 0.5, "micro_batches": 3}),
    },
    3: {"long": (["adamw", "fira"], 5e-6, {"steps": 50}), "fp64": (EXACT[::2], 1e-7, FP64)},
    4: {"long": (["adamw", "fira"], 5e-6, {"steps": 20}), "fp64": (EXACT[1::2], 1e-7, FP64)},
}


@pytest.fixture(scope="module")
def gangs():
    """What all ranks make of all runs: one group of processes for each world."""
    return {world: gang.ranks(world, together, runs) for world, runs in RUNS.items()}


def together(runs):
    """Weights and norms of each run's methods on this rank."""
    backend = make_backend("owned")
    results = {what: {name: trained(backend, name, **how) for name in names} for what, (names, _, how) in runs.items()}
    backend.close()
    return results


def trained(backend, name, steps, dtype=torch.float32, layer=None, frozen=None, **how):
    model, optimizer = make(MAKERS[name], dtype, layer=layer, frozen=frozen)
    backend.prepare(model, optimizer)
    norms = [one_step(backend, [batch(t, backend.rank, backend.world)], **how)[0] for t in range(steps)]
    return {k: w.numpy() for k, w in weights_of(model).items()}, norms


@pytest.mark.slow
@pytest.mark.parametrize(("world", "what"), [(world, what) for world, runs in RUNS.items() for what in runs])
def test_ranks_are_one_process(gangs, world, what):
    """To the bit at two, also clipped; to the noise of sums taken in another order at more, and with accumulation."""
    names, tolerance, how = RUNS[world][what]
    for name in names:
        weights, norms = alone(MAKERS[name], world, **how)
        for rank in gangs[world]:
            got, got_norms = rank[what][name]
            assert distance(got, weights) <= tolerance, name
            assert got_norms == norms if tolerance == 0 else got_norms == pytest.approx(norms, rel=1e-5), name


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


@pytest.mark.slow
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
        plan, planned = assign(optimizer.costs(), world), optimizer.costs()
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
        parts = [Cost(name, work, 8 * numel) for name, work, numel in shapes]
        plan = assign(parts, world)
        share = [[i for i in parts if plan[i.name] == rank] for rank in range(world)]
        largest = max(i.state_bytes for i in parts)
        assert (
            max(sum(i.state_bytes for i in own) for own in share) <= sum(i.state_bytes for i in parts) / world + largest
        )
        heaviest, mean = max(i.work for i in parts), sum(i.work for i in parts) / world
        assert max(sum(i.work for i in own) for own in share) <= mean + heaviest
        assert assign(parts[::-1], world) == plan


# ------------------------------------------------------------------------------------------------------- the sums


class Sometimes(torch.nn.Module):
    """One layer of two, or both, as `uses` says."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
        self.uses = "both"
        for p in self.parameters():
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))

    def forward(self, x):
        layers = {"both": [self.first, self.second], "first": [self.first], "second": [self.second]}[self.uses]
        return sum(layer(x).tanh().sum() for layer in layers)


USES = [("both", "both"), ("first", "first"), ("both", "first"), ("second", "first"), ("first", "both")]  # by rank


def sometimes(backend, ranks):
    """Weights after a step for each line of USES, by the gradients of some ranks; and the buckets that have left when
    the backward of each micro-batch ends."""
    model = Sometimes()
    named = [{"params": [*model.parameters()], "names": [name for name, _ in model.named_parameters()]}]
    backend.prepare(model, AdamW(named, lr=0.1, weight_decay=0.5))
    early = []
    for uses in USES:
        for i, rank in enumerate(ranks):
            model.uses = uses[rank]
            with backend.micro_batch(last=i == len(ranks) - 1):
                backend.backward(backend.module(torch.arange(6.0).view(2, 3) - rank))
                early.append(len(sums.flying) if (sums := getattr(backend, "sums", None)) else 0)
        backend.step(torch.tensor(0.5), 1.0)
    return {k: w.numpy() for k, w in weights_of(model).items()}, early


def on_two_ranks():
    owned.BUCKET = 1  # each tensor travels alone
    backend = make_backend("owned")
    weights, early = sometimes(backend, [backend.rank])
    _, later = sometimes(backend, [backend.rank] * 2)
    backend.close()
    return weights, early[0], later[:2]


@pytest.mark.slow
def test_a_gradient_that_is_there_at_times_is_summed_or_none_as_with_one_process():
    expected, _ = sometimes(make_backend("single"), [0, 1])
    for weights, early, later in gang.ranks(2, on_two_ranks):
        assert distance(weights, expected) == 0
        assert early == 4 and later == [0, 4]  # all of them during backward, of the last micro-batch


# ---------------------------------------------------------------------------------------------------- what goes wrong


def with_bad_numbers(places):
    backend = make_backend("owned")
    results = {where: with_a_bad_number(backend, where) for where in places}
    backend.close()
    return results


def with_a_bad_number(backend, where):
    """Three steps, the second with a NaN in one gradient of the last rank: what counted, and the weights."""
    model, optimizer = make(AdamW)
    backend.prepare(model, optimizer)
    counted = []
    for t in range(3):
        spoil = t == 1 and backend.rank == backend.world - 1
        hook = dict(model.named_parameters())[where].register_hook(lambda g: g * float("nan")) if spoil else None
        counted.append(one_step(backend, [batch(t, backend.rank, backend.world)], max_norm=1.0)[1])
        if hook:
            hook.remove()
    return counted, {k: w.numpy() for k, w in weights_of(model).items()}


def test_a_bad_number_on_one_rank_is_one_decision():
    places = ["embed.weight", "layers.1.mlp.up.weight"]  # of either rank
    ours, theirs = gang.ranks(2, with_bad_numbers, places)
    for where in places:
        (counted, weights), (other, other_weights) = ours[where], theirs[where]
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


@pytest.mark.slow
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
