"""thriftlab bench kernels: whether the Triton kernels compile as they should, are right, and how fast they are.

With --compile-only the first of the three: for four GPUs, none of which is needed (kernels/gate.py). Registers and
accesses are compared with a file that is kept for each version of triton, and that --write-registers writes.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from thriftlab.data.errors import UserError
from thriftlab.data.files import make_folder, replace_atomically
from thriftlab.data.paths import FilePath
from thriftlab.kernels.gate import GPUS, PLANTED, compile_all, read_table, table_file
from thriftlab.train.config.choice import Section

FLAGS = {"--compile-only": "compile_only=true", "--write-registers": "write_registers=true"}
TRITON = version("triton")
Row = dict[str, Any]


class KernelBench(Section):
    """What is looked at."""

    compile_only: bool = Field(False, description="--compile-only: compile for four GPUs, which are not needed")
    write_registers: bool = Field(
        False, description="--write-registers: keep what was compiled as what later ones are compared with"
    )
    out: FilePath | None = Field(None, description="JSON file for every number; null: none")


def bench_kernels(options: KernelBench) -> list[Row]:
    rows = compile_all()
    print(compiled_table(rows))
    if options.out:
        make_folder(Path(options.out).parent)
        replace_atomically(Path(options.out), json.dumps(rows, indent=1).encode())
    if options.write_registers:
        write_registers(rows)
    elif bad := refused(rows):
        error = UserError("\n".join(bad))
        error.code = 1
        raise error
    return rows


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
    return f"{mark}{row['registers']:>3} {row['shared'] / 1024:>4.3g} {row['narrow']:>4}"


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
    bad += [f"{name}: nothing is known of its registers{again}" for name in sorted(found - kept)]
    return bad + [f"{name}: there is no such variant any more{again}" for name in sorted(kept - found)]


def write_registers(rows: list[Row]) -> None:
    """A line for each variant: its registers and narrow accesses on each GPU."""
    table: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        if row["file"] != PLANTED and "registers" in row:
            table.setdefault(named(row), {})[row["gpu"]] = [row["registers"], row["narrow"]]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in table.items())
    replace_atomically(table_file(TRITON), f"{{\n{lines}\n}}\n".encode())
