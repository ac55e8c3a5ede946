"""`thriftlab compare` takes every method there is, down to the report."""

import pytest

from tests.tools import gang
from thriftlab.launch import cli
from thriftlab.launch.studies import jobs
from thriftlab.optim import METHODS

pytestmark = pytest.mark.slow


def test_every_method_in_one_study(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs.subprocess, "Popen", gang.Forked)
    methods = [name for name, cls in METHODS.items() if cls.__module__.startswith("thriftlab.optim.")]
    settings = {
        "model.preset": "null", "model.dim": 16, "model.layers": 2, "model.heads": 2, "model.hidden": 24,
        "data.path": tiny_data, "data.sequence_length": 16, "train.batch_size": 4, "eval.tokens": 200, "fira.rank": 128,
        "galore.rank": 4,
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in settings.items()]
    out = tmp_path / "study"
    code = cli.main(["compare", *methods, *words, "--budget", "tokens=128", "--seeds", "1", "--out", str(out)])
    said = capsys.readouterr().out
    assert code == 0 and (out / "report.html").exists()
    for method in methods:
        assert (out / method / "seed-0" / "record.json").exists() and f"\n{method} " in said
    assert "No matrix is split, this is full AdamW alone (rank 128 >= smaller side 16)." in said
    assert "and none is trained" in said  # badam: a quarter of two layers
