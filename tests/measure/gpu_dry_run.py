"""Whether pip finds, on PyPI, an environment with CUDA that the constraints allow; nothing is installed.

    python -m tests.measure.gpu_dry_run

Without any other index or local file: what a machine with a GPU gets from `make run`. It takes a minute or two.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
INDEX = "https://pypi.org/simple"
SHOWN = ("torch", "triton", "deepspeed", "numpy", "nvidia-nccl-cu13", "nvidia-cublas")


def resolved(*requirements: str) -> dict[str, str]:
    """Name -> version of what pip would install. CalledProcessError where it finds nothing."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_") or key == "PIP_CERT"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = ["--dry-run", "--ignore-installed", "--quiet", "--index-url", INDEX, "--report", str(report)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", *words, *requirements, "-c", str(ROOT / "constraints.txt")],
            env={**environment, "PIP_CONFIG_FILE": os.devnull}, check=True,
        )  # fmt: skip
        installed = json.loads(report.read_text())["install"]
    return {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in installed}


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = resolved("torch==2.13.0", *project["dependencies"], *project["optional-dependencies"]["train"])
    for name in SHOWN:
        print(f"{name:20}{found.get(name, 'none')}")
    with_cuda = [name for name in found if name.startswith("nvidia-")]
    assert "+cpu" not in found["torch"] and with_cuda, "this torch has no CUDA"
    print(f"{len(found)} packages, {len(with_cuda)} of NVIDIA's")


if __name__ == "__main__":
    main()
