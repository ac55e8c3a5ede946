"""The bytes that a launch moves, beside the formula: what must be read and written if each byte is moved once.

`distinct` bytes are within a tenth of it, and what instructions ask for within 15 %: so nothing is read twice, and what
lies side by side is asked for together. The table of docs/kernels.md is `python -m tests.measure.kernel_bytes`'s.
"""

import pytest

from tests.tools.kernel_bytes import CASES


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_formula(name):
    case = CASES[name]
    moved, entries = case.run()
    assert case.formula * entries <= moved.distinct <= 1.1 * case.formula * entries
    assert moved.asked <= case.asked * case.formula * entries
