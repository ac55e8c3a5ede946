"""What `pip install thriftlab` brings: all of the code, optimizers that need no extra, commands that name theirs."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tools.imports import imports, sources

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("kernels", "data", "optim", "train", "launch")
BASE = ("torch", "numpy", "pydantic")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, source / floor, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("thriftlab-*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel):
    """Runs Python with the wheel installed, without the imports for whose top-level name, `top`, `refused` is true."""
    site = wheel.parent / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(code, refused):
        words = [sys.executable, "-c", REFUSING.replace("REFUSED", refused) + code]
        return subprocess.run(words, capture_output=True, text=True, env=environment)

    return run


REFUSING = """
import sys
import sysconfig

sysconfig.get_config_vars()  # imports a module of the standard library whose name depends on the machine

class Refusing:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if REFUSED:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Refusing, sys.meta_path)
"""


def imports_of(*names):
    """The top-level imports of these packages and of what pip installs for them."""
    found, waiting = set(), [*names]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            needs = map(Requirement, metadata.requires(name) or ())
            waiting += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    brought = metadata.packages_distributions().items()
    return sorted(top for top, packages in brought if found & {canonicalize_name(package) for package in packages})


def test_the_wheel_is_whole(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    kept = (".yaml", ".html", ".sbatch", ".json")
    beside = [path for floor in FLOORS for path in (ROOT / floor).rglob("*") if path.suffix in kept]
    files = code + beside
    assert names == {f"thriftlab/{path.relative_to(ROOT).as_posix()}" for path in files}


def test_the_base_install_is_for_the_optimizers_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(Requirement(line).name for line in project["dependencies"]) == sorted(BASE)
    extras = {name: list(map(Requirement, lines)) for name, lines in project["optional-dependencies"].items()}
    assert {"deepspeed", "wandb", "datasets", "triton"} <= {need.name for need in extras["train"]}
    assert any({"train", "cluster"} <= need.extras for need in extras["dev"])
    assert [need.name for need in extras["cluster"]] == ["ray"]


WITH_PYDANTIC = {"pydantic-core": "pydantic", "typing-extensions": "pydantic"}  # of one version, which it chooses
BROUGHT = {**WITH_PYDANTIC, "requests": "wandb", "fsspec": "datasets"}  # imported only where the other is


def test_what_the_code_imports_is_declared():
    """Not left to another package, which may stop to bring it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    packages = {
        top: {canonicalize_name(name) for name in names} for top, names in metadata.packages_distributions().items()
    }
    own = {name.partition(".")[0] for path in sources(ROOT) for _, name in imports(path)}
    for top in own - sys.stdlib_module_names - {"thriftlab"}:
        assert packages.get(top, {canonicalize_name(top)}) & (declared | BROUGHT.keys()), f"{top} is in no extra"
    for name, by in BROUGHT.items():
        assert name in {canonicalize_name(Requirement(line).name) for line in metadata.requires(by)}


OPTIMIZERS = """
import warnings

import torch
from thriftlab.optim import METHODS, LostLinear, convert_lost, split_groups

def model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"mlp": torch.nn.Linear(160, 144), "head": torch.nn.Linear(144, 2)})

def loss(model):
    return model["head"](model["mlp"](torch.ones(3, 160))).square().mean()

for name, method in METHODS.items():
    stepped = model()
    optimizer = method(split_groups(stepped, include=["mlp"]), lr=1e-2)
    before = loss(stepped)
    before.backward()
    optimizer.step()
    assert loss(stepped) != before, name
converted = model()
convert_lost(converted, rank=8, density=0.1, include=["mlp"])
assert isinstance(converted["mlp"], LostLinear) and loss(converted).isfinite()
print("stepped:", *METHODS)
"""


def test_the_optimizers_need_nothing_but_torch_numpy_and_pydantic(python):
    from thriftlab.optim import METHODS

    done = python(OPTIMIZERS, refused=f"top not in {{*sys.stdlib_module_names, 'thriftlab', *{imports_of(*BASE)}}}")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()[1:]) >= {name for name, cls in METHODS.items() if "thriftlab" in cls.__module__}


@pytest.mark.parametrize(
    ("words", "module", "package"),
    [
        (["train"], "yaml", "pyyaml"),
        (["train", "--help"], "einops", "einops"),
        (["report", "nowhere"], "matplotlib", "matplotlib"),
        (["prepare"], "tiktoken", "tiktoken"),
    ],
)
def test_a_command_without_its_extra_says_what_to_install(python, words, module, package):
    done = python(f"from thriftlab.launch.cli import main\nsys.exit(main({words!r}))", refused=f"top == {module!r}")
    said = f"error: this command needs the package {package}: pip install 'thriftlab[train]'\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_a_cluster_needs_its_extra(python, tmp_path):
    words = ["prepare", "engine=ray", "inputs.a.path=synthetic:documents=9", f"out={tmp_path}/made"]
    done = python(f"from thriftlab.launch.cli import main\nsys.exit(main({words!r}))", refused="top == 'ray'")
    said = "error: engine=ray needs the package ray: pip install 'thriftlab[cluster]'\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_another_missing_module_is_a_defect_and_keeps_its_trace(python):
    code = "from thriftlab.launch.cli import COMMANDS, Command, main\n"
    code += "COMMANDS['train'] = Command(lambda argv: __import__('no_such_module'), '')\nmain(['train'])"
    done = python(code, refused="False")
    assert done.returncode == 1 and "Traceback" in done.stderr and "'no_such_module'" in done.stderr
