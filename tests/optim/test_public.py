"""What `thriftlab.optim` promises: its names, and a line for those who look for them where they once were."""

import importlib

import pytest

from thriftlab import optim


def test_every_method_and_layer_is_a_public_name():
    registered = [*optim.METHODS.values(), *optim.LAYERS.values()]
    classes = {cls.__name__ for cls in registered if cls.__module__.startswith("thriftlab.optim.")}
    assert classes <= set(optim.__all__)
    assert all(hasattr(optim, name) for name in optim.__all__)


@pytest.mark.parametrize("module", ["base", "hyper", "split", "subspace", "lost", "core.no_such"])
def test_a_module_that_has_moved_is_one_line_that_says_where_its_names_are(module):
    with pytest.raises(ModuleNotFoundError, match=f"no module thriftlab.optim.{module}; .*from thriftlab.optim import"):
        importlib.import_module(f"thriftlab.optim.{module}")
    with pytest.raises(ImportError, match="cannot import name 'no_such'"):
        exec("from thriftlab.optim import no_such")
