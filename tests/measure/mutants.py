"""Whether the tests of the kernels see faults: one line of a kernel is changed, and its tests must fail.

    python -m tests.measure.mutants                    all files
    python -m tests.measure.mutants norm_rows 3 4      some faults of one file, by number

The tests run first on what is there, and must pass: a suite that fails by itself catches everything. A fault that only
the compiler shows is given to the gate. Works on a copy of the tree; a fault that is not caught makes the exit code 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "data", "optim", "train", "launch", "tests")
GATE = "gate"


class Fault(NamedTuple):
    before: str  # of which the first occurrence is replaced
    after: str
    by: str = "tests"  # or GATE
    file: str | None = None  # the kernels' own file, if none is named


NORM_ROWS = [
    Fault("channel * length + step if SIDE == ROWS", "channel * length + step if SIDE == COLUMNS"),
    Fault("(channel < channels) & (step < length), other=0.0)", "(channel < channels) & (step <= length), other=0.0)"),
    Fault("mask=(channel < channels) & (step < length), other=0.0)", "mask=step < length, other=0.0)"),
    Fault("squares += g * g", "squares = g * g"),
    Fault("tl.store(matrix(T, t, SECOND, 4) + channel, norm, mask=channel < channels)",
          "tl.store(matrix(T, t, SECOND, 4) + channel, norm)"),
    Fault("tl.sqrt(tl.sum(squares, axis=1, keep_dims=True))", "tl.sum(squares, axis=1, keep_dims=True)"),
    Fault("m += rest1 * (r - m)", "m += rest1 * r"),
    Fault("rest2 * r * r", "rest2 * r"),
    Fault("n = correction * m / (tl.sqrt(v) + eps)", "n = m / (tl.sqrt(v) + eps)"),
    Fault("(tl.sqrt(v) + eps)", "tl.sqrt(v + eps)"),
    Fault("tl.where(mask, n * n, 0.0)", "n * n"),
    Fault("squares_r += r * r", "squares_r += r * n"),
    Fault("tl.load(CORRECTIONS + t)", "tl.load(CORRECTIONS)"),
    Fault("FIFTH, 4) + channel, norm_n", "SIXTH, 4) + channel, norm_n"),
    Fault("keep * w + factor * g", "w + factor * g"),
    Fault("(block // along).to(tl.int64) * MANY", "(block // along).to(tl.int64) * STEPS"),
    Fault("block % along", "block // along"),
    Fault("1 - betas[0], 1 - betas[1], eps)", "1 - betas[1], 1 - betas[0], eps)"),
    Fault("-(-channels // many)", "(channels // many)"),
    Fault("np.arange(blocks)", "np.arange(blocks) // 2"),
    Fault("channels, length = shape if by_row else shape[::-1]\n        blocks",
          "channels, length = shape\n        blocks"),
    Fault("(fields[:, :count] % 16 == 0).all(1)", "np.ones(len(firsts), bool)"),
    Fault("& np.array([shape[1] % 4 == 0 for shape, _ in shapes])", ""),
    Fault("tl.multiple_of(length, ALIGN // 4)", "length", GATE),
    Fault("to(tl.pointer_type(tl.float32)), ALIGN)", "to(tl.pointer_type(tl.float32)), 4)", GATE),
    Fault("phi * rate / limit", "phi * rate", file="optim/apollo.py"),
    Fault("[-beta * f for f in free]", "[-f for f in free]", file="optim/fira.py"),
]  # fmt: skip
FAULTS: dict[str, list[Fault]] = {"norm_rows": NORM_ROWS}


def command(kernels: str, by: str) -> list[str]:
    if by == GATE:
        return ["-m", "thriftlab.launch", "bench", "kernels", "--compile-only"]
    return ["-m", "pytest", "-qx", "-p", "no:cacheprovider", f"tests/kernels/interpreted/test_{kernels}.py"]


def run(tree: Path, kernels: str, by: str) -> tuple[bool, str]:
    """Whether all is well in a tree, and else the line that says what is not."""
    environment = {**os.environ, "PYTHONPATH": str(tree / ".typecheck"), "TRITON_INTERPRET": str(int(by != GATE))}
    words = [sys.executable, *command(kernels, by)]
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("E  ", "error", "FAILED"))]
    return done.returncode == 0, next(iter(said), f"exit code {done.returncode}")


def copy(tree: Path) -> None:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
        (tree / ".typecheck" / "thriftlab").mkdir(parents=True, exist_ok=True)
        (tree / ".typecheck" / "thriftlab" / folder).symlink_to(tree / folder)
    shutil.copy(ROOT / "pyproject.toml", tree)


def try_faults(tree: Path, kernels: str, faults: Sequence[tuple[int, Fault]]) -> list[int]:
    """Prints what became of each fault; the numbers of those that nobody saw."""
    for by in {fault.by for _, fault in faults}:
        well, why = run(tree, kernels, by)
        if not well:
            raise SystemExit(f"{kernels}: the {by} fail as it is: {why}")
    missed = []
    for number, fault in faults:
        path = tree / (fault.file or f"kernels/{kernels}.py")
        whole = path.read_text()
        if fault.before not in whole:
            raise SystemExit(f"{kernels} {number}: there is no {fault.before!r} in {path.name}")
        path.write_text(whole.replace(fault.before, fault.after, 1))
        well, why = run(tree, kernels, fault.by)
        path.write_text(whole)
        missed += [number] * well
        says = f"NOT SEEN  {fault.after}" if well else f"caught    {fault.after.splitlines()[0]:60} {why}"
        print(f"{kernels} {number:2} {says[:180]}", flush=True)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="?", choices=FAULTS)
    parser.add_argument("numbers", nargs="*", type=int)
    options = parser.parse_args()
    missed, tried = 0, 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy(Path(folder))
        for kernels in [options.kernels] if options.kernels else FAULTS:
            numbers = options.numbers or range(len(FAULTS[kernels]))
            chosen = [(number, FAULTS[kernels][number]) for number in numbers]
            missed += len(try_faults(Path(folder), kernels, chosen))
            tried += len(chosen)
    print(f"{tried - missed} of {tried} faults were caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
