"""What the README and docs promise: commands parse, code runs, files and links exist, every method has its row."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from tests.tools.tiny import tiny_config
from thriftlab.data.prepare.pipeline import PrepareConfig
from thriftlab.launch import documents
from thriftlab.launch.bench import OptimBench
from thriftlab.launch.bench_kernels import FLAGS, KernelBench
from thriftlab.launch.cluster import array, hosts, slurm
from thriftlab.launch.curate import CurateConfig
from thriftlab.launch.gpu.check import CheckOptions
from thriftlab.launch.studies import compare, written
from thriftlab.optim import LAYERS, METHODS
from thriftlab.train.config import parse as settings
from thriftlab.train.config.schema import BACKENDS, SCHEDULES, RunConfig
from thriftlab.train.loop import run
from thriftlab.train.records.record import read_metrics
from thriftlab.train.signals import SIGNALS
from thriftlab.train.write_reference import ReferenceConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
REGISTRIES = {"optim": METHODS, "layer": LAYERS, "signal": SIGNALS, "schedule": SCHEDULES, "backend": BACKENDS}
FILE = re.compile(r"\b(?:kernels|data|optim|train|launch|tests)/[\w/]+\.(?:py|yaml|html|sbatch)\b")
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
        if kind and kind[0] in array.REQUESTS:
            array.REQUESTS[kind[0]](rest)
        else:
            settings.validate(PrepareConfig if kind == ["prepare"] else RunConfig, rest)
    elif command == "launch":
        settings.validate(hosts.LaunchConfig, settings.read(argv).drop(RunConfig.model_fields))
    elif command == "data":
        given = settings.read(argv)
        assert given.words[0] in documents.KEYS and settings.validate(documents.DataOptions, given.drop([]))
    elif command == "reference":
        settings.load(ReferenceConfig, argv)
    elif command == "curate":
        given = settings.read(argv)
        assert given.words and settings.validate(CurateConfig, given.drop([]))
    elif command == "check":
        assert argv[0] == "gpu" and settings.load(CheckOptions, argv[1:])
    elif command == "bench":
        what, *given = argv
        if what == "step":
            assert settings.read(given).words
        else:
            options = {"optim": OptimBench, "kernels": KernelBench}[what]
            assert settings.load(options, [FLAGS.get(word, word) for word in given])
    elif command == "study":
        assert written.make_request(settings.read(argv)) if argv else written.listing()
    else:
        assert command == "report" and len(argv) in (1, 2)


def test_the_settings_of_make_run_are_understood():
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if " compare " in line]
    assert len(lines) == 2, "one for a CPU and one for a GPU"
    for line in lines:
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


def test_the_snippets_of_python_md_run(tiny_data, tmp_path, monkeypatch):
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "tiny").symlink_to(tiny_data)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL):
        exec(code, names)
    assert names["losses"].shape == names["weights"].shape and names["weights"].sum() == pytest.approx(1)
    assert names["tokens"].shape == (2, 33) and names["batch"].tokens.shape == (8, 33)
    assert names["done"].converted == ["0", "2"] and names["record"]["budget"]["steps"] == 8


def own(registry):
    """The entries that the package has by itself, with the file of each; tests and plug-ins register others."""
    files = {name: Path(inspect.getfile(entry)).resolve() for name, entry in registry.items() if entry}
    return {
        name: file.relative_to(ROOT).as_posix()
        for name, file in files.items()
        if file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "tests")
    }


@pytest.mark.parametrize("section", REGISTRIES)
def test_every_entry_of_a_registry_has_a_row_in_the_readme(section):
    assert f"(`{section}.name`)" in README
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| `([\w/.]+)` \|$", README, re.MULTILINE))
    found = own(REGISTRIES[section])
    assert found and {name: rows.get(name) for name in found} == found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    missing = {name for name in FILE.findall(page.read_text()) if not (ROOT / name).is_file()}
    assert not missing


def anchors(page):
    """As GitHub makes them of headings: lower case, without punctuation, spaces as hyphens."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    assert {page.name for page in DOCS.glob("*.md") if f"({page.name})" not in index} == {"README.md"}


def test_folders_md_names_all_that_a_run_writes(tiny_data, tmp_path):
    text = (DOCS / "folders.md").read_text()
    record = run(tiny_config(tiny_data, tmp_path / "out"))
    assert {key for key in record if f"`{key}`" not in text} == set()
    files = {path.name for folder in (tmp_path / "out", tiny_data) for path in folder.rglob("*") if path.is_file()}
    assert {name for name in files - {"code.diff"} if f"{name}`" not in text} == set()


def test_the_life_of_a_step_names_functions_where_they_are():
    page = (ROOT / "docs" / "life-of-a-step.md").read_text()
    hops = re.findall(r"((?:`[\w.]+`(?:, then |, | and )?)+) in\s+`([\w/]+\.py)`", page)
    named = [(name.split(".")[-1], file) for names, file in hops for name in re.findall(r"`([\w.]+)`", names)]
    assert len(named) > 60
    for name, file in named:
        there = re.search(rf"\b(def|class) {name}\b|^{name}\b", (ROOT / file).read_text(), re.M)
        assert there, f"{name} is not in {file}"


FORM = ("State", "Needs", "What differs", "Published", "When")  # after what it is from, and its equation


@pytest.mark.parametrize("name", own(METHODS))
def test_every_method_has_its_section_in_one_form(name):
    page = (DOCS / "methods.md").read_text()
    [section] = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    said = re.findall(r"^- (\w[\w ]*?)(?: from its code)?:", section, re.MULTILINE)
    assert said[0] in ("Paper", "Papers", "Source") and said[1] == "Equation" and tuple(said[2:7]) == FORM
