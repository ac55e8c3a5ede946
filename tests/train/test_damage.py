"""Whatever lies in a checkpoint or a manifest: what was written, or one error that a user can act on."""

import hashlib
import json
import random
import shutil
import warnings

import pytest
import torch

from tests.tools.mutations import altered, damaged
from thriftlab.data.errors import CheckpointError, DataError
from thriftlab.data.files import seal
from thriftlab.data.shards import open_dataset
from thriftlab.train.checkpoints.reader import latest, load
from thriftlab.train.checkpoints.writer import Writer
from thriftlab.train.records.record import MetricsWriter, RecordError, read_metrics, read_record, write_record

META = {"fingerprint": "feed", "counters": {"step": 1, "loss": float("nan")}, "optim": ((0.9, 0.999), torch.bfloat16)}


def write_checkpoint(folder):
    tensors = {"w": torch.arange(12.0).view(3, 4), "empty": torch.empty(0, 2), "scalar": torch.tensor(2.5)}
    Writer(folder, keep=1, background=False).save(1, {"model": tensors, "optim": {"m": torch.ones(5)}}, META)
    return folder / "step-00000001"


def read_damaged_checkpoints(folder, seed, rounds):
    """How many of the damaged ones were refused."""
    path = write_checkpoint(folder)
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    whole, draw, refused = load(path).tensors, random.Random(seed), 0
    for _ in range(rounds):
        name = draw.choice(sorted(files))
        changed = dict(files)
        if name.endswith("json") and draw.random() < 0.7:
            sums = json.loads(files["checksums.json"])
            del sums["sha256"]
            if name == "state.json":
                changed[name] = json.dumps(altered(files[name], draw)).encode()
            else:
                sums = altered(json.dumps(sums), draw)
            if draw.random() < 0.9 and isinstance(sums.get("files"), dict):  # by whom knows how to
                resum(sums["files"], changed, "state.json")
            changed["checksums.json"] = sealed(sums, changed["checksums.json"])
        else:
            changed[name] = damaged(files[name], draw)
            if draw.random() < 0.5 and name != "checksums.json":
                sums = {"files": json.loads(files["checksums.json"])["files"]}
                resum(sums["files"], changed, name)
                changed["checksums.json"] = seal(sums)
        for file, content in changed.items():
            (path / file).write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = latest(folder)
            tensors = found.tensors
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        if changed == files:
            assert all(torch.equal(tensors[g][k], whole[g][k]) for g in whole for k in whole[g])
    shutil.rmtree(path)
    return refused


def resum(sums, files, name):
    sums[name] = {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}


def sealed(value, otherwise):
    try:
        return seal(value)
    except ValueError:  # nan, which no file of ours can say
        return otherwise


def test_a_damaged_checkpoint_is_refused_or_what_it_was(tmp_path):
    assert read_damaged_checkpoints(tmp_path, 0, 300) > 200


def read_damaged_manifests(data, folder, seed, rounds):
    shutil.copytree(data, folder, dirs_exist_ok=True)
    (folder / ".verified.json").unlink(missing_ok=True)
    path, draw, refused = folder / "manifest.json", random.Random(seed), 0
    content = path.read_bytes()
    for _ in range(rounds):
        if draw.random() < 0.7:
            changed = json.dumps(altered(content, draw)).encode()
        else:
            changed = damaged(content, draw)
        path.write_bytes(changed)
        line = f"{hashlib.sha256(changed).hexdigest()}  manifest.json\n".encode()
        (folder / "manifest.sha256").write_bytes(line if draw.random() < 0.9 else damaged(line, draw))
        try:
            dataset = open_dataset(folder, verify=False)
            for source in dataset.sources:
                len(dataset.windows(source, "train", 16)), dataset.windows(source, "validation", 16).tail()
            assert dataset.tokenizer.delimiter >= 0
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
    return refused


def test_a_damaged_manifest_is_refused_or_what_it_says(tiny_data, tmp_path):
    assert read_damaged_manifests(tiny_data, tmp_path, 0, 300) > 150


def test_damaged_metrics_and_records_are_refused_by_name_or_what_they_say(tmp_path):
    draw, metrics, record = random.Random(0), tmp_path / "metrics.jsonl", tmp_path / "record.json"
    writer = MetricsWriter(metrics)
    for step in range(1, 5):
        writer.write({"step": step, "loss": 1 / step, "eval": {"loss": float("nan"), "sources": {"a": {"loss": 2.0}}}})
    writer.close()
    write_record(tmp_path, {"status": "done", "results": {"loss": 2.0}})
    lines, sealed = metrics.read_bytes().splitlines(keepends=True), record.read_bytes()
    (tmp_path / "metrics.jsonl").unlink()
    refused = 0
    for _ in range(400):
        number = draw.randrange(len(lines))
        odd = (
            json.dumps(altered(lines[number], draw)).encode() + b"\n"
            if draw.random() < 0.6
            else damaged(lines[number], draw)
        )
        metrics.write_bytes(b"".join([*lines[:number], odd, *lines[number + 1 :]]))
        try:
            assert all(line["step"] > -2 for line in read_metrics(metrics))
            MetricsWriter(metrics, resume_step=draw.randrange(1, 6)).close()
        except RecordError as error:
            assert f"{metrics}, line {number + 1} is damaged" in str(error) and "\n" not in str(error)
            refused += 1
        metrics.unlink()
        record.write_bytes(json.dumps(altered(sealed, draw)).encode() if draw.random() < 0.5 else damaged(sealed, draw))
        with pytest.raises(RecordError, match="record.json is damaged"):
            read_record(record)
    assert refused > 150
