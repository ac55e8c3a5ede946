"""What a report shows of probes: the table, the curves, and a cell for each head."""

import json
import re

import pytest
from matplotlib.figure import Figure

from tests.tools.studies import make_record, write_plan, write_run
from thriftlab.launch.report import page, probes, publish
from thriftlab.launch.report.figures import Picture
from thriftlab.launch.report.page import markdown
from thriftlab.launch.report.probes import probe_pictures
from thriftlab.launch.report.results import read_study
from thriftlab.train.records.record import write_record


def found(score, pool=None):
    return {
        "copy_loss": {"held_out": 3 * score, "random": 4.0, "curve": {"held_out": [4.0, score, score]}},
        "copy_ratio": {"held_out": score, "random": None},
        "prefix_matching": {"mean": score / 2, "max": score, "heads": [[score, 0.0, 0.125], [0.0, 0.0, 1.0]]},
        "pool_loss": pool,
    }


@pytest.fixture
def study(tmp_path):
    """Two arms of two seeds; only one arm has a pool, and a third was asked nothing."""
    write_plan(tmp_path, ["adamw", "frugal", "signsgd"], [0, 1])
    for arm, seed in [(arm, seed) for arm in ("adamw", "frugal", "signsgd") for seed in (0, 1)]:
        write_run(tmp_path, arm, seed, 2.5)
        if arm == "signsgd":
            continue
        out, pool = tmp_path / arm / f"seed-{seed}", 0.25 if arm == "frugal" else None
        lines = [
            {"step": step, "tokens": 10_000 * step, "seconds": 0.5 * step, "probes": found(0.5 + seed / 4, pool)}
            for step in (50, 100)
        ]
        with open(out / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        write_record(out, {**make_record(arm, seed, 2.5), "probes": found(0.5 + seed / 4, pool)})
    return read_study(tmp_path)


def rows_of(text, section):
    table = text.split(f"## {section}\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_has_what_was_found(study):
    head, _, *rows = rows_of(markdown(study), "Probes")
    assert head == [
        "arm", "copy loss", "copy loss, random", "copy ratio", "prefix matching, mean", "prefix matching, best head",
        "pool loss",
    ]  # fmt: skip
    assert rows[0] == [
        "adamw", "1.8750 ± 0.5303", "4.0000 ± 0.0000", "0.6250 ± 0.1768", "0.3125 ± 0.0884", "0.6250 ± 0.1768", "-",
    ]  # fmt: skip
    assert rows[1][-1] == "0.2500 ± 0.0000" and rows[2] == ["signsgd", *"------"]


def test_each_number_has_a_curve_and_each_head_a_cell(study):
    drawn = {picture.title: picture.svg for picture in probe_pictures(study)}
    assert list(drawn) == [
        "Copy loss", "Copy loss, random", "Copy ratio", "Prefix matching, mean", "Prefix matching, best head",
        "Pool loss", "Loss by copy", "Prefix matching by head",
    ]  # fmt: skip
    assert "frugal" in drawn["Pool loss"] and "adamw" not in drawn["Pool loss"]
    ids = re.findall(r'\bid="([^"]*)"', "".join(drawn.values()))
    assert len(ids) == len(set(ids))
    heads = drawn["Prefix matching by head"]
    assert re.findall(r">(\d\.\d\d)</text>", heads) == ["0.62", "0.00", "0.12", "0.00", "0.00", "1.00"] * 2
    assert "#0a0a0" not in heads and heads.count("opacity: 0.625") == 2 and "signsgd" not in heads


def test_a_cell_is_where_its_head_is(study, monkeypatch):
    axes = Figure().subplots()
    monkeypatch.setattr(probes, "render", lambda draw, *_: draw(axes))
    probes.by_head([(0, study.rows[0]), (1, study.rows[1])], "prefix_matching")
    cells = {patch.get_xy(): patch.get_alpha() for patch in axes.patches if patch.get_fill()}
    layers = [[0.625, 0.0, 0.125], [0.0, 0.0, 1.0]]
    heads = [(4 * arm + head, layer) for arm in (0, 1) for layer in (0, 1) for head in range(3)]
    assert cells == {(x, layer): layers[layer][x % 4] for x, layer in heads}


def test_the_page_and_what_is_kept_have_the_figures(study, tmp_path, monkeypatch):
    monkeypatch.setattr(page.figures, "pictures", lambda _: [Picture("Loss", "<svg />", "one")])
    monkeypatch.setattr(page, "probe_pictures", lambda _: [Picture("Loss by copy", "<svg />", "two")])
    text = page.write_report(study).read_text()
    assert text.count("<figure>") == 2 and text.index("one</figcaption>") < text.index("two</figcaption>")
    kept = publish.publish(study, tmp_path / "kept")
    assert {path.name for path in kept.glob("*.svg")} == {"loss.svg", "loss-by-copy.svg"}
    assert "![Loss by copy](loss-by-copy.svg)" in (kept / "report.md").read_text()
    lines = [json.loads(line) for line in (kept / "runs.jsonl").read_text().splitlines()]
    assert [line.get("probes", {}).get("pool_loss", "none") for line in lines] == [None] * 2 + [0.25] * 2 + ["none"] * 2


def test_scores_that_are_not_finite_are_not_drawn(tmp_path):
    write_plan(tmp_path, ["adamw"], [0])
    write_run(tmp_path, "adamw", 0, 2.5, probes={"prefix_matching": {"mean": None, "heads": [[None, 0.5]]}})
    assert probe_pictures(read_study(tmp_path)) == []


def test_a_study_that_asked_nothing_has_neither_table_nor_figures(tmp_path):
    write_plan(tmp_path, ["adamw"], [0])
    write_run(tmp_path, "adamw", 0, 2.5)
    assert probe_pictures(read_study(tmp_path)) == [] and "## Probes" not in markdown(read_study(tmp_path))
