"""The gate: it compiles for four GPUs without one, and refuses what it should."""

import json

import pytest

from thriftlab.kernels import gate, variant
from thriftlab.launch import bench_kernels
from thriftlab.launch.cli import main

GOOD = gate.Compiled(registers=64, spilled=0, shared=1024, narrow=8)


@pytest.mark.slow
def test_every_variant_passes_on_every_gpu(monkeypatch, capsys):
    """What continuous integration asks: compiled anew, in the two processes of the command."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # of this process's tests, and of nothing that compiles
    assert main(["bench", "kernels", "--compile-only"]) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "!255" in said.splitlines()[-1], "the planted kernel spills"
    kinds = {line.split(":")[0] for line in said.splitlines()[2:]}
    assert kinds == {*gate.kernel_files(), "planted"}
    assert said.count("!") == 1 and all(gpu in said for gpu in gate.GPUS)


def some(**values):
    return variant.Variant(**{"name": "some", "kernel": None, "arguments": {}, **values})


@pytest.mark.parametrize(("made", "wanted", "says"), [
    (GOOD, some(), []),
    (GOOD._replace(spilled=4), some(), ["4 bytes of registers spill"]),
    (GOOD._replace(shared=164 * 1024), some(), ["167936 bytes of shared memory, and there are 166912"]),
    (GOOD._replace(tiny=2), some(), ["2 accesses of 8 or 16 bits"]),
    (GOOD._replace(tiny=2), some(narrow=True), []),
    (GOOD._replace(inexact=1), some(), []),
    (GOOD._replace(inexact=1), some(exact=True), ["1 operations that fuse, flush or approximate"]),
    (GOOD._replace(registers=70), some(), []),
    (GOOD._replace(registers=71), some(), ["71 registers, there were 64"]),
    (GOOD._replace(narrow=9), some(), ["9 accesses of 32 bits and less, there were 8"]),
])  # fmt: skip
def test_what_is_refused(made, wanted, says):
    assert gate.faults("sm_80", wanted, made, [64, 8]) == says


def test_the_limit_is_the_gpus():
    large = GOOD._replace(shared=200 * 1024)
    assert {gpu: len(gate.faults(gpu, some(), large, None)) for gpu in gate.GPUS} == {
        "sm_80": 1, "sm_90": 0, "sm_100": 0, "gfx942": 1,
    }  # fmt: skip


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def variant_of(file, name):
    return next(variant for variant in gate.variants_of(file) if variant.name == name)


@pytest.mark.slow
def test_what_is_read_from_a_compiled_kernel(fresh):
    """scale_add is a product and a sum, so it shows whether they are fused, and how wide its accesses are."""
    wide, any_ = (variant_of("norm_rows", f"scale_add{told}") for told in ("", ", rows that begin anywhere"))
    made = gate.compile_for("sm_90", wide)
    assert made.inexact > 0 and made.spilled == made.tiny == 0 and 16 <= made.registers <= 64
    assert gate.compile_for("sm_90", wide._replace(exact=True)).inexact == 0
    assert gate.compile_for("sm_90", any_).narrow > 2 * made.narrow
    assert gate.compile_for("gfx942", wide).registers > 8


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_a_fault(fresh):
    wrong = variant_of("norm_rows", "norms")
    row = gate.check("norm_rows", wrong._replace(arguments={**wrong.arguments, "SHORT": 3}), "sm_80", {})
    assert row["faults"][0].startswith("does not compile")


ROW = {"file": "some", "variant": "kernel", "gpu": "sm_80", **GOOD._asdict(), "faults": []}
PLANTED = {**ROW, "file": gate.PLANTED, "faults": ["9 bytes of registers spill"]}


@pytest.mark.parametrize(("rows", "says"), [
    ([{**ROW, "faults": ["2 registers, there was 1"]}, PLANTED], "some: kernel, sm_80: 2 registers, there was 1"),
    ([ROW, {**PLANTED, "faults": []}], "the planted kernel, whose registers spill, was not refused"),
    ([ROW], "the planted kernel, whose registers spill, was not refused"),
    ([ROW, {**ROW, "variant": "new"}, PLANTED], "nothing is known of the registers of some: new;"),
    ([PLANTED], "gone are some: kernel;"),
])  # fmt: skip
def test_the_command_says_what_is_wrong_and_fails(rows, says, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_kernels, "compile_all", lambda: rows)
    monkeypatch.setattr(gate, "FOLDER", tmp_path)
    gate.table_file(bench_kernels.TRITON).write_text('{"some: kernel": {"sm_80": [64, 8]}}')
    assert main(["bench", "kernels", "--compile-only"]) == 1
    assert says in capsys.readouterr().err


def test_registers_are_written_and_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_kernels, "compile_all", lambda: [ROW, {**ROW, "gpu": "gfx942", "registers": 9}, PLANTED])
    monkeypatch.setattr(gate, "FOLDER", tmp_path)
    assert main(["bench", "kernels", "--compile-only"]) == 0
    assert "compared with nothing" in capsys.readouterr().out
    assert main(["bench", "kernels", "--compile-only", "--write-registers", "--out", str(tmp_path / "rows.json")]) == 0
    assert gate.read_table(bench_kernels.TRITON) == {"some: kernel": {"sm_80": [64, 8], "gfx942": [9, 8]}}
    assert main(["bench", "kernels", "--compile-only"]) == 0
    assert json.loads((tmp_path / "rows.json").read_text())[0] == ROW
