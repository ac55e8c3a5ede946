"""thriftlab bench kernels: whether the Triton kernels compile as they should, are right, and how fast they are.

With --compile-only the first of the three: for four GPUs, none of which is needed (kernels/gate.py). Registers and
accesses are compared with a file that is kept for each version of triton, and that --write-registers writes. Without
it the other two, on this machine's GPU: the tests of the kernels in triton's interpreter, the bits that the GPU gives
beside the interpreter's, and each case of kernel_cases.py beside plain torch.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from thriftlab.data.errors import UserError
from thriftlab.data.files import make_folder, replace_atomically
from thriftlab.data.paths import FilePath
from thriftlab.kernels.gate import GPUS, PLANTED, compile_all, read_table, table_file
from thriftlab.launch import kernel_bits, kernel_cases
from thriftlab.launch.bench import name_of
from thriftlab.train.backends.device import Device, choose_device, why_no_gpu
from thriftlab.train.config.choice import Section

FLAGS = {"--compile-only": "compile_only=true", "--write-registers": "write_registers=true"}
ROOT, TESTS = Path(__file__).parents[1], "tests/kernels/interpreted"
TRITON = version("triton")
Row = dict[str, Any]


class KernelBench(Section):
    """What is looked at."""

    compile_only: bool = Field(False, description="--compile-only: compile for four GPUs, which are not needed")
    write_registers: bool = Field(
        False, description="--write-registers: keep what was compiled as what later ones are compared with"
    )
    device: Device = Field("auto", description="auto, cuda or cuda:N: where kernels run, without --compile-only")
    rounds: int = Field(20, ge=1, description="calls of each way that are timed")
    out: FilePath | None = Field(None, description="JSON file for every number; null: none")


def bench_kernels(options: KernelBench) -> list[Row]:
    rows = compiled(options) if options.compile_only else run(options)
    if options.out:
        make_folder(Path(options.out).parent)
        replace_atomically(Path(options.out), json.dumps(rows, indent=1).encode())
    if options.write_registers:
        write_registers(rows)
    elif bad := refused(rows) if options.compile_only else unlike(rows):
        error = UserError("\n".join(bad))
        error.code = 1
        raise error
    return rows


def compiled(options: KernelBench) -> list[Row]:
    rows = compile_all()
    print(compiled_table(rows))
    return rows


def run(options: KernelBench) -> list[Row]:
    """On a GPU the tests of the kernels, its bits, a comparison with plain torch and times; else why not."""
    device = choose_device(options.device)
    if device.type == "cpu":
        print(f"skipped: the bits of a device, the comparison there, times: {why_no_gpu()}")
        print(f"what needs no GPU: thriftlab bench kernels --compile-only, and TRITON_INTERPRET=1 pytest {TESTS}")
        return []
    rows = [interpreted(), {"case": "bits", "wrong": kernel_bits.unlike(device)}]
    for case in kernel_cases.cases(device, small=False):
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        rows.append(kernel_cases.measured(case, device, options.rounds))
    print(f"{name_of(device, {})}, torch {torch.__version__}, triton {TRITON}, median of {options.rounds} calls")
    print(kernel_cases.times_table(rows[2:]))
    for why in dict.fromkeys(why for row in rows[2:] for why in row["skipped"].values()):
        print(f"skipped: {why}")
    return rows


def interpreted() -> Row:
    """The tests of the kernels, where they are at hand: in the interpreter, which follows no pointer to a device."""
    if not (ROOT / TESTS).is_dir():
        print(f"skipped: the tests of the kernels: {ROOT / TESTS} is not here")
        return {"case": "tests", "wrong": []}
    command = [sys.executable, "-m", "pytest", "-q", TESTS]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})
    return {"case": "tests", "wrong": [f"{TESTS} fail"] if done.returncode else []}


def unlike(rows: list[Row]) -> list[str]:
    return [says for row in rows for says in row["wrong"]]


def compiled_table(rows: list[Row]) -> str:
    """A line for each variant."""
    names = list(dict.fromkeys(named(row) for row in rows))
    wide = max(map(len, names))
    lines = [
        f"triton {TRITON}: registers, KB of shared memory, loads and stores of 32 bits and less",
        f"{'':{wide}}" + "".join(f"{gpu:>16}" for gpu in GPUS),
    ]
    for name in names:
        cells = {row["gpu"]: cell(row) for row in rows if named(row) == name}
        lines.append(f"{name:{wide}}" + "".join(f"{cells.get(gpu, '-'):>16}" for gpu in GPUS))
    return "\n".join(lines)


def named(row: Row) -> str:
    return f"{row['file']}: {row['variant']}"


def cell(row: Row) -> str:
    mark = "!" if row["faults"] else ""
    if "registers" not in row:
        return f"{mark}error"
    return f"{mark}{row['registers']:>3} {row['shared'] / 1024:>4.1f} {row['narrow']:>4}"


def refused(rows: list[Row]) -> list[str]:
    """A line for each fault, and one if the planted kernel was let pass."""
    ours, planted = ([row for row in rows if (row["file"] == PLANTED) == kind] for kind in (False, True))
    bad = [f"{named(row)}, {row['gpu']}: {fault}" for row in ours for fault in row["faults"]]
    if not any("spill" in fault for row in planted for fault in row["faults"]):
        bad.append("the planted kernel, whose registers spill, was not refused")
    found, kept = {named(row) for row in ours}, set(read_table(TRITON))
    if not kept:
        print(f"kernels/{table_file(TRITON).name} is not there: registers and accesses are compared with nothing")
        return bad
    again = "; the new numbers are written by thriftlab bench kernels --compile-only --write-registers"
    for names, what in ((found - kept, "nothing is known of the registers of"), (kept - found, "gone are")):
        bad += [f"{what} {', '.join(sorted(names))}{again}"] if names else []
    return bad


def write_registers(rows: list[Row]) -> None:
    """A line for each variant: its registers and narrow accesses on each GPU."""
    table: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        if row["file"] != PLANTED and "registers" in row:
            table.setdefault(named(row), {})[row["gpu"]] = [row["registers"], row["narrow"]]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in table.items())
    replace_atomically(table_file(TRITON), f"{{\n{lines}\n}}\n".encode())
