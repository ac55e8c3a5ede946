"""What an earlier thriftlab wrote is still read: the files in tests/formats are never written again, only copied.

`prepared` has two sources of made-up text. Runs have the settings of their config.json: `done` and `stopped` are one
run, ended and saved after step 4 of 8; `sharded` was saved there by two ranks under DeepSpeed, `owned` by two under
Owned; `compare` is a study. An entry of optimizers.pt is {name, hyper, weights, state, after}: `after` is what one more
step made of the weights.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from thriftlab.data.shards import open_dataset
from thriftlab.launch import cli
from thriftlab.optim import METHODS
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.loop import run
from thriftlab.train.records.record import read_metrics, read_record

FORMATS = Path(__file__).resolve().parent / "formats"
OPTIMIZERS = torch.load(FORMATS / "optimizers.pt", weights_only=True)
SHAPES = {"layers.0.a": (12, 8), "layers.1.b": (8, 12), "c": (12,)}
COMPARE = [
    *("compare", "adamw", "frugal+linupper", "--config", "run.yaml", "--budget", "tokens=512", "--seeds", "2"),
    *("--lr-grid", "1e-3,3e-3", "--jobs", "2", "out=runs/compare"),
]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    shutil.copytree(FORMATS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(name, **changes):
    """Of a run that lies there, to go on in one process."""
    stored = json.loads(Path("runs", name, "config.json").read_text())
    return RunConfig.model_validate({**stored, "backend": {"name": "auto"}, **changes})


def test_a_prepared_data_set_is_opened_and_verified():
    for kept in (True, False):
        if not kept:
            Path("prepared/.verified.json").unlink()
        dataset = open_dataset("prepared", verify=True)
        assert dataset.manifest["sources"].keys() == {"plain", "noisy"}


def test_a_finished_run_is_answered_from_its_record(monkeypatch):
    before = {path: path.read_bytes() for path in Path("runs/done").rglob("*") if path.is_file()}
    monkeypatch.setattr("thriftlab.train.loop.one_step", None)
    assert run(settings("done"))["results"] == read_record(Path("runs/done/record.json"))["results"]
    assert {path: path.read_bytes() for path in Path("runs/done").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name, loss", [("stopped", None), ("sharded", 5.4925), ("owned", 4.6406)])
def test_a_stopped_run_goes_on(name, loss):
    loss = loss or read_record(Path("runs/done/record.json"))["results"]["loss"]
    metrics = Path("runs", name, "metrics.jsonl")
    before = metrics.read_text()
    whole, resumed = run(settings(name, out="runs/whole")), run(settings(name))
    assert resumed["results"]["loss"] == pytest.approx(whole["results"]["loss"], abs=1e-4)
    assert resumed["results"]["loss"] == pytest.approx(loss, abs=1e-4)
    assert metrics.read_text().startswith(before)
    assert [line["step"] for line in read_metrics(metrics) if "loss" in line] == list(range(1, 9))


def records():
    return {path: path.read_bytes() for path in sorted(Path("runs/compare").rglob("record.json"))}


def test_a_study_is_reported_again():
    written = {name: Path("runs/compare", name).read_text() for name in ("report.md", "report.html")}
    for name in written:
        Path("runs/compare", name).unlink()
    assert cli.main(["report", "runs/compare"]) == 0
    assert Path("runs/compare/report.md").read_text() == written["report.md"]
    assert text_of(Path("runs/compare/report.html").read_text()) == text_of(written["report.html"])


def text_of(page):
    """What is read of a page; how figures are drawn is matplotlib's."""
    return re.sub(r"<[^>]+>", "", re.sub(r"<(svg|style)\b.*?</\1>", "", page, flags=re.DOTALL))


@pytest.mark.slow
def test_a_study_goes_on():
    before, lost = records(), Path("runs/compare/frugal+linupper/seed-1")
    assert len(before) == 8
    assert cli.main(COMPARE) == 0
    assert records() == before
    loss = read_record(lost / "record.json")["results"]["loss"]
    shutil.rmtree(lost)
    assert cli.main(COMPARE) == 0
    after = records()
    assert {path for path in before if before[path] != after[path]} == {lost / "record.json"}
    assert read_record(lost / "record.json")["results"]["loss"] == pytest.approx(loss, abs=1e-4)


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES.values()]


@pytest.mark.parametrize(
    "entry", OPTIMIZERS, ids=lambda entry: " ".join(map(str, [entry["name"], *entry["hyper"].values()]))
)
def test_an_optimizer_goes_on_from_its_state(entry):
    params = [torch.nn.Parameter(weight) for weight in entry["weights"]]
    optimizer = METHODS[entry["name"]]([{"params": params, "names": list(SHAPES)}], lr=0.01, **entry["hyper"])
    optimizer.load_state_dict(entry["state"])
    for p, grad in zip(params, draw(4), strict=True):
        p.grad = grad
    optimizer.step()
    for p, after in zip(params, entry["after"], strict=True):
        torch.testing.assert_close(p.detach(), after, rtol=1e-6, atol=1e-7)
