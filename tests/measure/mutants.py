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
FEW_BITS = "kernels/few_bits.py"


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
    Fault("torch._foreach_mul(free, -beta)", "torch._foreach_neg(free)", file="optim/fira.py"),
]  # fmt: skip
CROSS_ENTROPY_ROWS = [
    # stats_of_row
    Fault("tl.where(x == largest, 0.0, x - largest)", "x - largest"),
    Fault("tl.exp(-tl.abs(step))", "tl.exp(step)"),
    Fault("total * smaller + 1.0", "total + smaller"),
    Fault("total * smaller + 1.0", "total * smaller"),
    Fault("return tl.maximum(largest, x), total", "return largest, total"),
    Fault("row = tl.program_id(0).to(tl.int64)\n    x", "row = tl.program_id(0).to(tl.int64) + 1\n    x"),
    Fault("range(0, whole, BLOCK):\n        largest", "range(BLOCK, whole, BLOCK):\n        largest"),
    Fault("inside = whole + lane < vocab", "inside = whole + lane <= vocab"),
    Fault("tl.where(inside, last, float(\"-inf\"))", "last"),
    Fault("tl.load(x + whole + lane, mask=inside, other=0)", "tl.load(x + whole + lane)"),
    Fault("total * tl.exp(largest - top)", "total"),
    Fault("(target >= 0) & (target < vocab)", "target >= 0"),
    Fault("tl.load(x + target, mask=known, other=0)", "tl.load(logits + target, mask=known, other=0)"),
    Fault("tl.where(target < 0, 0.0, (top", "tl.where(target == -100, 0.0, (top"),
    Fault("(top - at_target) + log_total", "(top + log_total) - at_target"),
    Fault("tl.store(lses + row, top + log_total)", "tl.store(lses + row, log_total)"),
    # grad_of_row
    Fault("tl.where(column == target, 1.0, 0.0)", "tl.where(column == target + 1, 1.0, 0.0)"),
    Fault("tl.exp(x - lse) -", "tl.exp(lse - x) -"),
    Fault("tl.where(target < 0, 0.0, error * grad)", "error * grad"),
    Fault("tl.where(target < 0, 0.0, error * grad)", "tl.where((target < 0) | (grad == 0), 0.0, error * grad)"),
    Fault("tl.where(target < 0, 0.0, error * grad)", "tl.where(target < 0, 0.0, error) * grad"),
    Fault("tl.load(lses + row), tl.load(grads + row)", "tl.load(lses + row), tl.load(grads)"),
    Fault("tl.load(lses + row), tl.load(grads + row)", "tl.load(grads + row), tl.load(lses + row)"),
    Fault("first + lane, target, lse, grad)", "lane, target, lse, grad)"),
    Fault("tl.store(x + first + lane, narrowed", "tl.store(x + lane, narrowed"),
    Fault("column = whole + lane", "column = lane"),
    Fault("inside = column < vocab", "inside = column < vocab - 1"),
    Fault("narrowed(found, kind), mask=inside)", "narrowed(found, kind))"),
    # launches
    Fault("1 << (vocab.bit_length() - 1)", "1 << vocab.bit_length()"),
    Fault("targets.contiguous()", "targets"),
    Fault("if rows:", "if True:"),
    Fault("padded[:, vocab:] = 0", "padded[:, vocab:] = torch.nan", file="kernels/linear_cross_entropy.py"),
    Fault("lse[rows], grad[rows])", "lse[: len(block)], grad[rows])", file="kernels/linear_cross_entropy.py"),
    # few_bits.py
    Fault("tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))", "x.to(tl.int32, bitcast=True)", file=FEW_BITS),
    Fault("bits + 0x7FFF + ((bits >> 16) & 1)", "bits", file=FEW_BITS),
]  # fmt: skip
BRANCHES = [
    # join
    Fault("h / (1.0 + tl.exp(-h))", "h / (1.0 + tl.exp(h))"),
    Fault("h * (0.5 + 0.5 * tl.erf", "h * (0.5 + tl.erf"),
    Fault("tl.where(h < 0, 0.0, h * h)", "tl.where(h > 0, h * h, 0.0)"),
    Fault("in_left = column < rank", "in_left = column <= rank"),
    Fault("of_left = tl.load(left + row * left_stride + column, mask=here & in_left",
          "of_left = tl.load(left + row * left_stride + column, mask=in_left"),
    Fault("(column >= rank) & (column < rank + channels)", "column >= rank"),
    Fault("(column >= rank) & (column < rank + channels)", "(column >= rank) & (column < rank + channels - 1)"),
    Fault("source = column - rank", "source = column"),
    Fault("    if CHOSEN:", "    if not CHOSEN:"),
    Fault("row * right_stride + source", "row * left_stride + source"),
    Fault("* left_scale", "* right_scale"),
    Fault("widened(of_right) * right_scale", "widened(of_right)"),
    Fault("row * width + column, narrowed", "row * rank + column, narrowed"),
    Fault("mask=here & (column < width)", "mask=here & (column < rank + channels)"),
    Fault("mask=here & (column < width)", "mask=column < width"),
    # part
    Fault("share * (1.0 + h * (1.0 - share))", "share * (1.0 + h * share)"),
    Fault("+ h * DENSITY_AT_0", "+ DENSITY_AT_0"),
    Fault("tl.exp(-0.5 * h * h)", "tl.exp(-h * h)"),
    Fault("tl.where(h < 0, 0.0, 2.0 * h)", "tl.where(h < 0, 0.0, h)"),
    Fault("tl.where(h < 0, 0.0, 2.0 * h)", "2.0 * h"),
    Fault("tl.full(h.shape, 1.0, tl.float32)", "h"),
    Fault("mask = here & (column < rank)", "mask = here & (column <= rank)"),
    Fault("mask = here & (column < rank)", "mask = column < rank"),
    Fault("row * (grad_stride // UNIT * UNIT)", "row * (grad_stride // ALIGN * ALIGN)"),
    Fault("row * (grad_stride // UNIT * UNIT)", "row * grad_stride", GATE),
    Fault("h + row * h_stride + column", "h + row * grad_stride + column"),
    Fault("mask=mask, other=0)) * slope", "mask=mask, other=0)) + slope"),
    # add_columns
    Fault("mask = here & (column < channels)", "mask = here & (column < channels - 1)"),
    Fault("mask = here & (column < channels)", "mask = column < channels"),
    Fault("mask = here & (column < channels)", "mask = here"),
    Fault("at = total + row * total_stride", "at = total + row * added_stride"),
    Fault("tl.load(index + column, mask=column < channels, other=0)", "column"),
    Fault("added + row * added_stride + column", "added + row * total_stride + column"),
    Fault("added + row * added_stride + column", "added + row * added_stride"),
    Fault("value += widened(tl.load(at, mask=mask, other=0))", "value += widened(tl.load(at))"),
    Fault("value += widened(tl.load(at, mask=mask, other=0))", "value -= widened(tl.load(at, mask=mask, other=0))"),
    Fault("value += widened(tl.load(at, mask=mask, other=0))", ""),
    Fault("total.dtype.element_ty), mask=mask)", "total.dtype.element_ty))"),
    # launches
    Fault("triton.cdiv(rows, TILE // across)", "rows * across // TILE"),
    Fault("tl.program_id(1) * COLUMNS", "0 * COLUMNS"),
    Fault("if rows and columns:", "if rows:"),
    Fault("gamma, 1 - gamma,", "1 - gamma, gamma,"),
    Fault("columns + -columns % ALIGN.value", "columns"),
    Fault("math.gcd(grad.stride(0), ALIGN.value)", "ALIGN.value"),
    # few_bits.py
    Fault("+ 0x7FFF + ((bits >> 16) & 1)", "+ 0x8000", file=FEW_BITS),
]  # fmt: skip
FEW_BITS, PLAN, KINDS = "kernels/few_bits.py", "optim/core/fused.py", "optim/core/kinds.py"
FUSED_STEP = [
    # counters and keys
    Fault("before + applied, mask", "before + 1, mask"),
    Fault("age = before + 1 -", "age = before -"),
    Fault("length / root, tl.full", "length * root, tl.full"),
    Fault("before if PLAIN and not EARLY_EPS else before + 1", "before"),
    Fault("hash63(seed_v + rounds_v)", "hash63(seed_v)"),
    Fault("rounds = count(tl.load(row + ROUNDS", "rounds = count(tl.load(row + STEP"),
    Fault("result * base, result", "result * base, base", file=FEW_BITS),
    Fault("((1 << (64 - bits)) - 1)", "-1", file=FEW_BITS),
    # numbers in few bits
    Fault("(key >> 31)", "(key >> 32)", file=FEW_BITS),
    Fault("near - (x <= tl.load", "near - (x < tl.load", file=FEW_BITS),
    Fault("tl.where(place > 0, place, 0.0)", "place", file=FEW_BITS),
    Fault("decade = above - 1 +", "decade = above +", file=FEW_BITS),
    Fault("tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))", "x.to(tl.int32, bitcast=True)", file=FEW_BITS),
    Fault("high = (kept + 128) >> 8", "high = (kept + 127) >> 8"),
    Fault("(kept - (high << 8)).to(tl.int8)", "(kept - (high << 8) + 1).to(tl.int8)"),
    Fault("(1 << (15 - LOW_BITS)) - 1 + ((kept >> (16 - LOW_BITS)) & 1)", "1 << (15 - LOW_BITS)"),
    Fault("tl.load(T + t * FIELDS + FIRST_W) + at) >> LOW_BITS", "at) >> LOW_BITS"),
    Fault("tl.load(T + t * FIELDS + FIRST_V) + at)", "at)"),
    Fault("broken = tl.max(", "broken = 0 * tl.max("),
    Fault("tl.where(scale > 0, scale, 1.0)", "scale"),
    Fault("x = tl.where(mask, x, 0.0)", "x = x + 0.0"),
    # the step
    Fault("m + rest1 * (g - m)", "m + rest2 * (g - m)"),
    Fault("rest2 * g * g", "rest2 * g"),
    Fault("tl.sqrt_rn(v) * root + eps", "(tl.sqrt_rn(v) + eps) * root"),
    Fault("tl.where(g < 0, -1.0, g)", "-1.0"),
    Fault("return g * tl.load(SCALE)", "return g"),
    Fault("if tl.load(APPLIED) == 0:", "if tl.load(APPLIED) == 2:"),
    Fault("at = line * columns + entry % columns", "at = line * columns + entry"),
    Fault("size = size // columns * chosen", "size = size // columns * chosen + 1"),
    Fault("mask & (tl.load(index + chosen + line", "mask | (tl.load(index + chosen + line"),
    Fault("store_weight(T, t, KEYS, at, mask, w * decay - step", "store_weight(T, t, KEYS, at, mask, w - step"),
    Fault("entry = row * chosen + slot", "entry = row * columns + slot"),
    Fault("mask = (row < rows) & (column < columns)", "mask = (row <= rows) & (column < columns)"),
    Fault("tl.where(own, step, free", "tl.where(mask, step, free"),
    Fault("block = (slot * columns", "block = (row * columns"),
    # what only the compiler shows
    Fault("m = m + rest1 * (g - m)", "m = tl.fma(g - m, tl.zeros_like(m) + rest1, m)", GATE),
    Fault("tl.div_rn(length * m, tl.sqrt_rn(v) * root + eps)", "length * m / (tl.sqrt_rn(v) * root + eps)", GATE),
    Fault(".to(tl.pointer_type(dtype)), ALIGN)", ".to(tl.pointer_type(dtype)), 4)", GATE),
    # the host
    Fault("-(-moments // ENTRIES)", "-(-moments // ENTRIES) + 1", file=PLAN),
    Fault("np.arange(count), kind", "np.arange(count) // 2, kind", file=PLAN),
    Fault("not kind.still", "kind.still", file=PLAN),
    Fault("== 0).all(1)", ">= 0).all(1)", file=PLAN),
    Fault("if self.left <= 0:", "if self.left <= -9:", file=PLAN),
    Fault("[states[i].get(key) for i, key in self.keys], self.held)", "self.held, self.held)", file=PLAN),
    Fault("n.keep, beta2, 1 - beta1, 1 - beta2", "n.keep, beta2, 1 - beta2, 1 - beta1", file=PLAN),
    Fault("not counters or steps_to_refresh", "True or steps_to_refresh", file=KINDS),
    Fault("-(count + early) % group", "-(count + early + 1) % group", file="optim/core/due.py"),
]  # fmt: skip
FAULTS: dict[str, list[Fault]] = {
    "norm_rows": NORM_ROWS, "cross_entropy_rows": CROSS_ENTROPY_ROWS, "branches": BRANCHES,
    "fused_step": FUSED_STEP,
}  # fmt: skip


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
