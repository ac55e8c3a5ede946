"""DeepSpeed's stages beside one process: bitwise at two ranks, summation noise at three; nothing runs twice."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import gang
import pytest
import torch
import zero_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import run_status
from tiny import tiny_config
from zero_cases import METHODS, ROWS

from thriftlab.optim.fragments import Fragment
from thriftlab.train.backend import BackendError, make_backend
from thriftlab.train.config import RunConfig
from thriftlab.train.zero import engine_settings, merged
from thriftlab.train.zero_layout import VERSION, Layout, refuse, verify
from thriftlab.train.zero_optimizer import ShardedMethod
from thriftlab.train.zero_plan import make_plan

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
            ("fira", 2, {"settings": OVERLAP, "checkpointing": True}),
            *(("galore", stage, {"precision": "bf16"}) for stage in (1, 2, 3)),
            *(("adamw", stage, {"spoil": (4,)}) for stage in range(4)),
        ],
        "close": [
            *(("fira", stage, {"max_norm": 0.3}) for stage in (1, 3)),
            *(("galore", stage, {"accumulate": 2}) for stage in range(4)),
        ],
    },
    3: {
        "bitwise": [],
        "close": [(method, stage, {}) for method in ("galore", "frugal columns", "adamw, 8 bit") for stage in (1, 3)],
    },
}
TOLERANCE = {"bitwise": 0.0, "close": 5e-6}
SAVED = [("galore", 1), ("frugal coordinates", 3), ("frugal rows", 1), ("adamw, bf16 state", 3), ("frugal blocks", 2)]
RESUMED = {  # world -> (method, saved, stage)
    2: [("galore", "galore-1-2", 3), ("frugal coordinates", "frugal coordinates-3-2", 1),
        ("frugal rows", "frugal rows-1-2", 0), ("adamw, bf16 state", "adamw, bf16 state-3-2", 2),
        ("frugal blocks", "frugal blocks-2-2", 3)],
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


@pytest.mark.parametrize("world, kind, i", list(listed()))
def test_one_process_and_many_end_with_the_same_weights(gangs, world, kind, i):
    compared = [rank[i] for rank, _ in gangs[world]]
    assert max(difference for difference, _ in compared) <= TOLERANCE[kind]
    for _, seen in compared:
        for ours, theirs in zip(*seen["steps"], strict=True):
            assert ours[2] == theirs[2]
            assert ours[:2] == pytest.approx(theirs[:2], rel=1e-6, nan_ok=True)
        assert repr(seen["steps"]) == repr(compared[0][1]["steps"])  # ranks agree, on nan as well


@pytest.mark.parametrize("world, kind, i", list(listed()))
def test_what_is_sent_kept_and_run_is_the_plan(gangs, world, kind, i):
    seen = [rank[i][1] for rank, _ in gangs[world]]
    method, stage, options = [case for some in CASES[world].values() for case in some][i]
    taken = sum(applied for *_, applied in seen[0]["steps"][0])
    for rank in seen:
        assert rank["sent"] == taken * rank["planned"]
        if stage and "blocks" not in method and method != "badam":
            assert rank["state_bytes"] <= seen[0]["total_bytes"] / world + 8 * 123 * 11 + 4 * 123
        if method not in ("frugal columns", "frugal rows", "frugal coordinates"):
            assert rank["state_bytes"] == rank["predicted_bytes"]
    ran = Counter(name for rank in seen for name in rank["ran"])
    assert all(ran[name] == taken for name in seen[0]["owned"])
    if stage == 3 and method in ("galore", "muon"):
        assert len(seen[0]["owned"]) == 4
    if method in ("adamw", "signsgd", "frugal blocks", "frugal rows", "badam"):
        assert all(rank["sent"] == 0 for rank in seen)
    if "chunk" in options:
        assert seen[0]["chunks"] > 1


@pytest.mark.parametrize("world, i", [(world, i) for world, cases in RESUMED.items() for i in range(len(cases))])
def test_saved_anywhere_resumed_anywhere(gangs, world, i):
    method, *_ = RESUMED[world][i]
    expected, *_ = zero_cases.reference(method, END, 2)
    for _, resumed in gangs[world]:
        got = {name: torch.from_numpy(w) for name, w in resumed[i].items()}
        assert zero_cases.difference(expected, got) <= (0 if world == 2 else 5e-6)


@pytest.mark.parametrize("method, stage", SAVED)
def test_one_process_resumes_what_shards_saved(gangs, folder, method, stage):
    backend = zero_cases.Backend()
    net, optimizer = zero_cases.build(method)
    backend.prepare(net, optimizer)
    zero_cases.resume(backend, folder / f"{method}-{stage}-2")
    zero_cases.steps(backend, SAVED_AT, END, ROWS // 2)
    expected, *_ = zero_cases.reference(method, END, 2)
    assert zero_cases.difference(expected, {name: p.detach() for name, p in net.named_parameters()}) == 0


def test_a_run_at_stage_3_is_the_run_under_ddp(tiny_data, tmp_path):
    """With evaluation and checkpoints, through the configuration."""
    optim = {"name": "galore", "rank": 4, "gap": 3}
    train = {"batch_size": 8, "threads": 1, "clip": None, "micro_batch_size": 4}
    backends = {"zero": {"name": "deepspeed", "stage": 3, "settings": SMALL}, "ddp": {"name": "ddp"}}
    for name, backend in backends.items():
        config = tiny_config(tiny_data, tmp_path / name, optim=optim, train=train, backend=backend, eval={"every": 5})
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
    plan = make_plan(held, dict.fromkeys(shapes, False), work, state, chunk)
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


# ---------------------------------------------------------------------------------------------------------- refusals


def layout(*places, flat=None):
    flat = torch.arange(12.0) if flat is None else flat
    return Layout(flat, {f.name: (f, at) for f, at in places})


MODEL = {"a": torch.arange(6.0), "b": torch.arange(6.0, 12.0)}
SHAPES = {"a": (2, 3), "b": (6,)}
RIGHT = [(Fragment("a", (2, 3), 0, 6), 0), (Fragment("b", (6,), 0, 6), 6)]


def test_a_layout_is_compared_with_the_model():
    assert verify(layout(*RIGHT), SHAPES, MODEL.__getitem__, lambda said: [said]) == [[f for f, _ in RIGHT]]


@pytest.mark.parametrize(
    "places, message",
    [
        ([RIGHT[0], (RIGHT[1][0], 5)], "'b': entries 0 to 6 are not the model's"),
        ([RIGHT[0]], "'b': entries 0 to 6 are held by nobody"),
        ([RIGHT[0], (Fragment("b", (6,), 2, 6), 8)], "'b': entries 0 to 2 are held by nobody"),
        ([*RIGHT, (Fragment("c", (6,), 0, 6), 6)], "'c'.* not parameters"),
    ],
)
def test_a_layout_that_is_not_the_models_is_refused(places, message):
    with pytest.raises(BackendError, match=message):
        verify(layout(*places), SHAPES, MODEL.__getitem__, lambda said: [said])


def test_entries_that_two_ranks_hold_are_refused():
    with pytest.raises(BackendError, match="held twice"):
        verify(layout(*RIGHT), SHAPES, MODEL.__getitem__, lambda said: [said, said])


def test_values_that_differ_on_another_rank_only_are_refused_here_too():
    with pytest.raises(BackendError, match="'b': entries 0 to 3 are not"):
        share = lambda said: [said, ([], ["'b': entries 0 to 3 are not the model's"])]  # noqa: E731
        verify(layout(*RIGHT), SHAPES, MODEL.__getitem__, share)


@dataclasses.dataclass
class Zero:
    offload_optimizer: object = None
    offload_param: object = None
    round_robin_gradients: bool = False
    zero_hpz_partition_size: int = 1
    zero_quantized_gradients: bool = False
    zero_quantized_weights: bool = False


def engine(load_universal_checkpoint=False, has_moe_layers=False, mpu=None, optimizer=None, **zero):
    config = SimpleNamespace(load_universal_checkpoint=load_universal_checkpoint, zero_config=Zero(**zero))
    ours = object()
    return SimpleNamespace(
        _config=config, has_moe_layers=has_moe_layers, mpu=mpu, sequence_parallel_size=1,
        basic_optimizer=ours, optimizer=optimizer or ours,
    )  # fmt: skip


class DeepSpeedZeroOptimizer:
    pass


@pytest.mark.parametrize(
    "what, message",
    [
        ({"load_universal_checkpoint": True}, "universal checkpoint"),
        ({"has_moe_layers": True}, "mixture of experts"),
        ({"mpu": object()}, "parallelism"),
        ({"optimizer": SimpleNamespace()}, "SimpleNamespace.*torch_autocast"),
        ({"optimizer": DeepSpeedZeroOptimizer()}, f"has no single_partition.*deepspeed=={VERSION}"),
        ({"offload_optimizer": SimpleNamespace(device="cpu")}, "offloading"),
        ({"round_robin_gradients": True}, "round_robin"),
        ({"zero_hpz_partition_size": 2}, "hpZ"),
        ({"zero_quantized_weights": True}, "quantised"),
    ],
)
def test_what_is_not_proved_is_refused(what, message):
    refuse(engine())
    with pytest.raises(BackendError, match=message):
        refuse(engine(**what))


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("deepspeed.__version__", "0.20.0")
    with pytest.raises(BackendError, match=f"version 0.20.0.*deepspeed=={VERSION}"):
        refuse(engine())


def test_an_optimizer_that_nobody_attached_does_not_stand_still():
    net, method = zero_cases.build("galore")
    sharded = ShardedMethod(method, net)
    sharded.step()  # as DeepSpeed does once, before there are gradients
    net(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    with pytest.raises(RuntimeError, match="attach"):
        sharded.step()


def test_a_parameter_that_nobody_trains_is_refused():
    net, method = zero_cases.build("galore")
    net.norm.weight.requires_grad_(False)
    with pytest.raises(BackendError, match="norm.weight"):
        ShardedMethod(method, net)


def test_deepspeeds_own_checkpoint_is_refused():
    net, method = zero_cases.build("galore")
    with pytest.raises(RuntimeError, match="save_checkpoint"):
        ShardedMethod(method, net).state_dict()


def test_settings_of_the_user_are_added_and_ours_stay():
    ours = engine_settings(1, "fp32")
    assert merged(ours, OVERLAP)["zero_optimization"] == {**ours["zero_optimization"], "overlap_comm": True}
    for theirs in ({"gradient_clipping": 1.0}, {"zero_optimization": {"stage": 2}}):
        with pytest.raises(BackendError, match="backend.settings"):
            merged(ours, theirs)


@pytest.mark.parametrize(
    "backend", [{"name": "ddp", "stage": 1}, {"stage": 2}, {"name": "owned", "settings": {"a": 1}}]
)
def test_a_stage_belongs_to_a_backend_that_has_stages(backend):
    with pytest.raises(ValueError, match="belongs to deepspeed"):
        RunConfig(backend=backend)
