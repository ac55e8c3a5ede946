"""`make run` installs the build of torch that fits the machine, and says what is missing; pip itself is a stand-in."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
  *torch.version.cuda*) exit "${NO_CUDA:-0}";;
  *torch.cuda.is_available*) exit "${NO_GPU:-0}";;
esac
"""
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes VENV/.ready, or another target, with a python and a thriftlab that do nothing but note their arguments;
    returns the process and the notes."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    for variable in ("PYTHON", "GPU", "FILE", "ONLY", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        monkeypatch.delenv(variable, raising=False)
    programs = {"venv/bin/python": PYTHON, "venv/bin/thriftlab": PROGRAM, "nvidia-smi": "#!/bin/sh\nexit 0\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*words, target=None, path=os.environ["PATH"], **environment):
        (tmp_path / "log").write_text("")
        venv = tmp_path / "venv"
        done = subprocess.run(
            ["make", f"VENV={venv}", *words, target or f"{venv}/.ready"],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": path, **environment},
        )  # fmt: skip
        return done, (tmp_path / "log").read_text()

    return run


def test_a_machine_without_a_gpu_gets_the_build_without_cuda(make):
    done, log = make("GPU=")
    assert done.returncode == 0 and "torch==2.13.0+cpu -c constraints.txt" in log


def test_a_gpu_is_seen_and_gets_the_build_with_cuda(make, tmp_path):
    done, log = make(path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0 and "torch==2.13.0 -c constraints.txt" in log and "+cpu" not in log + done.stdout


def test_a_build_without_cuda_on_a_machine_with_a_gpu_is_an_error(make):
    done, log = make("GPU=yes", NO_CUDA="1")
    assert done.returncode and "uninstall --quiet --yes torch" in log  # what was there before
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "make run TORCH=torch==2.13.0+cpu" in errors[0] and "TORCH_INDEX=" in errors[0]
    assert make("GPU=yes")[0].returncode == 0  # it is tried again


def test_another_torch_is_installed_into_an_environment_that_is_there(make):
    assert "torch==2.13.0+cpu" in make("GPU=")[1]
    assert make("GPU=")[1] == ""
    assert "install --quiet --disable-pip-version-check torch==2.13.0 " in make("GPU=", "TORCH=torch==2.13.0")[1]
    assert "torch==2.13.0+cpu" in make("GPU=")[1]


@pytest.mark.parametrize(("no_gpu", "study", "vocabulary"), [
    ("1", "first_light.yaml", "bpe:1024"),
    ("0", "first_light_gpu.yaml", "bpe:8192"),
])  # fmt: skip
def test_make_run_compares_what_suits_the_machine(make, no_gpu, study, vocabulary):
    """A GPU counts where torch sees it: without a driver that works it is the CPU's comparison, not one of hours."""
    done, log = make("GPU=yes", target="run", NO_GPU=no_gpu)
    assert done.returncode == 0, done.stderr
    commands = [line.split() for line in log.splitlines() if line.startswith("thriftlab")]
    assert [words[1] for words in commands] == ["prepare", "compare"]
    assert f"tokenizer={vocabulary}" in commands[0] and f"launch/studies/{study}" in commands[1]


def test_gpu_check_takes_the_python_that_is_named_and_installs_nothing(make, tmp_path):
    own = tmp_path / "own"
    own.write_text(PROGRAM)
    own.chmod(0o755)
    done, log = make(f"PYTHON={own}", "ONLY=1,6", f"FILE={tmp_path}/x.json", target="gpu-check")
    assert done.returncode == 0, done.stderr
    assert log == f"own -m thriftlab.launch check gpu --out {tmp_path}/x.json --only 1,6\n"
    assert make(target="gpu-check")[1] == "-m thriftlab.launch check gpu --out gpu-check.json\n", (
        "that of the environment"
    )


def test_both_builds_satisfy_the_constraints():
    """The build with CUDA wants this version of triton and the other none."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines and [line for line in lines if line.startswith("triton")] == ["triton==3.7.1"]
