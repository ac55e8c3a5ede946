"""What all tests share. Set before anything imports them: no network, no accounts, one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what the tests compare is computed on the CPU

import pytest  # noqa: E402

pytest.register_assert_rewrite("tests.tools")

from tests.fake_cuda import fake_cuda  # noqa: E402, F401
from tests.tools.tiny import prepare_tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A small prepared data set: read it, do not touch it."""
    return prepare_tiny(tmp_path_factory.mktemp("data") / "tiny")


def pytest_collection_modifyitems(items):
    """Fast tests first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
