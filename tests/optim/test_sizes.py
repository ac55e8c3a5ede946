"""A subspace as large as the matrix, as small as nothing, or of another size than before: said, never deep inside."""

import pytest
import torch

from thriftlab.optim import (
    AdamW,
    Apollo,
    BAdam,
    Fira,
    Frugal,
    GaLore,
    SubTrack,
    left_to_adamw,
    predicted_state_bytes,
    state_bytes,
)
from thriftlab.optim.core.listing import listing
from thriftlab.optim.state.dense import Orthogonal
from thriftlab.optim.state.subspaces import basis_of

SHAPES = {"small": (8, 4), "wide": (4, 9), "column": (6, 1), "none": (0, 3), "large": (12, 10), "bias": (4,)}
LOW_RANK = {
    "galore": lambda p, **k: GaLore(p, **{"rank": 4, "gap": 3, **k}),
    "fira": lambda p, **k: Fira(p, **{"rank": 4, "gap": 3, **k}),
    "subtrack": lambda p, **k: SubTrack(p, **{"rank": 4, "gap": 3, "step_size": 0.1, **k}),
    "apollo": lambda p, **k: Apollo(p, **{"rank": 4, "gap": 3, **k}),
    "mini": lambda p, **k: Apollo(p, rank=1, gap=3, granularity="tensor", **k),
    "frugal": lambda p, **k: Frugal(p, subspace="svd", gap=3, **{"density": 0.9, **k}),
}


class Own:
    """The first `rank` columns, or as many as there are; a rank that can be changed between refreshes."""

    def __init__(self, rank=2):
        self.rank = rank

    def refresh(self, grad, name, count, generator):
        return {"p": torch.eye(grad.shape[1])[:, : self.rank]}

    def down(self, grad, basis):
        return grad @ basis["p"]

    def up(self, small, basis):
        return small @ basis["p"].T


def problem(shapes=SHAPES):
    draw = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def train(params, optimizer, steps, first=0):
    for t in range(first, first + steps):
        draw = torch.Generator().manual_seed(t)
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
    return {name: p.detach().clone() for name, p in params.items()}


@pytest.mark.parametrize("make", LOW_RANK.values(), ids=LOW_RANK)
def test_a_rank_of_the_smaller_side_is_full_adamw_and_listed(make):
    """What is on the list is trained as if it had not been chosen by name, and what is not on it is split."""
    params, twins = problem(), problem()
    optimizer = make(params.items())
    left = left_to_adamw(optimizer)
    rank = 1 if optimizer.defaults.get("rank") == 1 else 4
    matrices = [name for name, shape in SHAPES.items() if len(shape) == 2]
    assert {name for name in matrices if name in left} == {n for n in matrices if min(SHAPES[n]) <= rank}
    assert left["column"].endswith(">= smaller side 1") and left["bias"] == "1-D" and left["none"].startswith("rank")
    chosen = {n: p for n, p in twins.items() if n not in left}
    rest = {n: p for n, p in twins.items() if n in left}
    twin = make([{"params": chosen.items()}, {"params": rest.items(), "split": False}])
    got, want = train(params, optimizer, 7), train(twins, twin, 7)
    assert all(torch.equal(got[name], want[name]) for name in SHAPES)
    for name, p in params.items():
        assert ("basis.vectors" in optimizer.state[p]) == (name not in left)
        spec = {key: (tuple(t.shape), t.dtype) for key, t in optimizer.state[p].items()}
        assert spec == optimizer.spec(SHAPES[name], torch.float32)
    assert state_bytes(optimizer) == predicted_state_bytes(optimizer)


def test_the_fallback_is_adamw_itself():
    params, twins = problem(), problem()
    frugal = Frugal(params.items(), subspace="orthogonal", density=1.0, split_lr_scale=7.0)
    got, want = train(params, frugal, 5), train(twins, AdamW(twins.items()), 5)
    assert all(torch.equal(got[name], want[name]) for name in SHAPES)


def test_a_subspace_of_ones_own_is_taken_at_its_word():
    params = problem({"w": (8, 4)})
    optimizer = Fira(params.items(), subspace=Own())  # and the default rank of 128 means nothing
    train(params, optimizer, 1)
    assert left_to_adamw(optimizer) == {} and "basis.p" in optimizer.state[params["w"]]


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (3, 4)])
def test_in_a_basis_of_the_whole_space_projected_moments_are_adams(shape):
    """Taken up, the first moment is the mean of the gradients whatever the bases were, also where nothing is small."""
    p, subspace, mean = torch.nn.Parameter(torch.zeros(shape).double()), Orthogonal(rank=3), 0.0
    optimizer = GaLore([("w", p)], subspace=subspace, gap=2, on_refresh="project")
    for t in range(7):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t)).double()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * p.grad
        state = optimizer.state[p]
        assert torch.allclose(subspace.up(state["exp_avg"], basis_of(state)), mean, rtol=0, atol=1e-12)


def test_who_splits_nothing_is_told():
    params = problem({"w": (8, 4), "bias": (4,)})
    assert Fira(params.items(), rank=4).remarks() == [
        "no matrix is split, this is full AdamW alone (rank 4 >= smaller side 4)"
    ]
    assert listing(Fira(params.items(), rank=4)).count("\n") == 1
    assert Fira(params.items(), rank=3).remarks() == AdamW(params.values()).remarks() == []
    assert "none was chosen by name" in Frugal([{"params": params.items(), "split": False}]).remarks()[0]


def test_a_density_that_rounds_to_no_block_is_told():
    two = problem({"layers.0.w": (4, 4), "layers.1.w": (4, 4)})
    frugal, badam = Frugal(two.items(), gap=1), BAdam(two.items(), gap=1)
    assert "rounds to none" in frugal.remarks()[0] and "free='sign'" in frugal.remarks()[0]
    assert "none is trained" in listing(badam)
    train(two, frugal, 3)
    assert state_bytes(frugal) == 0
    for fine in ({"density": 0.5}, {"density": 0.0}, {"balance": "bytes"}, {"order": lambda names, count: names[:1]}):
        assert Frugal(two.items(), **fine).remarks() == []


@pytest.mark.parametrize("subspace", ["columns", "rows", "coordinates", "svd", "warm_svd", "gauss"])
def test_a_density_changed_during_a_run(subspace):
    """Counts from the next refresh; `keep` has no moments for it and says so."""
    for on_refresh in ("reset", "project", "keep"):
        params = problem({"w": (8, 6)})
        optimizer = Frugal(params.items(), subspace=subspace, density=0.5, gap=3, on_refresh=on_refresh)
        train(params, optimizer, 2)
        before = state_bytes(optimizer)
        for group in optimizer.param_groups:
            group["density"] = 5 / 6
        train(params, optimizer, 1, first=2)
        assert state_bytes(optimizer) == before
        if on_refresh == "keep":
            with pytest.raises(ValueError, match=r"w: on_refresh='keep' .* rank or density .* on_refresh='reset'"):
                train(params, optimizer, 1, first=3)
            optimizer.param_groups[0]["on_refresh"] = "reset"
        weights = train(params, optimizer, 4, first=3)
        assert weights["w"].isfinite().all() and before < state_bytes(optimizer) == predicted_state_bytes(optimizer)


@pytest.mark.parametrize("cls", [Frugal, GaLore, Fira, Apollo])
def test_ones_own_basis_of_another_rank_under_keep(cls):
    params, own = problem({"w": (8, 6)}), Own(2)
    optimizer = cls(params.items(), subspace=own, gap=2, on_refresh="keep")
    train(params, optimizer, 2)
    own.rank = 3
    with pytest.raises(ValueError, match=r"w: .* shape \(8, 2\) .* makes \(8, 3\) of the matrix \(8, 6\)"):
        train(params, optimizer, 1, first=2)
    optimizer.param_groups[0]["on_refresh"] = "project"
    assert train(params, optimizer, 3, first=2)["w"].isfinite().all()


def test_a_rank_changed_to_the_smaller_side_and_back():
    params = problem({"w": (8, 6)})
    for first, then, now in ((4, 6, "left to full AdamW"), (6, 4, "split")):
        optimizer = GaLore(params.items(), rank=first, gap=2)
        train(params, optimizer, 3)
        optimizer.param_groups[0]["rank"] = then
        with pytest.raises(ValueError, match=rf"w: .* matrix \(8, 6\) is {now}"):
            train(params, optimizer, 1)
        optimizer.state[params["w"]].clear()
        train(params, optimizer, 3)
