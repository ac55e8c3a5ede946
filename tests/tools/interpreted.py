"""Tests of Triton kernels, in tests/kernels/interpreted: they run in triton's interpreter, on CPU tensors.

Triton reads TRITON_INTERPRET when it is imported, so a process either interprets kernels or compiles them. A session of
tests leaves these files out, and tests/kernels/test_interpreted.py runs each in a process of its own. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted/test_guard.py
"""

import os
import subprocess
import sys
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FOLDER = Path(__file__).parents[1] / "kernels" / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


def run_interpreted(file, *options):
    """pytest on one of these files, with the interpreter on: whether it passed, and what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file), *options]
    done = subprocess.run(
        command, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=FOLDER.parents[2]
    )
    return done.returncode == 0, done.stdout + done.stderr
