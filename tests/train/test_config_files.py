"""Configuration files: a key that is given twice, marks of the byte order, paths as a shell would have them."""

import json
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from thriftlab.data.errors import ConfigError, UserError
from thriftlab.data.files import make_folder
from thriftlab.data.paths import expanded
from thriftlab.data.prepare.request import PrepareConfig
from thriftlab.launch.bench import OptimBench
from thriftlab.launch.cluster.hosts import LaunchConfig
from thriftlab.launch.studies.compare import CompareConfig
from thriftlab.launch.studies.written import StudyOptions
from thriftlab.train.config import RunConfig, load
from thriftlab.train.config.files import read_file
from thriftlab.train.write_reference import ReferenceConfig

TWICE = {
    "top.yaml": ("seed: 1\nout: a\nseed: 1\n", 3, "seed", 1),
    "nested.yml": ("optim:\n  lr: 1\n  name: adamw\n  lr: 2\n", 4, "optim.lr", 2),
    "flow.yaml": ("optim: {lr: 1,\n lr: 2}\n", 2, "optim.lr", 1),
    "quoted.yaml": ("optim:\n  lr: 1\n  'lr': 2\n", 3, "optim.lr", 2),
    "number.yaml": ("sources:\n  1: a\n  '1': b\n", 3, "sources.1", 2),
    "listed.yaml": ("contrasts:\n- {name: a,\n   name: b}\n", 3, "contrasts.0.name", 2),
    "dotted.yaml": ("optim.lr: 1\noptim:\n  lr: 2\n", 3, "optim.lr", 1),
    "merged.yaml": ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n", 4, "b.<<", 3),
    "arms.yaml": ("arms:\n  a: {}\n  b: {}\n  a: {seeds: 2}\n", 4, "arms.a", 2),
    "top.json": ('{"seed": 1,\n"seed": 2}', 2, "seed", 1),
    "nested.json": ('{"x": [1, {"lr": 0}],\n"optim": {"lr": 1, "a": ":{\\"", \n"l\\u0072": 2}}', 3, "optim.lr", 2),
    "dotted.json": ('{"optim": {"lr": 1},\n"optim.lr": 2}', 2, "optim.lr", 1),
    "top.toml": ("seed = 1\nseed = 2\n", 2, "seed", 1),
    "nested.toml": ("[optim]\nlr = 1\n\nlr = 2", 4, "optim.lr", 2),
    "section.toml": ("[optim]\nlr = 1\n[model]\n[optim]\ngap = 2\n", 4, "optim", 1),
    "quoted.toml": ('[data.sources]\n"a" = {weight = 1}\na = {weight = 2}\n', 3, "data.sources.a", 2),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_is_given_twice_is_refused_with_its_place(tmp_path, name):
    text, line, key, first = TWICE[name]
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_file(str(file))
    assert str(caught.value) == f"{file}, line {line}: {key} is given twice, first in line {first}; keep one of them"


@pytest.mark.parametrize("text", ["optim={lr: 1, lr: 2}", "optim={'lr': 1, 'lr': 2}", '--optim={"lr": 1, "lr": 1}'])
def test_a_key_given_twice_in_one_value_of_the_command_line(text):
    with pytest.raises(ConfigError, match="^command line.*lr is given twice"):
        load(RunConfig, [text])


def test_what_may_be_said_twice(tmp_path):
    """A merge may be overridden, lists hold equal keys, and on the command line the later value wins."""
    (tmp_path / "a.yaml").write_text("base: &b {lr: 1, gap: 2}\noptim:\n  <<: *b\n  lr: 3\nlist: [{a: 1}, {a: 2}]\n")
    assert read_file(str(tmp_path / "a.yaml"))["optim"] == {"lr": 3, "gap": 2}
    (tmp_path / "a.toml").write_text("[[arms]]\nname = 1\n[[arms]]\nname = 2\n")
    assert len(read_file(str(tmp_path / "a.toml"))["arms"]) == 2
    assert load(RunConfig, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name, text", [("a.toml", "seed = 3"), ("a.YAML", "seed: 3"), ("a.json", '{"seed": 3}')])
def test_marks_of_the_byte_order(tmp_path, encoding, name, text):
    (tmp_path / name).write_text(text, encoding=encoding)
    assert load(RunConfig, ["--config", str(tmp_path / name)]).seed == 3


def test_a_name_that_is_not_utf8():
    with pytest.raises(ConfigError, match=r"command line: out = 'run.udce9' is not UTF-8; choose another name"):
        load(RunConfig, ["out=run\udce9"])


# ---------------------------------------------------------------------------------------------------------- paths


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "there")
    monkeypatch.delenv("NOWHERE", raising=False)
    return str(tmp_path)


FIELDS = [
    (RunConfig, "out"), (RunConfig, "data.path"), (PrepareConfig, "out"), (PrepareConfig, "downloads"),
    (PrepareConfig, "inputs.a.path"), (PrepareConfig, "inputs.a.path=hf:"), (ReferenceConfig, "run"),
    (ReferenceConfig, "out"), (ReferenceConfig, "data"), (CompareConfig, "out"), (StudyOptions, "out"),
    (LaunchConfig, "hostfile"), (OptimBench, "out"),
]  # fmt: skip


@pytest.mark.parametrize("model, key", FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_paths_are_expanded_in_every_field(home, model, key):
    needed = ["run=r"] if model is ReferenceConfig and key != "run" else []
    key, _, prefix = key.partition("=")
    found = load(model, [f"{key}={prefix}~/$PLACE/x", *needed])
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert str(found) == f"{prefix}{home}/there/x"
    for wrong in ("~no.such.user/x", "${NOWHERE}/x", "${NOWHERE:-/tmp}/x", "$(pwd)/x", "`pwd`/x", ""):
        with pytest.raises(ConfigError, match=key):
            load(model, [f"{key}={prefix}{wrong}", *needed])


def test_paths_of_plugins_signals_tokenizers_and_files_are_expanded(home):
    Path(home, "p.py").write_text("")
    assert load(RunConfig, ["--plugin", "~/p.py"]).plugins == (f"{home}/p.py",)
    assert load(RunConfig, ["signal.name=rho1", "signal.reference=~/r"]).signal.reference == f"{home}/r"
    assert load(PrepareConfig, ["tokenizer=~/t.json"]).tokenizer == f"{home}/t.json"
    Path(home, "run.yaml").write_text("out: ~/runs/x")
    assert load(RunConfig, ["--config=~/run.yaml"]).out == f"{home}/runs/x"


def test_paths_without_anything_to_expand_stay():
    for path in ("runs/a b", "./~x", "a~b", "50$", "$", "a/~/b"):
        assert expanded(path) == path


def test_a_folder_with_a_dollar_in_its_name_stays_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("lab", "elsewhere")
    out = f"{tmp_path}/100% $lab/runs"
    assert expanded(out) == f"{tmp_path}/100% elsewhere/runs"
    (tmp_path / "100% $lab").mkdir()
    assert expanded(out) == expanded(expanded(out)) == out


def test_a_folder_that_cannot_be_written_in():
    with pytest.raises(UserError, match="/proc/x cannot be written .*choose another folder"):
        make_folder(Path("/proc/x"))
    with pytest.raises(UserError, match="/proc/self"):
        make_folder(Path("/proc/self"))


# ----------------------------------------------------------------------------------------------------------- fuzz

KEYS = st.text(string.ascii_lowercase + ".-_ :#'\"", max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@given(st.dictionaries(KEYS.filter(lambda key: "." not in key), VALUES, max_size=4))
@QUICK
def test_what_was_written_is_read(tmp_path, tree):
    (tmp_path / "a.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert read_file(str(tmp_path / "a.json")) == tree
    assert read_file(str(tmp_path / "a.yaml")) == tree


@given(st.sampled_from([".yaml", ".json", ".toml"]), st.binary(max_size=40) | st.text(string.printable).map(str.encode))
@example(".yaml", b"a: &x {b: *x}")
@example(".yaml", b"a: !!int ''")
@example(".yaml", b"a: 2001-99-99")
@example(".json", b"[" * 100_000)
@QUICK
def test_any_file_is_read_or_refused_in_one_line(tmp_path, suffix, content):
    (tmp_path / f"a{suffix}").write_bytes(content)
    try:
        load(RunConfig, ["--config", str(tmp_path / f"a{suffix}"), "plugins=[]"])
    except ConfigError as error:
        assert all(line.strip() for line in str(error).splitlines())


@given(st.lists(st.text(string.ascii_lowercase + "=.-[]{}(),:'\"~$! \n0", max_size=12), max_size=3))
@QUICK
def test_any_command_line_is_read_or_refused(words):
    try:
        load(RunConfig, words)
    except ConfigError:
        pass


@pytest.mark.parametrize("value", ["[1, 2]", "{a: 1}"])
def test_a_recipe_that_is_no_name_is_refused_by_name(value):
    with pytest.raises(ConfigError, match="recipe .* is unknown; there is medium"):
        load(PrepareConfig, [f"recipe={value}"])


@pytest.mark.parametrize("key", ["optim.name", "out", "backend.device", "optim.lr", "model.preset", "log.wandb"])
def test_a_value_that_is_not_utf8_ends_in_one_line_at_most(key):
    try:
        load(RunConfig, [f"{key}=\udcff"])
    except ConfigError as error:
        assert "udcff" in str(error) and "\n" not in str(error)
