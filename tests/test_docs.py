"""What the README and docs promise: their commands parse, their code runs."""

import re
import shlex
from pathlib import Path

import pytest

from tests.tools.tiny import tiny_config
from thriftlab.data.prepare.pipeline import PrepareConfig
from thriftlab.launch.cluster import array, hosts, slurm
from thriftlab.launch.studies import compare, written
from thriftlab.optim import METHODS
from thriftlab.train.config import parse as settings
from thriftlab.train.config.schema import RunConfig
from thriftlab.train.loop import run
from thriftlab.train.records.record import read_metrics
from thriftlab.train.signals import SIGNALS
from thriftlab.train.write_reference import ReferenceConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [shlex.split(line) for line in re.findall(r"`((?:thriftlab|torchrun) [^`]+)`", README)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_of_the_readme_are_understood(words, tmp_path, monkeypatch):
    if words[0] == "torchrun":
        assert words[3:5] == ["-m", "thriftlab.launch"]
        words = words[4:]
    command, argv = words[1], words[2:]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("train: {batch_size: 32}\n")
    (tmp_path / "mine.yaml").write_text("question: Which?\nbase: {}\narms: {adamw: {}}\n")
    (tmp_path / "texts").mkdir()
    if "--help" in argv:
        return
    if command == "train":
        settings.load(RunConfig, argv)
    elif command == "prepare":
        settings.load(PrepareConfig, argv)
    elif command == "compare":
        compare.make_request(settings.read(argv))
    elif command == "submit":
        _, rest = slurm.read_options(argv)
        kind, rest.words = rest.words[:1], rest.words[1:]
        array.REQUESTS[kind[0]](rest) if kind else settings.build(RunConfig, rest)
    elif command == "launch":
        settings.build(hosts.LaunchConfig, settings.read(argv).drop(RunConfig.model_fields))
    elif command == "reference":
        settings.load(ReferenceConfig, argv)
    elif command == "study":
        assert written.make_request(settings.read(argv)) if argv else written.listing()
    else:
        assert command == "report" and len(argv) in (1, 2)


def test_the_settings_of_make_run_are_understood():
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if " compare " in line)
    words = shlex.split(line.replace("launch/", f"{ROOT}/launch/"))[2:]
    asked = compare.make_comparison(settings.read(words))
    assert asked.options.seeds == 3 and len(asked.methods) == 3


def test_the_method_of_the_docs_trains_as_a_plugin(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "signum", None)  # so that it is taken out again afterwards
    del METHODS["signum"]
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-method.md").read_text(), re.DOTALL)[1]
    (tmp_path / "signum.py").write_text(code)
    config = tiny_config(tiny_data, tmp_path / "out", plugins=(str(tmp_path / "signum.py"),), optim={"name": "signum"})
    memory = run(config)["memory"]
    assert memory["state_bytes"] == memory["predicted_state_bytes"] == memory["parameter_bytes"]


def test_the_signal_of_the_docs_trains_as_a_plugin(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(SIGNALS, "harder", None)  # so that it is taken out again afterwards
    del SIGNALS["harder"]
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-signal.md").read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "harder.py").write_text(code)
    given = {"plugins": (str(tmp_path / "harder.py"),), "signal": {"name": "harder"}, "log": {"every": 1}}
    entry = run(tiny_config(tiny_data, tmp_path / "out", **given))
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    ess = [line["signal"]["ess"] for line in lines if "signal" in line]
    assert ess == [pytest.approx(5 / 8)] * 8  # the lower median and what is above it
    assert entry["method"] == "harder"
