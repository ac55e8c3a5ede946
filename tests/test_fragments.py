"""Entry-wise methods on pieces of tensors: weights and state are bitwise those of the whole, wherever it is cut."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftlab.optim.subspace import Columns, Coordinates, Rows

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
