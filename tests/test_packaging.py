"""The wheel holds every module under thriftlab/ and nothing at the top level beside it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("kernels", "data", "optim", "train", "launch")


def test_the_wheel_is_whole(tmp_path):
    source = tmp_path / "source"
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, source / floor, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("thriftlab-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    beside = [path for path in (ROOT / "launch").rglob("*") if path.suffix in (".yaml", ".html", ".sbatch")]
    files = code + beside
    assert names == {f"thriftlab/{path.relative_to(ROOT).as_posix()}" for path in files}
