"""What all tests share. Set before anything imports them: no network, no accounts, one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what the tests compare is computed on the CPU

import hypothesis  # noqa: E402
import pytest  # noqa: E402

os.fsync = lambda descriptor: None  # nothing here outlives the machine, and a busy disk makes every run wait

pytest.register_assert_rewrite("tests.tools")
hypothesis.settings.register_profile("no clock", deadline=None)  # a busy machine takes longer, and nothing is wrong
hypothesis.settings.load_profile("no clock")

from tests.fake_cuda import fake_cuda  # noqa: E402, F401
from tests.tools.tiny import prepare_tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A small prepared data set: read it, do not touch it."""
    return prepare_tiny(tmp_path_factory.mktemp("data") / "tiny")


# The longest first: where several processes share the files, none is left with one of these at the end.
LONGEST = (
    "launch/test_slurm", "train/test_signals_run", "train/test_zero", "train/test_fsdp2", "data/test_engine",
    "launch/test_hosts", "launch/test_study", "train/test_layers_run", "train/test_owned", "train/test_witness",
    "data/test_any_size", "train/test_failures", "train/test_tracking", "data/test_prepare", "data/test_on_ray",
    "train/test_resume", "optim/test_launches", "train/test_step_on_gpu", "launch/test_compare_all",
    "data/test_lost_node", "data/test_places", "optim/test_fsdp", "train/test_torchrun", "launch/test_broken_pipe",
    "optim/test_plain_step", "optim/test_relora", "optim/test_distributed_checkpoint", "launch/test_papers",
    "test_packaging", "test_layout",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Fast tests first; with `-n`, which hands out whole files, long files first. What the fake GPU runs is slow."""
    for item in items:
        if "fake_cuda" in item.fixturenames:
            item.add_marker("slow")
    if hasattr(config, "workerinput"):
        rank = {f"tests/{name}.py": i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
    else:
        items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
