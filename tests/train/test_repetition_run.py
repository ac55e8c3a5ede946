"""Runs whose data are repeated: resumed, on two ranks, with a signal, with reference losses, and what they record."""

import numpy as np
import pytest
import torch

from tests.tools import gang
from tests.tools.runs import LONG, assert_same, run_status, stop_at, traces
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import ConfigError, DataError
from thriftlab.data.loader import gather
from thriftlab.data.shards import open_dataset
from thriftlab.train import loop
from thriftlab.train.build import make_plan
from thriftlab.train.config.parse import load
from thriftlab.train.config.schema import RunConfig, counted, fingerprint
from thriftlab.train.loop import run
from thriftlab.train.records.record import Record, read_metrics, read_record
from thriftlab.train.signals import reference

REPEATED = {"repetition": {"fraction": 0.5, "repeats": 4}}
KINDS = {
    "sequence": REPEATED,
    "document": {"sequence_length": 16, "repetition": {"fraction": 0.5, "pool_size": 1, "unit": "document"}},
    "reshuffled": {"reshuffle": "documents"},
}


def tokens_of(record):
    """That were trained on, by source."""
    return {name: used["tokens"] for name, used in record["data"]["sources"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_unbroken(tiny_data, tmp_path, kind):
    sections = {**LONG, "data": {**tiny_config(tiny_data, tmp_path).data.model_dump(), **KINDS[kind]}}
    whole = run(tiny_config(tiny_data, tmp_path / "whole", **sections))
    config = tiny_config(tiny_data, tmp_path / "broken", **sections)
    for step in (2, 17):
        stop_at(config, step)
    run(config)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))
    assert ("repeated" in whole["data"]["sources"]) == (kind != "reshuffled")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sequence", "reshuffled"])
def test_two_ranks_are_one(tiny_data, tmp_path, kind):
    one, two = (
        tiny_config(tiny_data, tmp_path / name, data=KINDS[kind], signal={"name": "linupper"})
        for name in ("one", "two")
    )
    alone = run(one)
    gang.ranks(2, run_status, two.model_dump())
    both = read_record(tmp_path / "two" / "record.json")
    assert both["world"] == 2 and both["fingerprint"] == alone["fingerprint"] and both["data"] == alone["data"]
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for a, b in zip(*lines, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
            assert a["signal"]["share"] == pytest.approx(b["signal"]["share"], abs=2e-5)
        if "eval" in a:
            assert a["eval"]["sources"]["plain"]["loss"] == pytest.approx(
                b["eval"]["sources"]["plain"]["loss"], abs=2e-5
            )
            assert a["eval"]["sources"].keys() == b["eval"]["sources"].keys()


def test_the_pool_is_a_source(tiny_data, tmp_path, capsys):
    """In weight shares, tokens by source, held-out lines; not in the held-out loss."""
    config = tiny_config(tiny_data, tmp_path / "out", data=REPEATED, signal={"name": "linupper"})
    record = run(config)
    printed = capsys.readouterr().err
    assert "repeated         32  50.00%      8          4   1,024" in printed
    names = ["plain", "noisy", "repeated"]
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert all(list(line["signal"]["share"]) == names for line in lines if "signal" in line)
    assert list(record["results"]["sources"]) == names
    assert tokens_of(record)["repeated"] == 32 * 32 and sum(tokens_of(record).values()) == 8 * 8 * 32
    unique = {name: used["unique"] for name, used in record["data"]["sources"].items()}
    assert list(unique) == names and unique["repeated"] == 8 * 32 < min(unique["plain"], unique["noisy"])
    held_out = record["results"]["sources"]["plain"], record["results"]["sources"]["noisy"]
    total = sum(each["loss"] * each["tokens"] for each in held_out) / sum(each["tokens"] for each in held_out)
    assert record["results"]["loss"] == pytest.approx(total, abs=1e-12)
    assert record["results"]["sources"]["repeated"]["tokens"] == 8 * 32

    dataset = open_dataset(tiny_data)  # the pool: what the batches have in that source
    plan = make_plan(config, dataset, 8)
    rows = {}
    for step in range(8):
        batch = gather(plan, step)
        rows |= {int(i): t for i, t, s in zip(batch.sample, batch.tokens, batch.source, strict=True) if s == 2}
    tokens = torch.stack(list(rows.values()))
    spelled = torch.from_numpy(dataset.tokenizer.token_bytes)[tokens[:, 1:]].sum()
    assert len(rows) == 8 and record["results"]["sources"]["repeated"]["bytes"] == spelled
    run(config)
    assert "repeated" not in capsys.readouterr().err  # said once


def test_the_loss_of_the_pool_is_that_of_its_rows(tiny_data, tmp_path, monkeypatch):
    found = {}
    measure = loop.measure

    def and_by_hand(run, *rest):
        if "loss" not in found:
            ids = run.plan.repetition.ids(np.arange(8))
            corpus = run.plan.repetition.source
            tokens = torch.from_numpy(np.stack([corpus[i] for i in ids.tolist()]))
            with torch.no_grad():
                found["loss"] = run.model(tokens[:, :-1], tokens[:, 1:], None).mean().item()
        return measure(run, *rest)

    monkeypatch.setattr(loop, "measure", and_by_hand)
    record = run(tiny_config(tiny_data, tmp_path / "out", data=REPEATED))
    assert record["results"]["sources"]["repeated"]["loss"] == pytest.approx(found["loss"], abs=1e-5)


def test_controls_have_their_rows(tiny_data, tmp_path):
    dataset = open_dataset(tiny_data)
    records = {}
    for control in (None, "fresh", "unique_only"):
        section = {"repetition": {**REPEATED["repetition"], "control": control}}
        config = tiny_config(tiny_data, tmp_path / str(control), data=section)
        records[control] = run(config)
        plan = make_plan(config, dataset, 8)
        seen = [gather(plan, step).sample.tolist() for step in range(records[control]["budget"]["steps"])]
        flat = sum(seen, [])
        assert len(set(flat)) == len(flat) - 24 * (control is None)
    assert [records[c]["budget"]["steps"] for c in (None, "fresh", "unique_only")] == [8, 8, 4]
    assert records["unique_only"]["budget"]["tokens"] == 4 * 8 * 32
    assert (
        "repeated" not in records["fresh"]["results"]["sources"]
        and "repeated" not in records["fresh"]["data"]["sources"]
    )
    lines = read_metrics(tmp_path / "unique_only" / "metrics.jsonl")
    rates = [line["lr"] for line in lines if "lr" in line]  # the schedule ends with the shorter run
    assert len(rates) == 4 and min(rates[1:]) == rates[-1]


def test_held_out_losses_of_signals_take_that_of_the_pool(tiny_data, tmp_path):
    record = run(tiny_config(tiny_data, tmp_path / "out", data=REPEATED, signal={"name": "famo", "every": 2}))
    assert list(record["signal"]["alpha"]) == ["plain", "noisy", "repeated"]


def test_reference_losses_are_found_by_window(tiny_data, tmp_path, monkeypatch):
    dataset = open_dataset(tiny_data)
    about = {"data": dataset.fingerprint, "sequence_length": 32, "files": {}}
    monkeypatch.setattr(reference, "read_reference", lambda folder: about)
    size = {}
    for p, name in enumerate(dataset.sources):
        size[name] = len(dataset.windows(name, "train", 32))
        losses = 0.001 * np.arange(size[name])[:, None] + np.full((1, 32), p)
        np.save(tmp_path / f"{name}.npy", losses.astype(np.float32))
    for section in (REPEATED, {}):
        plan = make_plan(tiny_config(tiny_data, tmp_path, data=section), dataset, 8)
        batch = gather(plan, 2)
        found = reference.open_reference(tmp_path, dataset, plan, verify=False)(batch)
        plain = size["plain"]
        expected = [1 + 0.001 * (i - plain) if i >= plain else 0.001 * i for i in batch.sample.tolist()]
        assert found.mean(1).tolist() == pytest.approx(expected, abs=1e-5)
    for kind in ("document", "reshuffled"):
        config = tiny_config(tiny_data, tmp_path, data={**KINDS[kind], "sequence_length": 32}, budget={"tokens": 9000})
        about["sequence_length"] = 32
        with pytest.raises(reference.ReferenceLossError, match="cuts others from the documents"):
            reference.open_reference(tmp_path, dataset, make_plan(config, dataset, 30), verify=False)


# --------------------------------------------------------------------------------------------------- configuration


def test_configurations_without_repetition_are_as_they_were():
    assert counted(RunConfig())["data"] == {"sequence_length": 256, "sources": {}, "document_mask": False}
    assert RunConfig.model_validate(RunConfig().model_dump()) == RunConfig()
    on = load(
        RunConfig, ["data.repetition.fraction=0.1", "data.repetition.repeats=100", "data.repetition.control=fresh"]
    )
    assert counted(on)["data"]["repetition"]["fraction"] == 0.1
    assert RunConfig.model_validate(on.model_dump()) == on and fingerprint(on, "x") != fingerprint(RunConfig(), "x")
    anew = load(RunConfig, ["data.reshuffle=documents"])
    assert counted(anew)["data"]["reshuffle"] == "documents"


def test_old_records_are_read(tiny_data, tmp_path):
    entry = run(tiny_config(tiny_data, tmp_path / "out"))
    assert tokens_of(entry).keys() == {"plain", "noisy"} and sum(tokens_of(entry).values()) == 8 * 8 * 32
    del entry["data"]["sources"]
    assert Record.from_json(entry).data.sources is None


@pytest.mark.parametrize("words, message", [
    (["repeats=3"], "has no effect without data.repetition.fraction"),
    (["fraction=0.1"], "takes one of repeats, pool_size, pool_tokens; there is none"),
    (["fraction=0.1", "repeats=3", "pool_size=2"], "there is repeats and pool_size"),
    (["fraction=1.5", "repeats=3"], "data.repetition.fraction = '1.5' is not possible"),
    (["fraction=0.1", "repeats=3", "control=other"], "data.repetition.control = 'other'"),
    (["fraction=0.1", "repeats=3", "max_same_per_step=1", "spacing=clustered"], "clustered"),
])  # fmt: skip
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(RunConfig, [f"data.repetition.{word}" for word in words])
    assert "\n" not in str(error.value)


def test_repetition_and_reshuffling_are_not_both():
    with pytest.raises(ConfigError, match="reshuffle=documents has no effect with repetition"):
        load(RunConfig, ["data.repetition.fraction=0.1", "data.repetition.repeats=3", "data.reshuffle=documents"])


@pytest.mark.parametrize("section, message", [
    ({"fraction": 0.5, "repeats": 40}, "the pool of repeated data is empty: 0.5 of 64 units are 32"),
    ({"fraction": 0.01, "repeats": 1, "max_same_per_step": 1}, None),
])  # fmt: skip
def test_what_the_run_is_too_short_for(tiny_data, tmp_path, section, message):
    config = tiny_config(tiny_data, tmp_path / "out", data={"repetition": section})
    if message is None:
        assert make_plan(config, open_dataset(tiny_data), 8).drawn(64).tolist()[2] == 1
        return
    with pytest.raises(DataError, match=message):
        run(config)
    seconds = tiny_config(tiny_data, tmp_path / "out", data=REPEATED, budget={"tokens": None, "seconds": 5})
    with pytest.raises(DataError, match="needs a run of known length"):
        run(seconds)
