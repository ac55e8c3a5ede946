"""Which parameters are split, and which part of a matrix a subspace chooses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from thriftlab.optim import AdamW, Frugal, Subspace, left_to_adamw, split_groups
from thriftlab.optim.core.listing import listing
from thriftlab.optim.state.coordinates import COORDINATES
from thriftlab.optim.state.keys import hash63, keyed_generator, keyed_seed


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(4, 4)
        self.mlp = nn.ModuleDict({"up": nn.Linear(4, 8, bias=False), "down": nn.Linear(8, 4, bias=False)})
        self.norm = nn.LayerNorm(4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(4, 10, bias=False)
        self.lm_head.weight = self.embed.weight


def names(groups, split):
    return [name for group in groups if group["split"] == split for name in group["names"]]


def test_every_parameter_is_in_exactly_one_group_and_vectors_are_not_split():
    model = Tied()
    groups = split_groups(model, include=[r"\.(attn|mlp)\."], exclude=["embed", "lm_head"])
    assert names(groups, True) == [f"layers.{i}.{w}.weight" for i in (0, 1) for w in ("attn", "mlp.up", "mlp.down")]
    assert sorted(names(groups, True) + names(groups, False)) == sorted(name for name, _ in model.named_parameters())
    assert [p is model.get_parameter(name) for g in groups for name, p in zip(g["names"], g["params"], strict=True)]
    Frugal(groups)


@given(st.sets(st.sampled_from(["embed", "attn", "mlp", "norm", r"layers\.0", "weight"]), min_size=1), st.booleans())
def test_groups_are_a_partition(patterns, swap):
    model = Tied()
    groups = split_groups(model, include=["."], exclude=patterns) if swap else split_groups(model, include=patterns)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert all(group["params"] for group in groups) and len({group["split"] for group in groups}) == len(groups)


def test_what_is_frozen_is_in_no_group_and_takes_no_turn():
    model = Tied()
    model.layers[0].attn.weight.requires_grad_(False)
    groups = split_groups(model, include=[r"\.(attn|mlp)\."])
    found = [name for group in groups for name in group["names"]]
    assert sorted(found) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    for group in groups:
        assert [model.get_parameter(name) is p for name, p in zip(group["names"], group["params"], strict=True)]


def test_a_tied_parameter_is_there_once_and_answers_to_all_its_names():
    model = Tied()
    assert "embed.weight" in names(split_groups(model, include=["lm_head"]), True)
    assert names(split_groups(model, include=["embed"], exclude=["lm_head"]), True) == []


def test_what_is_left_to_full_adamw_is_listed_with_the_reason():
    model = Tied()
    optimizer = Frugal(split_groups(model, include=[r"\.(attn|mlp)\."]))
    left = left_to_adamw(optimizer)
    assert set(left) == set(names(optimizer.param_groups, False))
    assert left["embed.weight"] == "not chosen by name" and left["layers.0.norm.bias"] == "1-D"
    share = 100 * sum(model.get_parameter(name).numel() for name in left) / sum(p.numel() for p in model.parameters())
    assert listing(optimizer) == (
        f"full AdamW for 7 of 13 tensors ({share:.0f}% of the parameters): not chosen by name: embed.weight; "
        "1-D: layers.0.attn.bias, layers.0.norm.weight, layers.0.norm.bias and 3 more"
    )
    plain = Frugal([nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2, 2))])
    assert left_to_adamw(plain) == {"1": "3-D"}
    assert listing(AdamW(model.parameters())) == listing(Frugal([nn.Parameter(torch.zeros(2, 2))], density=1.0)) == ""


def test_a_pattern_that_matches_nothing_is_an_error_with_near_names():
    with pytest.raises(ValueError, match=r"'attention' matches no parameter; near: .*attn"):
        split_groups(Tied(), include=["attention"])
    with pytest.raises(ValueError, match=r"'embde' matches no parameter; near: .*embed"):
        split_groups(Tied(), include=["mlp"], exclude=["embde"])


def test_a_plain_list_splits_every_matrix_and_nothing_else():
    params = [nn.Parameter(torch.randn(shape)) for shape in [(4, 4), (4,), (2, 2, 2)]]
    optimizer = Frugal(params, subspace="rows")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [sorted(optimizer.state[p]) for p in params] == [
        ["basis.index", "diagnostic.overlap", "diagnostic.residual", "exp_avg", "exp_avg_sq", "start", "step"],
        ["exp_avg", "exp_avg_sq", "step"],
        ["exp_avg", "exp_avg_sq", "step"],
    ]


shapes = st.tuples(st.integers(0, 12), st.integers(0, 12))
densities = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@given(st.sampled_from(sorted(COORDINATES)), shapes, densities, st.integers(0, 2**32))
def test_coordinate_subspaces_choose_the_declared_number_of_distinct_entries(name, shape, density, seed):
    subspace, matrix = COORDINATES[name](density), torch.arange(math.prod(shape)).view(shape).double()
    basis = subspace.refresh(matrix, "w", 0, keyed_generator(seed, "w", 0))
    small, spec = subspace.spec(shape)
    chosen = subspace.down(matrix, basis)
    assert tuple(chosen.shape) == small
    assert {key: (tuple(t.shape), t.dtype) for key, t in basis.items()} == spec
    assert len(set(chosen.flatten().tolist())) == chosen.numel(), "an entry is chosen twice"
    want = {
        "columns": shape[0] * int(density * shape[1]),
        "rows": int(density * shape[0]) * shape[1],
        "coordinates": int(density * math.prod(shape)),
    }
    assert chosen.numel() == want[name]
    copy = matrix.clone()
    subspace.put(copy, subspace.where(copy, basis), -chosen)
    assert torch.equal(copy, torch.where(torch.isin(matrix, chosen), -matrix, matrix)), "put writes what take reads"


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "density"), [((7, 9), 0.3), ((8, 8), 0.25)])  # strata of 3 and 4 entries, of 4
@pytest.mark.parametrize("name", sorted(COORDINATES))
def test_every_entry_is_equally_likely(name, shape, density):
    """Chosen about density * draws times; 5 standard deviations allow for all entries together."""
    size, draws = math.prod(shape), 2000
    subspace, matrix = COORDINATES[name](density), torch.arange(float(size)).view(shape)
    counts = torch.zeros(size)
    for count in range(draws):
        chosen = subspace.down(matrix, subspace.refresh(matrix, "w", count, keyed_generator(0, "w", count)))
        counts[chosen.flatten().long()] += 1
    share = chosen.numel() / size
    assert (counts - draws * share).abs().max() < 5 * math.sqrt(draws * share * (1 - share))


def test_the_hash_is_splitmix64():
    def finalise(x, word=2**64 - 1):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & word
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & word
        return (x ^ (x >> 31)) & 2**63 - 1

    x = [0, 1, 2, 2**40 + 5, 2**62 - 1, 2**63 - 1]
    assert hash63(torch.tensor(x)).tolist() == [finalise(i) for i in x]


def test_keys_are_a_function_of_seed_name_and_count():
    keys = [keyed_seed(seed, name, count) for seed in (0, 1) for name in ("a", "b", "0/a") for count in (0, 1, 10)]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**63 for key in keys)
    assert keyed_seed(0, "layers.0.attn.q.weight", 3) == 2396124851717748194, "stable across versions and machines"


def test_the_protocol_is_three_methods():
    class Own:
        def refresh(self, grad, name, count, generator): ...
        def down(self, grad, basis): ...
        def up(self, small, basis): ...

    assert isinstance(Own(), Subspace) and not isinstance(object(), Subspace)
