"""The part of a report that studies of repetition have, on runs written from planted losses."""

import json
import math
import statistics

import pytest

from tests.tools.studies import make_record, write_plan, write_run
from thriftlab.launch.report import repetition
from thriftlab.launch.report.page import markdown, write_report
from thriftlab.launch.report.publish import publish
from thriftlab.launch.report.results import read_study
from thriftlab.train.records.record import write_record

A, ALPHA = 0.9, 0.03
WIDTHS = {"control": 64, "control-32": 32, "control-48": 48, "control-96": 96}
JITTER = [0.001, -0.0015, 0.0005]  # of the log of the loss, by seed; its mean is 0


def blocks(dim):
    return 2 * dim * (4 * dim + 3 * (2 * dim))  # two layers, four square matrices, SwiGLU twice as wide


def law(n):
    return math.exp(A - ALPHA * math.log(n))


def write(folder, arm, loss, asked, dim=64, pool=None, probes=None, **config):
    """Runs of three seeds, whose losses differ by the jitter of the seed."""
    for seed, jitter in enumerate(JITTER):
        value = loss * math.exp(jitter)
        record = make_record("adamw", seed, value)
        model = {"preset": None, "dim": dim, "layers": 2, "heads": 4, "hidden": 2 * dim}
        record["config"] |= {"model": model, "data": {"repetition": asked} if asked else {}, **config}
        record["results"]["sources"] = {"text": {"loss": value}}
        if pool is not None:
            record["results"]["sources"]["repeated"] = {"loss": pool}
            record["data"]["sources"] = {"repeated": {"unique": 100, "tokens": 100 * asked["repeats"]}}
        record["probes"] = probes
        del record["method"], record["seed"]
        write_run(folder, arm, seed, value, **record)


def copying(value):
    return {"copy_loss": {"held_out": value}, "prefix_matching": {"mean": 1 / value}}


@pytest.fixture
def folder(tmp_path):
    fresh = {"fraction": 0.5, "repeats": 100, "control": "fresh"}
    for arm, dim in WIDTHS.items():
        write(tmp_path, arm, law(blocks(dim)), fresh, dim, probes=copying(64 / dim))
    full, half = law(blocks(64)), law(blocks(64)) + 0.08
    write(tmp_path, "cured-32", 5.0, fresh, 32, signal={"name": "linupper"})
    write(tmp_path, "cured-unique", 5.0, fresh | {"control": "unique_only"}, signal={"name": "linupper"})
    write(tmp_path, "unique", half, fresh | {"control": "unique_only"})
    write(tmp_path, "few", full, {"fraction": 0.5, "repeats": 3}, pool=1.6)
    size = blocks(64) * 0.5
    write(tmp_path, "some", law(size), {"fraction": 0.5, "repeats": 30}, pool=1.0, probes=copying(64 / 40))
    write(tmp_path, "many", half + 0.2, {"fraction": 0.5, "repeats": 100}, pool=0.3, probes=copying(5.0))
    write(tmp_path, "cured", half, {"fraction": 0.5, "repeats": 100}, pool=0.9, signal={"name": "linupper"})
    write(tmp_path, "lonely", full, {"fraction": 0.1, "repeats": 10}, pool=1.2)
    arms = ["control", "cured-32", "cured-unique", *[*WIDTHS][1:], "unique", "few", "some", "many", "cured", "lonely"]
    write_plan(tmp_path, arms, range(3), question="Repeats?")
    return tmp_path


def rewrite(run, **results):
    """Seals a run again whose files have changed, with some other results."""
    record = json.loads((run / "record.json").read_text())
    record["results"] |= results
    (run / "record.json").unlink()
    write_record(run, {key: value for key, value in record.items() if key not in ("files", "sha256")})


def rows_of(folder):
    name, (head, rows), note = repetition.section(read_study(folder))
    assert name == "Repetition"
    return {row[0][0]: dict(zip(head, row, strict=True)) for row in rows}, note


def test_a_size_and_its_interval_are_those_of_the_planted_law(folder):
    rows, note = rows_of(folder)
    value, interval = rows["some"]["size, by loss"]
    assert value == "0.50" and interval == "95 %: 0.50 to 0.50"  # a jitter that all runs of a seed share cancels
    assert rows["few"]["size, by loss"][0] == "1.00"
    smallest = blocks(32) / blocks(64)
    assert rows["many"]["size, by loss"] == (f"off-scale, below {smallest:.2f}",)
    assert f"ln L = {A:.4f} - {ALPHA:.4f} ln N" in note and f"{blocks(48):,}" in note
    for arm in WIDTHS:  # the controls are not held against themselves
        assert rows[arm]["size, by loss"] == ("–",) and rows[arm]["size, by copying"] == (
            "–",
            f"{64 / WIDTHS[arm]:.3f}",
        )


def test_the_interval_of_a_size_is_students_on_the_logarithm(folder):
    noise = [0.002, -0.001, 0.0005]
    for seed, extra in enumerate(noise):
        rewrite(folder / "few" / f"seed-{seed}", loss=law(blocks(64)) * math.exp(JITTER[seed] + extra))
    logs = [-extra / ALPHA for extra in noise]
    half = 4.302653 * statistics.stdev(logs) / math.sqrt(3)
    low, high = (math.exp(statistics.fmean(logs) + side * half) for side in (-1, 1))
    rows, _ = rows_of(folder)
    assert rows["few"]["size, by loss"] == (f"{math.exp(statistics.fmean(logs)):.2f}", f"95 %: {low:.2f} to {high:.2f}")


def test_a_size_by_a_probe_is_read_off_between_the_controls(folder):
    rows, _ = rows_of(folder)
    part = (64 / 40 - 64 / 48) / (64 / 32 - 64 / 48)
    expected = math.exp(math.log(blocks(48)) + part * (math.log(blocks(32)) - math.log(blocks(48)))) / blocks(64)
    assert rows["some"]["size, by copying"] == (f"{expected:.2f}", "1.600")
    assert rows["many"]["size, by copying"] == ("off-scale, below 0.25", "5.000")
    assert rows["many"]["size, by prefix matching"] == ("off-scale, below 0.25", "0.200")
    assert rows["few"]["size, by copying"] == ("–",)


def test_a_rise_is_measured_from_the_lowest_evaluation(folder):
    rows, _ = rows_of(folder)
    assert rows["many"]["risen since its lowest"] == ("0.0000",)
    for seed, low in enumerate([0.5, 0.25, 0.75]):
        path = folder / "many" / f"seed-{seed}" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        last = next(line for line in reversed(lines) if "eval" in line)
        next(line for line in lines if "eval" in line)["eval"]["loss"] = last["eval"]["loss"] - low
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        rewrite(path.parent)
    rows, _ = rows_of(folder)
    assert rows["many"]["risen since its lowest"] == ("0.5000",)


def test_damage_is_told_with_its_word(folder):
    rows, _ = rows_of(folder)
    half, full = law(blocks(64)) + 0.08, law(blocks(64))
    shift = math.fsum(map(math.exp, JITTER)) / 3
    assert rows["many"]["loss minus that without the repeats"][0] == f"{0.2 * shift:+.4f}"
    assert rows["many"]["harm index"] == (f"{0.2 / 0.08:+.2f}",) and rows["many"]["repeats were"] == ("harmful",)
    assert rows["few"]["harm index"] == ("-1.00",) and rows["few"]["repeats were"] == ("useful",)
    assert rows["cured"]["repeats were"] == ("wasted",) and rows["cured"]["harm index"] in [("+0.00",), ("-0.00",)]
    assert rows["lonely"]["repeats were"] == ("–",)  # its control without repeats is missing
    assert rows["unique"]["repeats were"] == ("–",) and half > full
    assert rows["many"]["loss of the pool"][0].startswith("0.3000")


def test_no_index_where_less_text_costs_nothing(folder):
    for seed in range(3):
        run = folder / "unique" / f"seed-{seed}" / "record.json"
        run.unlink()
        (run.parent / "metrics.jsonl").unlink()
        run.parent.rmdir()
    write(folder, "unique", law(blocks(64)), {"fraction": 0.5, "repeats": 100, "control": "unique_only"})
    rows, _ = rows_of(folder)
    assert rows["many"]["harm index"] == ("–",) and rows["many"]["repeats were"] == ("harmful",)


def test_fewer_than_four_sizes_give_no_size(folder):
    plan = [arm for arm in ("control", "control-32", "control-48", "unique", "few", "many")]
    write_plan(folder, plan, range(3), question="Repeats?")
    rows, note = rows_of(folder)
    assert rows["many"]["size, by loss"] == ("–",) and "No size by loss: a law of size takes 4 sizes" in note
    assert rows["many"]["repeats were"] == ("harmful",)


def test_the_table_and_the_picture_are_part_of_page_and_record(folder, tmp_path_factory):
    study = read_study(folder)
    page = write_report(study).read_text()
    assert "<h2>Repetition</h2>" in page and "Loss against exposures" in page
    assert "| many |" in markdown(study)
    target = publish(study, tmp_path_factory.mktemp("kept") / "here")
    assert (target / "loss-against-exposures.svg").exists()
    lines = {(line["arm"], line["seed"]): line for line in map(json.loads, (target / "runs.jsonl").open())}
    assert lines["many", 0]["losses"]["repeated"] == 0.3
    assert lines["many", 0]["used"] == {"repeated": {"unique": 100, "tokens": 10_000}}
    assert "losses" not in lines["control", 0] and lines["control", 0]["probes"]["prefix_matching"]["mean"] == 1.0


def test_a_study_without_repetition_has_no_such_part(tmp_path):
    for arm in ("adamw", "frugal"):
        for seed in range(2):
            write_run(tmp_path, arm, seed, 3.0)
    write_plan(tmp_path, ["adamw", "frugal"], range(2))
    study = read_study(tmp_path)
    assert repetition.section(study) is None and repetition.picture(study) is None
    assert "Repetition" not in markdown(study)
