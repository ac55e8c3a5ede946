"""What Triton kernels become on GPUs that are not there: registers, spills, shared memory, the width of accesses.

`triton.compile` needs no driver, and the wheel of triton has the assemblers. So every variant of every kernel is
compiled for four GPUs, and is refused where

- registers spill to memory, or the shared memory is more than the GPU has;
- it takes over a tenth more registers than registers-VERSION.json says, or more accesses of 32 bits and less: a loop
  over a tensor has 128-bit ones, unless it gathers;
- it loads or stores 8 or 16 bits at a time, and does not say so;
- it promises exact bits, and the compiler fused a product with a sum, flushes subnormals to zero, or approximates a
  quotient or a root.

The surprise: ptxas is not called here. Which one triton takes depends on its version and on the GPU; what that one said
is read from triton's own log.
"""

import contextlib
import importlib
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from thriftlab.kernels.variant import Variant

GPUS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes of a program
SLACK = 1.1
FOLDER = Path(__file__).parent
PLANTED = "planted"  # the file of a kernel that must be refused


class Compiled(NamedTuple):
    """What a variant became on a GPU."""

    registers: int  # of a thread
    spilled: int  # bytes of registers that went to memory and back
    shared: int  # bytes
    narrow: int = 0  # loads and stores of 32 bits and less in PTX
    tiny: int = 0  # of them, those of 8 and 16 bits
    inexact: int = 0  # operations that fuse, flush or approximate


def kernel_files() -> list[str]:
    """The files of kernels/ that list variants."""
    names = [module.name for module in pkgutil.iter_modules([str(FOLDER)]) if module.name != PLANTED]
    return [name for name in names if "\ndef variants(" in (FOLDER / f"{name}.py").read_text()]


def variants_of(file: str) -> list[Variant]:
    return list(importlib.import_module(f"thriftlab.kernels.{file}").variants())


def compile_for(gpu: str, variant: Variant) -> Compiled:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    knobs.nvidia.dump_ptxas_log = True
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(variant.kernel.params):
        value = variant.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = value
            if value.startswith("*") or parameter.name in variant.multiples:
                attributes[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": not variant.exact}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        source = ASTSource(variant.kernel, signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget(*GPUS[gpu]), options=options)
    return of_amd(made) if "amdgcn" in made.asm else of_nvidia(made, log.getvalue())


def of_nvidia(made: Any, log: str) -> Compiled:
    """By what ptxas said, and by PTX; an access of a thread is `vector` times `bits` wide."""
    found = re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b", made.asm["ptx"])
    widths = [int(vector or 1) * int(bits) for vector, bits in found]
    return Compiled(
        registers=first(r"Used (\d+) registers", log),
        spilled=first(r"(\d+) bytes spill stores", log) + first(r"(\d+) bytes spill loads", log),
        shared=made.metadata.shared,
        narrow=sum(width <= 32 for width in widths),
        tiny=sum(width <= 16 for width in widths),
        inexact=len(re.findall(r"\bfma\.rn|\.ftz\b|\.approx\b|\bdiv\.full\b", made.asm["ptx"])),
    )


def of_amd(made: Any) -> Compiled:
    text = made.asm["amdgcn"]
    spilled = sum(first(rf"\.{kind}gpr_spill_count:\s+(\d+)", text) for kind in "vs")
    return Compiled(first(r"\.vgpr_count:\s+(\d+)", text), spilled, made.metadata.shared)


def first(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler did not say {pattern!r}")
    return int(found[1])


def faults(gpu: str, variant: Variant, made: Compiled, before: list[int] | None) -> list[str]:
    """What is wrong with a compiled variant; `before`: the registers and narrow accesses that it had."""
    found = []
    if made.spilled:
        found.append(f"{made.spilled} bytes of registers spill")
    if made.shared > SHARED[gpu]:
        found.append(f"{made.shared} bytes of shared memory, and there are {SHARED[gpu]}")
    if made.tiny and not variant.narrow:
        found.append(f"{made.tiny} accesses of 8 or 16 bits")
    if made.inexact and variant.exact:
        found.append(f"{made.inexact} operations that fuse, flush or approximate")
    if before and made.registers > SLACK * before[0]:
        found.append(f"{made.registers} registers, there were {before[0]}")
    if before and made.narrow > before[1]:
        found.append(f"{made.narrow} accesses of 32 bits and less, there were {before[1]}")
    return found


def check(file: str, variant: Variant, gpu: str, table: dict[str, dict[str, list[int]]]) -> dict[str, Any]:
    """Compile a variant for a GPU: a row of the gate's table."""
    row = {"file": file, "variant": variant.name, "gpu": gpu}
    try:
        made = compile_for(gpu, variant)
    except Exception as error:
        return {**row, "faults": [f"does not compile: {type(error).__name__}: {str(error).strip()[:300]}"]}
    before = table.get(f"{file}: {variant.name}", {}).get(gpu)
    return {**row, **made._asdict(), "faults": faults(gpu, variant, made, before)}


def table_file(version: str) -> Path:
    """The registers and narrow accesses of every variant on every GPU, under a version of triton."""
    return FOLDER / f"registers-{version}.json"


def read_table(version: str) -> dict[str, dict[str, list[int]]]:
    file = table_file(version)
    return json.loads(file.read_text()) if file.exists() else {}


def jobs() -> Iterator[tuple[str, Variant, str]]:
    for file in kernel_files():
        for variant in variants_of(file):
            for gpu in GPUS:
                yield file, variant, gpu
    for variant in variants_of(PLANTED):
        yield PLANTED, variant, "sm_80"


def compile_all(processes: int = 2) -> list[dict[str, Any]]:
    """The rows of all jobs, in their order, from processes that compile and do not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory(prefix="thriftlab-") as cache:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, str(number), str(processes)],
                env={**environment, "TRITON_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True,
            )
            for number in range(processes)
        ]  # fmt: skip
        said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a process that compiles kernels has failed; its traceback is above")
    shares = [[json.loads(line) for line in lines.splitlines()] for lines in said]
    return [shares[i % processes][i // processes] for i in range(sum(map(len, shares)))]


def main(number: str, processes: str) -> None:
    import triton

    table = read_table(triton.__version__)
    for i, job in enumerate(jobs()):
        if i % int(processes) == int(number):
            print(json.dumps(check(*job, table)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
