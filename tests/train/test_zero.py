"""DeepSpeed's stages beside one process: bitwise at two ranks, summation noise at three; nothing runs twice."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools import gang, zero_cases
from tests.tools.runs import run_status
from tests.tools.tiny import tiny_config
from tests.tools.zero_cases import METHODS, ROWS
from thriftlab.optim.core.fragments import Fragment
from thriftlab.optim.core.owners import Cost
from thriftlab.train.backends import make_backend
from thriftlab.train.backends.zero.exchange import make_ownership

STEPS = 9  # the subspaces of zero_cases.METHODS are refreshed in the first and the eighth
OVERLAP = {"zero_optimization": {"overlap_comm": True}}
SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # else ZeRO-3 keeps small tensors on all ranks
CASES = {
    2: {
        "bitwise": [
            *((method, 3, {}) for method in METHODS),
            *((method, 1, {}) for method in ("adamw, 8 bit", "frugal rows", "frugal coordinates", "fira", "muon")),
            *((method, stage, {}) for method in ("galore", "frugal blocks") for stage in (0, 2)),
            ("galore", 3, {"settings": SMALL, "checkpointing": True}),
            ("muon", 3, {"chunk": 700}),
            ("scale", 2, {}),
            ("fira", 2, {"settings": OVERLAP, "checkpointing": True}),
            ("adamw", 1, {"settings": OVERLAP}),
            *(("galore", stage, {"precision": "bf16"}) for stage in (1, 2, 3)),
            *(("adamw", stage, {"spoil": (4,)}) for stage in range(4)),
            *(("lost+adamw", stage, {}) for stage in range(4)),
            *((f"lost+{rule}", stage, {}) for rule, stage in (("frugal columns", 1), ("fira", 3), ("muon", 1))),
            ("cola+adamw", 1, {}),
            ("sltrain+adamw", 3, {}),
            ("cola+frugal blocks", 3, {"checkpointing": True}),
            ("lowrank+galore", 2, {"precision": "bf16"}),
        ],
        "close": [
            *(("fira", stage, {"max_norm": 0.3}) for stage in (1, 3)),
            *(("galore", stage, {"accumulate": 2}) for stage in range(4)),
        ],
    },
    3: {
        "bitwise": [],
        "close": [
            *((method, stage, {}) for method in ("galore", "frugal columns", "adamw, 8 bit") for stage in (1, 3)),
            ("lost+galore", 3, {}),
        ],
    },
}
TOLERANCE = {"bitwise": 0.0, "close": 5e-6}
SAVED = [("galore", 1), ("frugal coordinates", 3), ("frugal rows", 1), ("adamw, bf16 state", 3), ("frugal blocks", 2),
         ("lost+fira", 3)]  # fmt: skip
RESUMED = {  # world -> (method, saved, stage)
    2: [("galore", "galore-1-2", 3), ("frugal coordinates", "frugal coordinates-3-2", 1),
        ("frugal rows", "frugal rows-1-2", 0), ("adamw, bf16 state", "adamw, bf16 state-3-2", 2),
        ("frugal blocks", "frugal blocks-2-2", 3), ("lost+fira", "lost+fira-3-2", 1)],
    3: [("galore", "galore-1-2", 1), ("frugal rows", "frugal rows-1-2", 3)],
}  # fmt: skip
SAVED_AT, END = 9, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def gangs(folder):
    """Everything that two, then three ranks have to show: one group of processes each."""
    return {world: gang.ranks(world, perform, world, folder) for world in CASES}


def perform(world, folder):
    """On one rank: all cases, then the runs that are saved and resumed."""
    backend = make_backend("deepspeed")
    compared = zero_cases.compare(backend, [case for kind in CASES[world].values() for case in kind], STEPS)
    if world == 2:
        zero_cases.save_all(backend, SAVED, SAVED_AT, folder)
    resumed = zero_cases.resume_all(backend, RESUMED[world], SAVED_AT, END, folder)
    backend.close()
    return compared, resumed


def listed():
    """(world, kind, position among the cases of this world, case)"""
    for world, kinds in CASES.items():
        cases = [(kind, case) for kind, some in kinds.items() for case in some]
        yield from (pytest.param(world, kind, i, id=f"{world}-{case}") for i, (kind, case) in enumerate(cases))


@pytest.mark.slow
@pytest.mark.parametrize("world, kind, i", list(listed()))
def test_one_process_and_many_end_with_the_same_weights(gangs, world, kind, i):
    compared = [rank[i] for rank, _ in gangs[world]]
    assert max(difference for difference, _ in compared) <= TOLERANCE[kind]
    for _, seen in compared:
        for ours, theirs in zip(*seen["steps"], strict=True):
            assert ours[2] == theirs[2]
            assert ours[:2] == pytest.approx(theirs[:2], rel=1e-6, nan_ok=True)
        assert repr(seen["steps"]) == repr(compared[0][1]["steps"])  # ranks agree, on nan as well


@pytest.mark.slow
@pytest.mark.parametrize("world, kind, i", list(listed()))
def test_what_is_sent_kept_and_run_is_the_plan(gangs, world, kind, i):
    seen = [rank[i][1] for rank, _ in gangs[world]]
    method, stage, options = [case for some in CASES[world].values() for case in some][i]
    rule = method.rpartition("+")[2]
    taken = sum(applied for *_, applied in seen[0]["steps"][0])
    for rank in seen:
        assert rank["sent"] == taken * rank["planned"]
        if stage and "blocks" not in rule and rule != "badam":
            assert rank["state_bytes"] <= seen[0]["total_bytes"] / world + 8 * 123 * 11 + 4 * 123
        if rule not in ("frugal columns", "frugal rows", "frugal coordinates"):
            assert rank["state_bytes"] == rank["predicted_bytes"]
    ran = Counter(name for rank in seen for name in rank["ran"])
    assert all(ran[name] == taken for name in seen[0]["owned"])
    if stage == 3 and method in ("galore", "muon"):
        assert list(seen[0]["owned"].values()) == [world] * 4  # each matrix lies across all ranks
    if rule in ("adamw", "signsgd", "frugal blocks", "frugal rows", "badam"):
        assert all(rank["sent"] == 0 for rank in seen)
    if "chunk" in options:
        assert seen[0]["chunks"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("world, i", [(world, i) for world, cases in RESUMED.items() for i in range(len(cases))])
def test_saved_anywhere_resumed_anywhere(gangs, world, i):
    method, *_ = RESUMED[world][i]
    expected, *_ = zero_cases.reference(method, END, 2)
    for _, resumed in gangs[world]:
        got = {name: torch.from_numpy(w) for name, w in resumed[i].items()}
        assert zero_cases.difference(expected, got) <= (0 if world == 2 else 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method, stage", SAVED)
def test_one_process_resumes_what_shards_saved(gangs, folder, method, stage):
    backend = zero_cases.Backend()
    net, optimizer = zero_cases.build(method)
    backend.prepare(net, optimizer)
    zero_cases.resume(backend, folder / f"{method}-{stage}-2")
    zero_cases.steps(backend, SAVED_AT, END, ROWS // 2)
    expected, *_ = zero_cases.reference(method, END, 2)
    assert zero_cases.difference(expected, {name: p.detach() for name, p in net.named_parameters()}) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "settings"), [("dense", {}), ("dense", SMALL), ("lost", {})], ids=["kept gathered", "cut", "layers"]
)
def test_a_run_at_stage_3_is_the_run_under_ddp(tiny_data, tmp_path, layer, settings):
    """With evaluation and checkpoints, through the configuration; after the witness, whose steps are undone."""
    optim = {"name": "galore", "rank": 4, "gap": 3}
    train = {"batch_size": 8, "threads": 1, "clip": None, "micro_batch_size": 4}
    backends = {"zero": {"name": "deepspeed", "stage": 3, "settings": settings}, "ddp": {"name": "ddp"}}
    for name, backend in backends.items():
        parts = {"layer": {"name": layer}, "optim": optim, "train": train, "backend": backend}
        config = tiny_config(tiny_data, tmp_path / name, eval={"every": 5}, **parts)
        assert gang.ranks(2, run_status, config.model_dump()) == ["done", "done"]
    ours, theirs = ({**zero_cases.read_run(tmp_path / name)} for name in backends)
    assert ours["results"] == theirs["results"] and ours["model"] == theirs["model"]
    for run in (ours, theirs):
        assert run["memory"]["state_bytes"] == run["memory"]["predicted_state_bytes"]
    for name, tensor in theirs["weights"].items():
        assert torch.equal(tensor, ours["weights"][name]), name


# ------------------------------------------------------------------------------------------------------------- plans


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12),
    world=st.integers(2, 6),
    one_by_one=st.booleans(),
    chunk=st.integers(1, 2000),
)
def test_plans_are_balanced(sizes, world, one_by_one, chunk):
    shapes = {f"m{i}": size for i, size in enumerate(sizes)}
    held = [[] for _ in range(world)]
    at, part = 0, -(-sum(a * b for a, b in sizes) // world)
    for name, shape in shapes.items():
        n = shape[0] * shape[1]
        low, step = (0, -(-n // world)) if one_by_one else (at, part)
        for rank in range(world):
            start, stop = max(rank * step - low, 0), min((rank + 1) * step - low, n)
            if start < stop:
                held[rank].append(Fragment(name, shape, start, stop))
        at += n
    work = {name: a * b * min(a, b) for name, (a, b) in shapes.items()}
    state = {name: a * b + 3 for name, (a, b) in shapes.items()}
    costs = {name: Cost(name, work[name], state[name]) for name in shapes}
    plan = make_ownership(held, dict.fromkeys(shapes, False), costs, chunk)
    cut = {f.name for some in held for f in some if f.stop - f.start < shapes[f.name][0] * shapes[f.name][1]}
    assert set(plan.owner) == cut and sorted(sum(plan.chunks, [])) == sorted(cut)
    for names in plan.chunks:
        for rank in range(world):
            own = [shapes[name][0] * shapes[name][1] for name in names if plan.owner[name] == rank]
            assert len(own) <= 1 or sum(own) <= chunk
    kept = [sum(state[name] for name, owner in plan.owner.items() if owner == rank) for rank in range(world)]
    if one_by_one and len(cut) == len(shapes):
        assert max(kept) <= sum(state.values()) / world + max(state.values())
    received = sum(plan.sent(rank) for rank in range(world))
    assert received == 3 * sum(
        f.stop - f.start for r, some in enumerate(held) for f in some if plan.owner.get(f.name, r) != r
    )


@pytest.mark.parametrize("world", [3, 4, 5])
def test_a_matrix_across_three_ranks_has_one_owner(world):
    """In a row, each rank 20 entries: of a matrix the last 5 of the first, all of the second and 7 of the third."""
    shapes = {"before": (15,), "matrix": (4, 8), "after": (20 * world - 47,)}
    held, at = [[] for _ in range(world)], 0
    for name, shape in shapes.items():
        n = torch.Size(shape).numel()
        ends = [(rank, max(20 * rank - at, 0), min(20 * rank + 20 - at, n)) for rank in range(world)]
        for rank, start, stop in ends:
            if start < stop:
                held[rank].append(Fragment(name, shape, start, stop))
        at += n
    by_entry = {name: name != "matrix" for name in shapes}
    costs = {name: Cost(name, work, 8) for name, work in (("before", 1), ("matrix", 9), ("after", 1))}
    plan = make_ownership(held, by_entry, costs)
    assert plan.holders == {"matrix": [(0, 0, 5), (1, 5, 25), (2, 25, 32)]}
    owner = plan.owner["matrix"]
    assert owner in range(3) and plan.chunks == [["matrix"]]
    theirs = {0: 5, 1: 20, 2: 7}
    expected = {rank: 2 * n for rank, n in theirs.items()} | {owner: 32 - theirs[owner]}
    assert [plan.sent(rank) for rank in range(world)] == [expected.get(rank, 0) for rank in range(world)]
