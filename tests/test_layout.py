"""The rules of the layout that a machine can hold: imports go down, the loop knows no names, every key is read."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.tools.imports import circle, imports, imports_between, sources, within

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"kernels": set(), "data": set(), "optim": {"kernels"}, "train": {"kernels", "data", "optim"}}
FLOORS["launch"] = {"kernels", "data", "optim", "train"}
SOURCES = sources(ROOT)
EDGES = imports_between(ROOT)
ALL = sorted({path.parent.relative_to(ROOT) for path in SOURCES})


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    floor = path.relative_to(ROOT).parts[0]
    allowed = FLOORS[floor] | {floor}
    for line, name in imports(path):
        if name.startswith("thriftlab."):
            assert name.split(".")[1] in allowed, f"line {line}: {name} is above or beside {floor}"


def test_no_file_imports_itself_through_others():
    if found := circle(EDGES):
        pytest.fail(f"a circle of imports: {found}", pytrace=False)


@pytest.mark.parametrize("folder", ALL, ids=str)
def test_what_lies_in_a_folder_is_in_layers(folder):
    if found := circle(within(folder, EDGES)):
        pytest.fail(f"a circle of imports in {folder}: {found}", pytrace=False)


LAYERS = {
    "__init__.py": "from thriftlab.optim.sgd import SGD",
    "sgd.py": "from thriftlab.optim.core import method\nfrom thriftlab.optim.core.rule import Rule",
    "core/__init__.py": "",
    "core/method.py": "import torch\nfrom thriftlab.optim.core.rule import Rule",
    "core/rule.py": "from thriftlab.optim.core.split import Split",
    "core/split.py": "",
    "state/keys.py": "",
    "state/carry.py": "from thriftlab.optim.core.split import Split",
}
PLANTED = {
    "no circle": ({}, []),
    "one in a function": (
        {"core/split.py": "def split():\n    from thriftlab.optim.core.method import Method"},
        [None, "optim/core"],
    ),
    "one of types": (
        {"core/split.py": "if TYPE_CHECKING:\n    import thriftlab.optim.core.method as method"},
        [None, "optim/core"],
    ),
    "one between folders": ({"core/rule.py": "from thriftlab.optim.state.keys import Keys"}, ["optim"]),
    "one through a package": ({"core/split.py": "from thriftlab.optim import SGD"}, [None]),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_circle_is_found_where_it_is(planted, tmp_path):
    changed, places = PLANTED[planted]
    for name, text in {**LAYERS, **changed}.items():
        (tmp_path / "optim" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "optim" / name).write_text(text)
    edges = imports_between(tmp_path)
    found = {None: circle(edges)} | {name: circle(within(Path(name), edges)) for name in ("optim", "optim/core")}
    assert [place for place, words in found.items() if words] == places
    for words in filter(None, found.values()):
        path, *lines = words.splitlines()
        path = path.split(" -> ")
        assert path[0] == path[-1] and len(lines) == len(path) - 1 > 1
        for importer, line in zip(path, lines, strict=False):
            assert line.strip().startswith(importer) and "import" in line.split(":")[2]


def test_no_test_imports_another():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for line, name in imports(path):
            assert not re.match(r"tests\.(.*\.)?test_", name), f"{path}:{line}: what tests share lies in tests/tools"


def test_every_floor_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {name.removeprefix("thriftlab.").replace(".", "/") for name in project["packages"]} == folders
    assert not (ROOT / "kernels" / "__init__.py").exists()


def string_constants(tree):
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def names_in(path):
    """Identifiers and string constants of a file, its docstrings apart."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.split(".")[-1]
    for text in string_constants(tree):
        yield from re.findall(r"\w+", text)


def test_no_method_is_named_outside_its_own_file():
    from thriftlab.optim import METHODS

    allowed = {
        "train/config/schema.py": {"adamw"},
        "launch/commands.py": {"frugal"},
    }  # the default; an example in the help
    allowed["launch/peers.py"] = {*METHODS, *(m.__name__ for m in METHODS.values())}  # a preset: rows of a table
    above = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "optim"]
    named = {path: set(names_in(path)) for path in above}
    for path in above:  # a method with the name of a word that is used for other things: said as a string of its own
        named[path] -= {"scale"} - set(string_constants(ast.parse(path.read_text())))
    for name, method in METHODS.items():
        own = Path(sys.modules[method.__module__].__file__).resolve()
        for path, names in named.items():
            place = path.relative_to(ROOT).as_posix()
            found = {name, method.__name__} & names - allowed.get(place, set()) if path != own else set()
            assert not found, f"{place} names {found}"


def test_the_loop_names_no_data_set_loss_or_schedule():
    from thriftlab.train.budget import SCHEDULES

    forbidden = {"embedded", "synthetic", "topics", "docstrings", "cross_entropy", "linear_cross_entropy", *SCHEDULES}
    for name in ("loop", "step", "build", "log", "backends/base"):
        found = forbidden & set(names_in(ROOT / "train" / f"{name}.py"))
        assert not found, f"train/{name}.py names {found}"


def fields(model, seen):
    """(class, field) of a tree of models."""
    if model in seen:
        return
    seen.add(model)
    for name, field in model.model_fields.items():
        yield model, name
        for nested in nested_models(field.annotation):
            yield from fields(nested, seen)


def nested_models(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from nested_models(part)


def test_every_config_field_is_read_by_somebody():
    from thriftlab.data.prepare.pipeline import PrepareConfig
    from thriftlab.train.config.schema import RunConfig

    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    lookups = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get"]
    read |= {node.args[0].value for node in lookups if node.args and isinstance(node.args[0], ast.Constant)}
    for root in (RunConfig, PrepareConfig):
        for model, name in fields(root, set()):
            assert name in read, f"nobody reads {model.__name__}.{name}"


def test_every_hyperparameter_is_read_in_its_own_package():
    from thriftlab.optim import METHODS
    from thriftlab.optim.core.hyper import hyperparameters

    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "optim").rglob("*.py")}
    read = {text for tree in trees.values() for text in string_constants(tree)}
    shared = [tree for path, tree in trees.items() if path.parent.name in ("core", "state")]  # called with **group
    read |= {node.arg for tree in shared for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for name, method in METHODS.items():
        for key in set(hyperparameters(method)) - {"seed"}:
            used = {node.id for node in ast.walk(ast.parse(Path(sys.modules[method.__module__].__file__).read_text()))
                    if isinstance(node, ast.Name)}  # fmt: skip
            assert key in read | used, f"nobody reads {name}.{key}"


def test_files_are_short():
    long = {p.relative_to(ROOT).as_posix(): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 330}
    assert not long, "split what has become two rooms"


@pytest.mark.slow
@pytest.mark.parametrize("folder", [ROOT, ROOT.parent])
def test_transformers_and_thriftlab_import_in_one_process(folder):
    pytest.importorskip("transformers")
    code = "import thriftlab.kernels.rms_norm, thriftlab.train, transformers as t; t.LlamaForCausalLM; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr
