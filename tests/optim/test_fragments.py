"""Entry-wise methods on pieces of tensors: weights and state are bitwise those of the whole, wherever it is cut."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftlab.optim import RMNP, AdamMini, AdamW, BAdam, Frugal, GaLore, Muon, Scale, SignSGD, SinkGD
from thriftlab.optim.core.fragments import Fragment
from thriftlab.optim.state.coordinates import Columns, Coordinates, Rows

SUBSPACES = {"columns": Columns, "rows": Rows, "coordinates": Coordinates}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SUBSPACES)),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_chosen_entries_are_counted_from_the_front(name, rows, columns, density, seed):
    subspace = SUBSPACES[name](density)
    matrix = torch.arange(rows * columns).view(rows, columns)
    basis = subspace.refresh(matrix, "a", 0, torch.Generator().manual_seed(seed))
    chosen = subspace.down(matrix, basis).flatten().tolist()
    assert chosen == sorted(set(chosen))
    shape = (rows, columns)
    assert subspace.positions(shape, basis, torch.arange(len(chosen))).tolist() == chosen
    for position in range(matrix.numel() + 1):
        assert subspace.below(position, shape, basis) == sum(p < position for p in chosen)


CUT = st.lists(st.integers(0, 1000), min_size=1, max_size=4)
SHAPES = {"odd": (37, 11), "even": (16, 32), "tall": (70, 3), "plain": (61,), "other": (9, 9)}


def parameters():
    draw = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}


def slope(name, step):
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(10 * step + list(SHAPES).index(name)))


ENTRYWISE = {
    "adamw": lambda p, **k: AdamW(p, weight_decay=0.1, **k),
    "adamw, bf16": lambda p, **k: AdamW(p, state_dtype="bf16", **k),
    "signsgd": lambda p, **k: SignSGD(p, weight_decay=0.1),
    "blocks": lambda p, **k: Frugal(p, gap=3, density=0.5, weight_decay=0.1, **k),
    "random blocks, keep": lambda p, **k: Frugal(p, gap=3, density=0.5, order="random", on_refresh="keep", **k),
    "columns": lambda p, **k: Frugal(p, gap=3, subspace="columns", density=0.4, **k),
    "rows, project, bf16": lambda p, **k: Frugal(
        p, gap=3, subspace="rows", density=0.4, on_refresh="project", state_dtype="bf16", **k
    ),
    "coordinates, project": lambda p, **k: Frugal(
        p, gap=3, subspace="coordinates", density=0.3, on_refresh="project", **k
    ),
    "lion": lambda p, **k: Frugal(p, gap=3, subspace="coordinates", density=0.3, rule="lion", stagger=True, **k),
    "badam": lambda p, **k: BAdam(p, gap=2, unit="tensor", balance="bytes", density=0.5, **k),
    "lion for all": lambda p, **k: Frugal([{**g, "split": False} for g in p], rule="lion", plain="rule", **k),
    "tables by adamw": lambda p, **k: SignSGD([{**g, "role": "input"} for g in p], tables="adamw", **k),
    "muon's plain": lambda p, **k: Muon([{**g, "split": False} for g in p], **k),
    "galore's plain": lambda p, **k: GaLore([{**g, "split": False} for g in p], **k),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", ENTRYWISE.values(), ids=ENTRYWISE.keys())
@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(CUT, min_size=len(SHAPES), max_size=len(SHAPES)))
def test_pieces_are_stepped_as_the_whole(make, cuts):
    """Eight steps over two refreshes: weights bitwise, and the state in every entry that it has."""
    torch.set_num_threads(1)
    whole, reference = parameters(), parameters()
    method = make([{"params": list(reference.values()), "names": list(reference)}])
    pieces = make([{"params": [torch.empty(s, device="meta") for s in SHAPES.values()], "names": list(SHAPES)}])
    (group,) = pieces.param_groups
    fragments = []
    for (name, p), marks in zip(whole.items(), cuts, strict=True):
        assert pieces.elementwise(tuple(p.shape), group)
        edges = sorted({0, p.numel(), *(mark % p.numel() for mark in marks)})
        fragments += [Fragment(name, tuple(p.shape), a, b) for a, b in pairwise(edges)]
    states = [{} for _ in fragments]
    for step in range(8):
        for name, p in reference.items():
            p.grad = slope(name, step)
        method.step()
        weights = [whole[f.name].detach().view(-1)[f.start : f.stop].clone() for f in fragments]
        grads = [slope(f.name, step).view(-1)[f.start : f.stop].clone() for f in fragments]
        pieces.update_fragments(fragments, weights, grads, states, group)
        for f, weight in zip(fragments, weights, strict=True):
            whole[f.name].detach().view(-1)[f.start : f.stop] = weight
    for name, p in reference.items():
        assert torch.equal(p, whole[name]), name
        of_pieces = [state for f, state in zip(fragments, states, strict=True) if f.name == name]
        for key, tensor in method.state[p].items():
            if tensor.ndim and not key.startswith("basis."):
                assert torch.equal(tensor.flatten(), torch.cat([state[key] for state in of_pieces])), (name, key)
            elif not key.startswith("diagnostic."):
                assert all(torch.equal(tensor, state[key]) for state in of_pieces), (name, key)


def test_what_depends_on_other_entries_is_no_business_of_pieces():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(4, 4))], "names": ["a"]}]
    for method in (
        AdamW(groups, state_dtype="8bit"),
        Frugal(groups, state_dtype="8bit"),
        Frugal(groups, subspace="columns", density=0.5, on_refresh="keep"),
        Frugal(groups, subspace="svd", density=0.5),
        GaLore(groups, rank=2),
        Muon(groups),
        SignSGD([{**groups[0], "role": "input"}], tables="ember"),
        SignSGD([{**groups[0], "role": "output"}], tables="8bit"),
        Scale(groups),
        AdamMini(groups),
        SinkGD(groups),
        RMNP(groups),
    ):
        assert not method.elementwise((4, 4), method.param_groups[0])
