"""What differs between the run in a folder and the one that is asked for, in words."""

import json

from thriftlab.train.config import RunConfig
from thriftlab.train.config.differences import differences, what_changed

SMALL = {"budget": {"tokens": 1000}}


def said(past, now):
    return differences(RunConfig(**past).model_dump(mode="json"), RunConfig(**now))


def test_the_keys_that_count_are_named_with_both_values():
    assert said({"optim": {"lr": 1e-3}}, {"optim": {"lr": 2e-3}}) == "optim.lr: 0.001 there, 0.002 now"
    assert said({"optim": {"name": "frugal", "gap": 5}}, {}).startswith("optim.name: frugal there, adamw now, ")
    assert "model.dim: 128 there, 256 now" in said({}, {"model": {"preset": "micro"}})
    assert said({"budget": {"tokens": 9}}, {"budget": {"seconds": 9}}).startswith("budget.tokens: 9 there, None now")


def test_many_keys_are_counted():
    found = said(
        {}, {"train": {"batch_size": 1, "clip": 2}, "seed": 1, "eval": {"every": 3}, "data": {"sequence_length": 4}}
    )
    assert found.count(" there, ") == 4 and found.endswith(", and 1 more")


def test_what_does_not_count_is_not_named():
    """Not names and places, nor the speed where the budget is not a time; then only contents can be others."""
    other = {"out": "x", "log": {"every": 3}, "train": {"compile": True}, "backend": {"device": "cpu"}}
    assert said({}, {**other, "data": {"path": "y"}}) == "other data, in data.path = y: no key differs"
    assert "train.compile: False there, True now" in said(
        {"budget": {"seconds": 9}}, {**other, "budget": {"seconds": 9}}
    )
    now = {"signal": {"name": "rho1", "reference": "r"}}
    assert said(now, now).endswith("prepared/embedded or signal.reference = r: no key differs")


def test_a_folder_says_what_it_was(tmp_path):
    assert "config.json, which would say what differs, is missing or damaged" in what_changed(tmp_path, RunConfig())
    (tmp_path / "config.json").write_text(RunConfig(seed=3).model_dump_json())
    assert what_changed(tmp_path, RunConfig()) == "seed: 3 there, 0 now"
    past = {**RunConfig(seed=3).model_dump(mode="json"), "no_longer": 1}  # of an older version
    (tmp_path / "config.json").write_text(json.dumps(past))
    assert "seed: 3 there, 0 now" in what_changed(tmp_path, RunConfig())
