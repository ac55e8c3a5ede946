"""FSDP2 as a backend: one process's numbers from rows of everything; each rule once, nothing sent but the plan."""

import functools
from collections import Counter

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.tools import gang, zero_cases
from tests.tools.methods import MAKERS
from tests.tools.runs import run_status, stop_rank
from tests.tools.scale import alone, batch, distance, make, one_step, weights_of
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import BackendError
from thriftlab.optim import AdamW, SignSGD, state_bytes
from thriftlab.train.backends import make_backend
from thriftlab.train.backends.fsdp2 import blocks

MAKERS = {**MAKERS, "8bit": functools.partial(MAKERS["columns"], state_dtype="8bit")}
FP64 = {"dtype": torch.float64}
CASES = {  # world -> tolerance -> (method, or LAYER+METHOD, or frozen+METHOD; how)
    2: {
        0: [
            *(
                (name, {})
                for name in (
                    "adamw",
                    "8bit",
                    "columns",
                    "coordinates, project",
                    "badam",
                    "galore",
                    "muon",
                    "scale",
                    "rmnp, all",
                    "sinkgd",
                    "adam mini",
                    "soap",
                    "conda",
                    "dion2",
                    "signsgd, 8bit",
                    "muon, ember",
                    "signsgd",
                    "apollo",
                    "normuon",
                    "stable_spam",
                    "subtrack",
                )
            ),
            *((name, {}) for name in ("lost+fira", "sltrain+adamw", "frozen+columns")),
            ("adamw", {"precision": "bf16"}),
            ("lost+columns", {"precision": "bf16", "checkpointing": True}),
        ],
        1e-6: [
            ("adamw", {"max_norm": 0.05}),  # norms are sums over ranks
            ("fira", {"micro_batches": 3, "max_norm": 0.5}),  # each micro-batch is summed over ranks
        ],
    },
    3: {1e-7: [("columns", FP64), ("galore", FP64), ("blocks", {**FP64, "micro_batches": 2})]},
}
STEPS = 5  # subspaces are refreshed in the first and the last


@pytest.fixture(scope="module")
def gangs():
    """What all ranks make of all cases: one group of processes for each world."""
    return {world: gang.ranks(world, together, [case for some in CASES[world].values() for case in some])
            for world in CASES}  # fmt: skip


def together(cases):
    """Of each case: the weights, the norms and what this rank did."""
    backend = make_backend("fsdp2")
    results = [trained(backend, name, **how) for name, how in cases]
    backend.close()
    return results


def trained(backend, name, dtype=torch.float32, checkpointing=False, **how):
    what, _, rule = name.rpartition("+")
    layer = what if what != "frozen" else None
    model, optimizer = make(MAKERS[rule], dtype, checkpointing, layer, "mlp.up" if what == "frozen" else None)
    ran, update, total = [], optimizer.update, sum(p.numel() for p in model.parameters())

    def counting(names, *rest):
        ran.extend(names)
        update(names, *rest)

    optimizer.update = counting
    backend.prepare(model, optimizer)
    norms = [one_step(backend, [batch(t, backend.rank, backend.world)], **how)[0] for t in range(STEPS)]
    exchange = backend.sharded.exchange
    seen = {
        "ran": ran,
        "sent": exchange.sent,
        "planned": exchange.ownership.sent(backend.rank),
        "owned": [*exchange.ownership.owner],
        "state": (state_bytes(optimizer), backend.predicted_state_bytes()),
        "held": sum(piece.tensor.numel() for piece in backend.weights().values()) / total,
    }
    return {k: w.numpy() for k, w in weights_of(model).items()}, norms, seen


def listed():
    for world, tolerances in CASES.items():
        cases = [(tolerance, *case) for tolerance, some in tolerances.items() for case in some]
        yield from (pytest.param(world, i, *case, id=f"{world}-{i}-{case[1]}") for i, case in enumerate(cases))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "i", "tolerance", "name", "how"), list(listed()))
def test_ranks_are_one_process(gangs, world, i, tolerance, name, how):
    """To the bit at two; to the noise of sums in another order at more, with clipping and with accumulation."""
    what, _, rule = name.rpartition("+")
    where = {"frozen": "mlp.up"} if what == "frozen" else {"layer": what}
    how = {key: value for key, value in how.items() if key != "checkpointing"}
    weights, norms = alone(MAKERS[rule], world, STEPS, **where, **how)
    for got, got_norms, _ in (rank[i] for rank in gangs[world]):
        assert distance(got, weights) <= tolerance and got_norms == pytest.approx(norms, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "i", "tolerance", "name", "how"), list(listed()))
def test_what_is_sent_kept_and_run_is_the_plan(gangs, world, i, tolerance, name, how):
    seen = [rank[i][2] for rank in gangs[world]]
    ran = Counter(name for rank in seen for name in rank["ran"])
    assert all(ran[name] == STEPS for name in seen[0]["owned"])
    assert bool(seen[0]["owned"]) == (
        name.rpartition("+")[2] not in ("adamw", "signsgd", "columns", "coordinates, project", "badam", "blocks")
    )
    for rank in seen:
        assert rank["sent"] == STEPS * rank["planned"]
        assert rank["held"] <= 1 / world + 0.1  # rows do not divide evenly here
    if "columns" not in name and "coordinates" not in name:  # of these a rank knows what is expected of chance
        assert all(kept == predicted for kept, predicted in (rank["state"] for rank in seen))


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_is_the_run_under_ddp(tiny_data, tmp_path):
    """Through the configuration, with the witness, evaluation, dropout, a layer and checkpoints."""
    parts = {
        "layer": {"name": "lost"},
        "optim": {"name": "galore", "rank": 4, "gap": 3},
        "train": {"batch_size": 8, "threads": 1, "clip": None, "micro_batch_size": 4, "dropout": 0.1},
        "eval": {"every": 5},
    }
    ddp, fsdp = (
        tiny_config(tiny_data, tmp_path / name, backend={"name": name}, **parts).model_dump()
        for name in ("ddp", "fsdp2")
    )
    assert gang.ranks(2, run_status, ddp) == ["done", "done"]
    assert all("after step 5" in words for words in gang.ranks(2, stopped, fsdp, 5))
    assert len([*(tmp_path / "fsdp2" / "checkpoints").glob("step-00000005/model*.safetensors")]) == 2
    assert gang.ranks(2, run_status, fsdp) == ["done", "done"]
    ours, theirs = (zero_cases.read_run(tmp_path / name) for name in ("fsdp2", "ddp"))
    assert ours["results"] == theirs["results"] and ours["model"] == theirs["model"]
    assert ours["memory"]["state_bytes"] == ours["memory"]["predicted_state_bytes"] < theirs["memory"]["state_bytes"]
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, tensor in theirs["weights"].items():
        assert torch.equal(tensor, ours["weights"][name]), name


def stopped(tree, step):
    return stop_rank(tree, step) or ""


# ---------------------------------------------------------------------------------------------------- what goes wrong


def in_odd_ways():
    """What a step did whose gradient is not finite on one rank; the losses after weights are put, here and in one
    process; and what other optimizers are told."""
    backend = make_backend("fsdp2")
    model, optimizer = make(AdamW)
    backend.prepare(model, optimizer)
    counted, seen = [], []

    def look(*_):
        seen.append((isinstance(model.layers[0].mlp.up.weight, DTensor), torch.is_autocast_cache_enabled()))

    model.layers[1].register_forward_pre_hook(look)
    for t in range(3):
        spoil = t == 1 and backend.rank == 1
        hook = model.layers[1].register_forward_hook(lambda *parts: parts[2] * float("nan")) if spoil else None
        before = weights_of(model)
        counted.append(one_step(backend, [batch(t, backend.rank, 2)], max_norm=1.0)[1])
        counted.append(distance(before, weights_of(model)) > 0)
        if hook:
            hook.remove()
    plain, whole = make(AdamW)[0], weights_of(model)
    with torch.no_grad():
        backend.module(*batch(0, 0, 1))  # leaves the embedding gathered
        backend.put_weights(lambda name, piece: piece.tensor * 2)
        for name, p in plain.named_parameters():
            p.copy_(2 * whole[name])
        losses = [module(*batch(0, 0, 1)).sum().item() for module in (backend.module, plain)]
    try:
        backend.prepare(make(AdamW)[0], torch.optim.SGD(make(AdamW)[0].parameters()))
    except BackendError as error:
        said = str(error)
    backend.close()
    return counted, losses, said, seen


def test_a_bad_number_on_one_rank_is_one_decision_and_weights_that_are_put_are_used():
    (counted, losses, said, seen), other = gang.ranks(2, in_odd_ways)
    assert set(seen) == {(True, False)}  # while one block runs the other is not whole, nor are copies kept of it
    assert counted == other[0] == [True, True, False, False, True, True]
    assert losses[0] == losses[1] and losses == other[1]
    assert "SGD" in said and "backend.name=ddp" in said


def compiled():
    """The largest difference to the same steps without torch.compile, and the nodes of the largest graph."""
    backend, found = make_backend("fsdp2"), []
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile = functools.partial(torch.compile, backend=compiler)
    for how in (False, True):
        model, optimizer = make(AdamW, checkpointing=True)
        backend.prepare(model, optimizer, compiled=how)
        for t in range(2):
            one_step(backend, [batch(t, 0, 1)])
        found.append(weights_of(model))
    backend.close()
    return distance(*found), max(len(graph.graph.nodes) for graph in graphs)


@pytest.mark.slow
def test_blocks_are_compiled_under_activation_checkpointing():
    ((apart, nodes),) = gang.ranks(1, compiled)
    assert apart < 1e-6 and nodes > 30  # of a block


def test_one_process_is_told_to_use_torchrun():
    with pytest.raises(BackendError, match="backend fsdp2 needs torchrun"):
        make_backend("fsdp2")


def test_blocks_are_the_members_of_lists():
    model = make(SignSGD)[0]
    assert [*blocks(model)] == [*model.layers] and not [*blocks(model.layers[0])]
