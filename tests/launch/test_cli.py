"""The command line: every way to say a thing, and one clear line for every mistake."""
# ruff: noqa: E501  (a message is one line, and so it is here)

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thriftlab.data.errors import ConfigError, DataError
from thriftlab.launch import cli
from thriftlab.launch.studies.compare import CompareConfig, make_comparison, make_request
from thriftlab.optim import LAYERS, METHODS
from thriftlab.optim.core.hyper import hyperparameters
from thriftlab.train.budget import SCHEDULES
from thriftlab.train.config import help as surface
from thriftlab.train.config.parse import load, read
from thriftlab.train.config.schema import SEAMS, RunConfig
from thriftlab.train.loop import Interrupted

FILES = {
    "signsgd.yaml": "optim:\n  name: signsgd\n  lr: 1e-2\ntrain: {clip: 2}\nbudget: {tokens: 5}\n",
    "adamw.yaml": "optim:\n  name: adamw\n  betas: [0.8, 0.9]\n",
    "dimm.yaml": "model: {dimm: 3}\n",
    "value.yaml": "optim: 5\n",
    "section.yaml": "train: {clip: {a: 3}}\n",
    "true.yaml": "train: {batch_size: true}\n",
    "broken.yaml": "optim:\n  lr: [1\ntrain: {}\n",
    "tab.yaml": "optim:\n\tlr: 1\n",
    "list.yaml": "- 1\n",
    "empty.yaml": "",
    "broken.toml": "[optim]\nlr=\n",
    "broken.json": '{"optim": }',
    "base.toml": 'out = "a"\n[train]\nbatch_size = 4\n[data.sources.web]\nweight = 2\n',
    "flat.json": '{"train.batch_size": 8, "seed": 3}',
    "latin.yaml": "out: \xe9\n",
    "run.ini": "",
}


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="latin-1")


def loaded(line: str) -> RunConfig:
    return load(RunConfig, line.split())


# ------------------------------------------------------------------------------------------------- ways to say a thing


@pytest.mark.parametrize(
    "line",
    ["train.clip=0.5 optim.lr=1e-05", "--train.clip=0.5 --optim.lr 1e-05", "--optim.lr=0.00001 --train.clip 0.5"],
)
def test_three_ways_to_write_a_key(line):
    assert loaded(line) == RunConfig(train={"clip": 0.5}, optim={"lr": 1e-5})


def test_python_text_as_wandb_agents_write_it():
    argv = ["--train.clip=None", "--train.compile=True", "--log.progress=False", "--optim.betas=[0.8, 0.99]"]
    expected = {"train": {"clip": None, "compile": True}, "log": {"progress": False}, "optim": {"betas": (0.8, 0.99)}}
    assert load(RunConfig, argv) == RunConfig(**expected)
    nested = ["--train={'clip': None, 'compile': True}", "--log", "{'progress': False}", "optim={'betas': (0.8, 0.99)}"]
    assert load(RunConfig, nested) == RunConfig(**expected)


@pytest.mark.parametrize("text", [r"['\battn']", r"['\\battn']", r'["\\battn"]', r"[\battn]"])
def test_a_regular_expression_typed_by_hand_or_printed_by_python(text):
    assert load(RunConfig, [f"optim.include={text}"]).optim.include == (r"\battn",)


@given(st.floats(min_value=1e-300, max_value=1e300), st.integers(0, 2**63 - 1))
def test_numbers_arrive_exactly(clip, seed):
    config = loaded(f"train.clip={clip} seed={seed}")
    assert (config.train.clip, config.seed) == (clip, seed)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--config base.toml --config flat.json", {"out": "a", "train": {"batch_size": 8}, "seed": 3}),
        ("--config flat.json --config base.toml", {"out": "a", "train": {"batch_size": 4}, "seed": 3}),
        ("train.batch_size=2 --config=base.toml out=b", {"out": "b", "train": {"batch_size": 2}}),
    ],
)
def test_later_wins(line, expected):
    assert loaded(line) == RunConfig(**expected, data={"sources": {"web": {"weight": 2}}})


def test_files_and_flags_meet_in_one_section():
    config = loaded("--config signsgd.yaml optim.lr=0.5 data.sources.web-2.weight=2 budget=seconds=1e2")
    assert (config.optim.name, config.optim.lr, config.train.clip) == ("signsgd", 0.5, 2)
    assert config.data.sources["web-2"].weight == 2
    assert (config.budget.tokens, config.budget.seconds) == (None, 100)
    assert loaded("--config empty.yaml") == RunConfig()
    assert loaded("--config base.toml data.sources.b.epochs=1").data.sources.keys() == {"web", "b"}
    assert loaded("--config base.toml data.sources={}").data.sources == {}


# -------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "optim.lrr=1": "command line: unknown key 'optim.lrr' with optim.name=adamw, which takes name, include, exclude, "
    "tables, row_floor, lr, betas, eps, weight_decay, state_dtype; did you mean 'optim.lr'?",
    "--config dimm.yaml": "dimm.yaml: unknown key 'model.dimm'; did you mean 'model.dim'?",
    "optm.lr=1": "command line: unknown key 'optm.lr'; did you mean 'optim.lr'?",
    "batch_size=3": "command line: unknown key 'batch_size'; did you mean 'train.batch_size' or 'eval.batch_size'?",
    "zzz=3": "command line: unknown key 'zzz'; --help lists all keys",
    "optim.lr=fast": "command line: optim.lr = 'fast' is not possible; it takes number >= 0",
    "--optim.lr -1": "command line: optim.lr = '-1' is not possible; it takes number >= 0",
    "train.clip=0": "command line: train.clip = '0' is not possible; it takes number > 0 or null",
    "optim.betas=[0.8,2]": "command line: optim.betas[1] = 2 is not possible; it takes [number >= 0 and < 1, number >= 0 "
    "and < 1]",
    "train.precision=fp16": "command line: train.precision = 'fp16' is not possible; it takes auto | fp32 | bf16",
    "train.compile=maybe": "command line: train.compile = 'maybe' is not possible; it takes true or false",
    "train.batch_size=2.5": "command line: train.batch_size = '2.5' is not possible; it takes integer >= 1",
    "--config true.yaml": "true.yaml: train.batch_size = 'true' is not possible; it takes integer >= 1",
    "schedule.name=cosin": "command line: schedule.name = 'cosin' is unknown; there are "
    f"{', '.join(SCHEDULES)}; did you mean 'cosine'?",
    "--config adamw.yaml optim.name=signsgd": "adamw.yaml: unknown key 'optim.betas' with optim.name=signsgd, which takes "
    "name, include, exclude, tables, row_floor, lr, weight_decay; it belongs to "
    + " or ".join(f"optim.name={name}" for name in METHODS if "betas" in hyperparameters(METHODS[name])),
    "model.heads=3": "command line: model: dim 128 is not an even multiple of heads 3",
    "--config signsgd.yaml budget.flops=1e9": "signsgd.yaml, command line: budget: takes one of tokens, flops, seconds, "
    "there is tokens=5 and flops=1e+09; budget=KIND=AMOUNT sets just one",
    "schedule.name=wsd schedule.warmup=0.9": "command line: schedule: warmup 0.9 and decay 0.2 overlap; lower one until "
    "their sum is at most 1",
    "--config value.yaml": "value.yaml: optim = 5 is not a section; set its keys, as in optim.name=VALUE",
    "--config value.yaml optim.lr=1": "value.yaml: optim = 5, but command line: optim.lr; use one of the two",
    "data.sources.web=2": "command line: data.sources.web = '2' is not a section; set its keys, as in "
    "data.sources.web.weight=VALUE",
    "--config section.yaml": "section.yaml: train.clip is not a section and has no 'a'; it takes number > 0 or null",
    "--config broken.yaml": "broken.yaml, line 3: expected ',' or ']', but got ':'",
    "--config tab.yaml": "tab.yaml, line 2: found character '\\t' that cannot start any token",
    "--config list.yaml": "list.yaml: keys and values are expected, not [1]",
    "--config broken.toml": "broken.toml: Invalid value (at line 2, column 4)",
    "--config broken.json": "broken.json: Expecting value: line 1 column 11 (char 10)",
    "--config none.yaml": "none.yaml: No such file or directory",
    "--config run.ini": "run.ini: a configuration file ends in .yaml, .yml, .json, .toml",
    "--config latin.yaml": "latin.yaml: 'utf-8' codec can't decode byte 0xe9 in position 5: invalid continuation byte",
    "--plugin none.py": "command line: plugins[0] = 'none.py': No such file or directory",
    "optim.betas=[0.8": "command line: optim.betas = '[0.8' is not a list; brackets do not close or fit",
    "--out --seed=1": "command line: --out has no value; write --out VALUE",
    "verbose": "command line: 'verbose' has no value; write verbose=VALUE",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_that_says_who_what_and_how(line, capsys):
    assert cli.main(["train", *line.split()]) == 2
    assert capsys.readouterr().err == f"error: {MISTAKES[line]}\n"


KEYS = [
    *(key.partition(" ")[0] for key in surface.all_keys(RunConfig) if key != "plugins"),
    "optim",
    "data",
    "x",
    "",
    ".",
]
VALUES = [
    "1",
    "-1",
    "1e9",
    "1e999",
    "1e999999999",
    "nan",
    "None",
    "True",
    "x",
    "",
    "[]",
    "{}",
    "[1, 2]",
    "{'a': 1}",
    "(1,)",
]
VALUES += [
    "{'name': [1]}",
    "{'name': {}}",
    "[[[[",
    "{1: 2}",
    "frugal",
    "\x00",
    "2024-01-01",
    "[2024-01-01]",
    "!!python/object:x",
]


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES) | st.text())), st.booleans())
def test_nothing_but_a_message_ever_comes_of_bad_arguments(pairs, dashes):
    try:
        load(RunConfig, [f"{'--' * dashes}{key}={value}" for key, value in pairs])
    except ConfigError as error:
        assert all("command line: " in line for line in str(error).split("\n"))


def test_a_missing_value_is_named(capsys):
    assert cli.main(["prepare", "inputs.web.licence=mit"]) == 2
    assert capsys.readouterr().err == "error: command line: inputs.web.path is missing; it takes text\n"


def test_every_mistake_is_named(capsys):
    assert cli.main(["train", "sed=1", "train.clip=x", "--config", "dimm.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


@pytest.mark.parametrize(
    "error, code, shown",
    [
        (
            DataError("train-00000.bin is short; run thriftlab prepare"),
            2,
            "error: train-00000.bin is short; run thriftlab prepare\n",
        ),
        (
            Interrupted("runs/x", 3, 15),
            143,
            "stopped after step 3 and saved in runs/x; the same command resumes\n",
        ),
    ],
)
def test_messages_of_the_project_end_without_a_traceback(monkeypatch, capsys, error, code, shown):
    def fails(argv):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(fails, ""))
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("make", [os.listdir, lambda place: open(f"{place}/x"), lambda place: open(Path(place).parent)])
def test_a_path_that_cannot_be_is_one_line(monkeypatch, capsys, tmp_path, make):
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(lambda argv: make(f"{tmp_path}/file"), ""))
    assert cli.main(["train"]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path) in said and "stands where a f" in said and said.count("\n") == 1


def test_a_defect_keeps_its_trace(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(lambda argv: int("x"), ""))
    with pytest.raises(ValueError):
        cli.main(["train"])


@pytest.mark.parametrize(
    "command", [["trian"], ["report"], ["report", "a", "b"], ["report", "nowhere"], ["prepare", "x=1"]]
)
def test_wrong_commands(command, capsys):
    assert cli.main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_program_itself():
    """`python -m thriftlab.launch`: exit codes, no traceback, and no torch for `--help`."""
    run = lambda *words: subprocess.run(  # noqa: E731
        [sys.executable, *words], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    wrong = run("-m", "thriftlab.launch", "train", "sed=1")
    assert (wrong.returncode, wrong.stderr) == (2, "error: command line: unknown key 'sed'; did you mean 'seed'?\n")
    quick = run(
        "-c", "import sys; from thriftlab.launch.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    )
    assert quick.returncode == 0 and "thriftlab compare METHOD" in quick.stdout


# ------------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_readable_in_100_columns(command, capsys):
    assert cli.main([command, "--help"]) == 0
    long = [line for line in capsys.readouterr().out.splitlines() if len(line) > 100]
    assert not [line for line in long if " " in line.strip()]  # a key with its default is not broken


def test_help_of_train_is_complete(capsys):
    cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    part = None
    for key in surface.all_keys(RunConfig):
        key, _, choice = key.partition(" (")
        part = shown.split(f"  {choice.rstrip(')')}:")[1] if choice else shown
        assert f"  {key}=" in part, key
    compact = " ".join(shown.split())
    for key, field in surface.keys(RunConfig, {}):
        assert f"({surface.words(field)})" in compact or key.endswith(".name"), key
        assert (field.description or "").rstrip(".") in compact


def test_help_shows_what_a_plugin_brings(tmp_path, capsys):
    from thriftlab.train.budget import SCHEDULES

    (tmp_path / "mine.py").write_text(
        "from thriftlab.train.budget import schedule\n@schedule\ndef flat(p): return 1.0\n"
    )
    try:
        assert cli.main(["train", "--help", "--plugin", "mine.py"]) == 0
        assert "schedule.name=flat" in capsys.readouterr().out
    finally:
        SCHEDULES.pop("flat", None)


# --------------------------------------------------------------------------------------------------------- compare


def test_compare_takes_methods_options_and_a_base():
    line = "adamw frugal --seeds 5 --lr-grid 3e-4,1e-3 --jobs=2 --out runs/x --budget tokens=1e6 model.preset=micro"
    asked = make_comparison(read(line.split()))
    defaults = {section: registry.default for section, registry in SEAMS.items()}
    assert asked.methods == {m: {**defaults, "optim": m} for m in ("adamw", "frugal")}
    assert asked.options == CompareConfig(seeds=5, lr_grid=(3e-4, 1e-3), jobs=2, out="runs/x")
    assert asked.base == RunConfig(budget={"tokens": 10**6}, model={"preset": "micro"})
    assert asked.overrides == {m: {section: {} for section in SEAMS} for m in ("adamw", "frugal")}


def test_compare_gives_every_method_what_is_meant_for_it():
    words = "frugal adamw optim.lr=0.5 frugal.gap=50 frugal.lr=0.25 optim.include=[x]".split()
    asked = make_comparison(read(words))
    assert {method: found["optim"] for method, found in asked.overrides.items()} == {
        "frugal": {"include": ["x"], "lr": 0.25, "gap": 50},
        "adamw": {"include": ["x"], "lr": 0.5},
    }
    named = make_comparison(read("adamw signsgd --config adamw.yaml".split()))
    assert [named.overrides[m]["optim"] for m in ("adamw", "signsgd")] == [{"betas": [0.8, 0.9]}, {}]


def test_a_layer_and_an_update_rule_combine():
    words = "adamw lost lost+fira cola layer.rank=0.5 lost.density=0.1 lost+fira.layer.rank=8 lost+fira.optim.rank=4"
    arms = {arm.name: arm.tree for arm in make_request(read(words.split())).arms}
    assert [(tree["layer"]["name"], tree["optim"]["name"]) for tree in arms.values()] == [
        ("dense", "adamw"), ("lost", "adamw"), ("lost", "fira"), ("cola", "adamw")
    ]  # fmt: skip
    assert arms["adamw"]["layer"] == {"name": "dense"}
    assert arms["lost"]["layer"] == {"name": "lost", "rank": 0.5, "density": 0.1}
    assert arms["lost+fira"]["layer"]["rank"] == 8 and arms["lost+fira"]["optim"]["rank"] == 4
    assert arms["cola"]["layer"]["rank"] == 0.5


COMPARE_MISTAKES = {
    "": "command line: name the methods to compare, the baseline first: "
    + "; ".join(f"{section}: {', '.join(registry.entries)}" for section, registry in SEAMS.items()),
    "adamww": "command line: method 'adamww' is unknown; there are "
    + ", ".join(name for registry in SEAMS.values() for name in registry.entries)
    + "; did you mean 'adamw'?",
    "lost lost+adamw": "command line: lost and lost+adamw are the same method; name it once",
    "adamw lost lost.include=[x]": "command line: lost.include may be of two parts; write lost.layer.include or "
    "lost.optim.include",
    "lost+fira lost+fira.layer.rnk=3": "command line: unknown key 'lost+fira.layer.rnk' with lost, which takes name, "
    f"include, exclude, {', '.join(hyperparameters(LAYERS['lost']))}; did you mean 'rank'?",
    "adamw frugal signal.r=1": "command line: signal.r is for a signal, which is not compared; compared: adamw, frugal",
    "adamw lost+cola": "command line: lost+cola names two of layer: lost and cola",
    "adamw lost+fira lost+fira.rank=3": "command line: lost+fira.rank may be of two parts; write lost+fira.layer.rank "
    "or lost+fira.optim.rank",
    "adamw layer.rank=3": "command line: layer.rank is for a layer, which is not compared; compared: adamw",
    "adamw lost lost.gama=1": "command line: unknown key 'lost.gama'; did you mean 'lost.gamma'?",
    "adamw adamw": "command line: a method is named twice: adamw adamw",
    "adamw signsgd.lr=1": "command line: signsgd.lr is for a method that is not compared; compared: adamw",
    "adamw --config signsgd.yaml": "signsgd.yaml: optim.name is for 'signsgd', which is not compared; compared: adamw",
    "adamw frugal frugal.gapp=3": "command line: unknown key 'frugal.gapp'; did you mean 'frugal.gap'?",
    "adamw frugal frugal.gap=0": "command line: frugal.gap = '0' is not possible; it takes integer >= 1",
    "signsgd adamw optim.betas=[0,0]": "command line: unknown key 'optim.betas' with signsgd, which takes name, include, "
    "exclude, tables, row_floor, lr, weight_decay; METHOD.betas is for one method",
    "adamw --lr-grid 1e-3,x": "command line: lr_grid[1] = 'x' is not possible; it takes list of number > 0 or null",
    "adamw --seeds 0": "command line: seeds = '0' is not possible; it takes integer >= 1",
    "adamw --budget tokens=x": "command line: budget.tokens = 'x' is not possible; it takes integer >= 1 or null",
    "adamw --budget 5": "command line: budget = '5' is not a section; set its keys, as in budget.tokens=VALUE",
    "adamw --sedes 3": "command line: unknown key 'sedes'; did you mean 'seed'?",
}


@pytest.mark.parametrize("line", COMPARE_MISTAKES)
def test_mistakes_in_a_comparison(line, capsys):
    assert cli.main(["compare", *line.split()]) == 2
    assert capsys.readouterr().err == f"error: {COMPARE_MISTAKES[line]}\n"


@pytest.mark.slow
def test_a_warning_for_the_user_is_one_line(tmp_path, tiny_data):
    """And names no place in the code; in a process of its own, for pytest has ways of its own with warnings."""
    words = f"train data.path={tiny_data} data.sequence_length=32 model.dim=32 model.layers=1 model.heads=2 train.batch_size=8"
    words += f" budget.tokens=2560 log.every=1 signal.name=extremes signal.r=0.02 train.threads=1 out={tmp_path}/out"
    command = [sys.executable, "-m", "thriftlab.launch", *words.split()]
    heard = subprocess.run(command, capture_output=True, text=True, check=True).stderr.replace("\r", "\n").splitlines()
    warned = [line for line in heard if "effective batch" in line]
    assert len(warned) == 1 and warned[0].lstrip().startswith("warning: step ")
    assert not [line for line in heard if ".py:" in line]
