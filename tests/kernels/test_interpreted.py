"""The kernels in triton's interpreter, one process for each file of tests: tests/tools/interpreted.py says why."""

import pytest

from tests.tools.interpreted import FILES, run_interpreted


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file):
    passed, said = run_interpreted(file)
    assert passed, said
