"""What a run leaves behind: lines that survive a kill, a record that betrays a flipped bit, its provenance."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from thriftlab.data import files
from thriftlab.train.loop import summary
from thriftlab.train.records import machine, record
from thriftlab.train.records.record import (
    MetricsWriter,
    Record,
    RecordError,
    provenance,
    read_metrics,
    read_record,
    write_json,
    write_record,
)
from thriftlab.train.records.speed import mfu, peak_flops


def write_lines(path: Path, steps, resume_step=None) -> None:
    writer = MetricsWriter(path, resume_step)
    for step in steps:
        writer.write({"step": step, "loss": step / 3})
        if step % 4 == 0:
            writer.write({"step": step, "eval": {"loss": step / 7}})
    writer.close()


# ---------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("tail", [b"", b'{"step": 11, "lo', b"{}"])
@pytest.mark.parametrize("resume", [0, 3, 4, 10])
def test_interrupted_and_resumed_is_the_unbroken_file(tmp_path, resume, tail):
    unbroken, broken = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_lines(unbroken, range(1, 21))
    write_lines(broken, range(1, 11))
    with open(broken, "ab") as file:
        file.write(tail)
    write_lines(broken, range(resume + 1, 21), resume_step=resume)
    assert broken.read_bytes() == unbroken.read_bytes()


def test_without_a_step_the_file_starts_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, range(5))
    write_lines(path, range(2))
    assert [line["step"] for line in read_metrics(path)] == [0, 0, 1]
    write_lines(tmp_path / "new.jsonl", [1], resume_step=7)
    assert len(read_metrics(tmp_path / "new.jsonl")) == 1


def test_every_line_is_out_when_write_returns_and_a_torn_one_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": float("nan"), "deep": {"list": [float("inf"), 1.5]}})
    assert read_metrics(path) == [{"step": 1, "loss": None, "deep": {"list": [None, 1.5]}}]
    writer.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 2}')
    assert len(read_metrics(path)) == 1


def test_damage_inside_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    for read in (read_metrics, lambda path: MetricsWriter(path, 3)):
        with pytest.raises(RecordError, match=r"metrics.jsonl, line 2 is damaged"):
            read(path)
    assert path.read_text().count("\n") == 3
    with pytest.raises(RecordError, match="missing"):
        read_metrics(tmp_path / "nothing.jsonl")


# ----------------------------------------------------------------------------------------------------------- record

RECORD = {"status": "done", "results": {"loss": 1 / 3, "nan": float("nan")}, "note": 'é"', "memory": [1, 2**70]}


def test_a_record_comes_back(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", range(3))
    write_record(tmp_path, RECORD)
    found = read_record(tmp_path / "record.json")
    digest = hashlib.sha256((tmp_path / "metrics.jsonl").read_bytes()).hexdigest()
    assert found == {**RECORD, "results": {"loss": 1 / 3, "nan": None}, "files": {"metrics.jsonl": digest}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "record.json"]
    (tmp_path / "code.diff").mkdir()  # of somebody else: no file of the run
    write_record(tmp_path, RECORD)
    assert read_record(tmp_path / "record.json") == found


@pytest.mark.parametrize("name", ["record.json", "metrics.jsonl"])
def test_any_flipped_bit_is_found(tmp_path, name):
    write_lines(tmp_path / "metrics.jsonl", range(3))
    write_record(tmp_path, RECORD)
    path = tmp_path / name
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(RecordError, match=f"{name} is .*run again"):
            read_record(tmp_path / "record.json")


def test_the_summary_of_a_run_whose_loss_is_not_finite(tmp_path):
    """As it comes from the run, and as it is read when the same command is given again."""
    results = {"loss": float("nan"), "bits_per_byte": float("inf")}
    entry = {**RECORD, "config": {"out": str(tmp_path)}, "results": results, "speed": {"tokens_per_second": None},
             "budget": {"steps": 1, "tokens": 8, "seconds": 1.0}, "memory": {"state_bytes": 0}}  # fmt: skip
    write_record(tmp_path, entry)
    first, again = summary(entry), summary(read_record(tmp_path / "record.json"))
    assert first == again and first.startswith("held-out loss not finite nats/token, not finite bits/byte\n")


def test_the_seal_protects_every_byte(tmp_path):
    write_record(tmp_path, RECORD)
    path = tmp_path / "record.json"
    for changed in (path.read_bytes().replace(b"  ", b"\t"), path.read_bytes() + b"\n"):
        path.write_bytes(changed)
        with pytest.raises(RecordError, match="damaged"):
            read_record(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b'{"sha256": 1}', b"\xff\xfe"])
def test_what_is_no_record_is_refused(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(RecordError, match="record.json is damaged"):
        read_record(tmp_path / "record.json")


ODD_LINES = [b"7", b"null", b'"step"', b"[1]", b"{}", b'{"step": null}', b'{"step": "4"}', b'{"step": 1.5}',
             b'{"step": true}', b"[" * 100_000, b"\xff"]  # fmt: skip


@pytest.mark.parametrize("line", ODD_LINES, ids=lambda line: repr(line[:16]))
def test_a_line_that_is_no_line_of_metrics_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n" + b'{"step": 2}\n')
    for read in (read_metrics, lambda path: MetricsWriter(path, resume_step=2)):
        with pytest.raises(RecordError, match="metrics.jsonl, line 2 is damaged"):
            read(path)


@pytest.mark.parametrize("value", ["name", 7, True, None, [], {"../x": ""}, {"": ""}])
def test_a_record_vouches_for_the_files_of_a_run_alone(tmp_path, value):
    """Sealed by somebody who knows how to."""
    (tmp_path / "record.json").write_bytes(files.seal({**files.finite(RECORD), "files": value}))
    with pytest.raises(RecordError, match="record.json is damaged .*names other files than metrics.jsonl, config.json"):
        read_record(tmp_path / "record.json")


def test_a_missing_record_says_that_the_run_is_not_done(tmp_path):
    with pytest.raises(RecordError, match="has not finished"):
        read_record(tmp_path / "record.json")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "config.json", {"seed": 1, "lr": float("inf")})
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1, "lr": None}
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_json(tmp_path / "config.json", {"seed": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


DONE = Path(__file__).parents[1] / "formats" / "runs" / "done" / "record.json"


def test_a_record_by_its_fields_is_the_file_key_by_key():
    tree = read_record(DONE)
    entry = Record.from_json(tree)
    assert json.dumps(entry.to_json()) == json.dumps(tree)
    assert entry.results.loss == tree["results"]["loss"] and entry.model.layers == tree["model"]["layers"]


def test_a_record_that_is_older_than_a_key_is_read():
    tree = read_record(DONE)
    del tree["remarks"], tree["speed"], tree["memory"]["buffer_bytes"], tree["files"]
    entry = Record.from_json(tree)
    assert entry.remarks is None and entry.speed is None and entry.memory.buffer_bytes is None
    assert "files" not in entry.to_json()


# ------------------------------------------------------------------------------------------------------- provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository of its own with train/records/record.py in it, from which the module believes to be running."""
    root = tmp_path / "checkout"
    (root / "train" / "records").mkdir(parents=True)
    shutil.copy(record.__file__, root / "train" / "records" / "record.py")
    git(root, "init", "-q")
    monkeypatch.setattr(record, "__file__", str(root / "train" / "records" / "record.py"))
    return root


def test_a_clean_checkout_is_its_commit(checkout, tmp_path):
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    found = provenance(tmp_path / "out")
    assert found["commit"] == git(checkout, "rev-parse", "HEAD")
    assert found["diff_sha256"] is None and not (tmp_path / "out").exists()


def test_a_dirty_checkout_can_be_rebuilt_from_commit_and_diff(checkout, tmp_path):
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    with open(checkout / "train" / "records" / "record.py", "a") as file:
        file.write("# changed\n")
    (checkout / "train" / "records" / "new metöd.py").write_text("x = 1\n")
    (checkout / "secret.txt").write_text("not code")
    found = provenance(tmp_path)
    diff = (tmp_path / "code.diff").read_bytes()
    assert found["diff_sha256"] == hashlib.sha256(diff).hexdigest() == provenance()["diff_sha256"]
    assert b"not code" not in diff

    git(tmp_path, "clone", "-q", str(checkout), "copy")
    git(tmp_path / "copy", "apply", str(tmp_path / "code.diff"))
    for name in ("record.py", "new metöd.py"):
        copied, original = (root / "train" / "records" / name for root in (tmp_path / "copy", checkout))
        assert copied.read_bytes() == original.read_bytes()


def test_installed_inside_somebody_elses_repository_has_no_commit(checkout):
    (checkout / "mine.py").write_text("")
    git(checkout, "add", "mine.py")
    git(checkout, "commit", "-qm", "theirs")
    found = provenance()
    assert found["commit"] is None and found["diff_sha256"] is None
    assert found["versions"]["thriftlab"]


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] is None


def test_provenance_says_what_ran_and_not_whose_machine():
    found = provenance()
    json.dumps(found, allow_nan=False)
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_bytes"] > 2**20
    assert found["machine"].keys() == {"system", "cpu", "cores", "threads", "memory_bytes", "gpus"}


OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  (dvs-builder)"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12.3.0"


def test_with_gpus_it_says_what_they_are_driven_by(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    for text, version in ((OPEN, "570.86.10"), (CLOSED, "535.129.03")):
        machine.DRIVER.write_text(text)
        found = provenance()["machine"]
        said = {key: found[key] for key in ("gpus", "driver", "cuda", "nccl", "matmul")}
        assert said == dict(gpus=["NVIDIA L4"], driver=version, cuda="12.6", nccl="2.27.3", matmul="fp32")
    machine.DRIVER.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["machine"]["driver"] is None
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 550.54.15\necho 550.54.15\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    torch.set_float32_matmul_precision("high")
    try:
        found = provenance()["machine"]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (found["driver"], found["matmul"]) == ("550.54.15", "tf32")


# ------------------------------------------------------------------------------------------------- memory and speed


PEAK = """
import torch
from thriftlab.train.records.speed import peak_bytes
before = peak_bytes()
block = torch.ones(2**28, dtype=torch.uint8)
print(before, peak_bytes())
"""


@pytest.mark.slow
def test_the_peak_is_this_process_own():
    held = torch.ones(2**30, dtype=torch.uint8)
    before, after = map(int, subprocess.check_output([sys.executable, "-c", PEAK]).split())
    assert 2**25 < before < held.nbytes  # not what the parent had
    assert 2**28 - 2**24 < after - before < 2**28 + 2**26


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("NVIDIA GH200 144G HBM3e", 989.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA GB300", 2500e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("AMD Instinct MI355X", 2516.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("something new", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert peak_flops(name) == peak


def test_utilisation(monkeypatch):
    assert mfu(1e4, 1e9, "cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert mfu(156e3, 1e9, torch.device("cuda", 0)) == pytest.approx(0.5)
    assert mfu(156e3, 1e9, "cuda", devices=2) == pytest.approx(0.25)
