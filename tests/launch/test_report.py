"""Reports of synthetic studies: words, numbers and warnings, and a page that needs nothing beside it."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.tools.studies import make_record, write_plan, write_run
from thriftlab.data.errors import UserError
from thriftlab.data.files import seal
from thriftlab.launch.report.figures import colours
from thriftlab.launch.report.page import write_report
from thriftlab.launch.report.results import Tuning, read_plan, read_study
from thriftlab.launch.report.words import answers, table, warnings
from thriftlab.train.records.record import read_record, write_record

STORED = Path(__file__).parents[1] / "formats" / "runs" / "compare"
SHIFT = {"adamw": 0.0, "frugal": 0.012, "signsgd": 0.15}


def report(folder):
    return write_report(read_study(folder))


def make_study(folder, methods=("adamw", "frugal", "signsgd"), seeds=(0, 1, 2), **changes):
    folder.mkdir(exist_ok=True)
    write_plan(folder, list(methods), list(seeds), **changes)
    for method in methods:
        for seed in seeds:
            jitter = 0.001 * (seed - 1) * (1 + len(method))
            write_run(folder, method, seed, 2.5 + 0.02 * seed + SHIFT[method] + jitter)
    return folder


class Page(HTMLParser):
    """Checks that tags close in order, and collects the links and ids."""

    VOID = {"meta", "br", "path"}

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href", "data", "action")]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_beside_it(tmp_path):
    page = report(make_study(tmp_path)).read_text()
    parsed = Page(page)
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.links)
    assert "<script" not in page and "@import" not in page
    assert {url for url in re.findall(r"https?://[^\s\"'<)]+", page)} <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip
    assert page.count("<figure>") == 4
    assert "#0a0a0" not in page and "#010101" not in page  # every placeholder colour found its variable
    references = re.findall(r"url\(#([^)]*)\)", page)
    assert references and set(references) <= set(parsed.ids)


def test_the_same_study_gives_the_same_page(tmp_path):
    make_study(tmp_path)
    first = report(tmp_path).read_bytes()
    assert report(tmp_path).read_bytes() == first


def test_text_from_outside_is_escaped(tmp_path):
    write_run(tmp_path, "adamw", 0, 2.5, machine={**make_record("adamw", 0, 2.5)["machine"], "cpu": "<script>"})
    failures = {"<i>/seed-0": "<b>"}
    write_plan(tmp_path, ["adamw", "<i>"], [0], command="compare <script>alert(1)</script>", failures=failures)
    page = report(tmp_path).read_text()
    assert not re.search("<script|<i>|<b>", page)
    assert page.count("&lt;script&gt;") == 2 and "&lt;b&gt;" in page and "&lt;i&gt;" in page


def test_answers_say_direction_interval_and_cost(tmp_path):
    study = read_study(make_study(tmp_path))
    frugal, signsgd = answers(study)
    # frugal - adamw is 0.012 + 0.001 * (seed - 1): mean 0.012, sd 0.001, half-width 4.3027 * 0.001 / sqrt(3) = 0.0025
    assert frugal == (
        "frugal ends 0.0120 nats/token above adamw (95 % CI +0.0095 to +0.0145, 3 seeds). "
        "Its optimizer state is 1.81 MiB, 48 % of adamw's."
    )
    assert signsgd.startswith("signsgd ends 0.1500 nats/token above adamw") and "0.00 MiB, 0 % of" in signsgd


def test_better_is_below(tmp_path):
    make_study(tmp_path, methods=("frugal", "adamw"))
    assert "adamw ends 0.0120 nats/token below frugal (95 % CI -0.0145 to -0.0095" in (
        report(tmp_path).with_suffix(".md").read_text()
    )


def test_an_interval_with_0_is_no_claim(tmp_path):
    write_plan(tmp_path, ["adamw", "frugal"], [0, 1, 2])
    for seed, shift in enumerate([0.01, -0.01, 0.003]):
        write_run(tmp_path, "adamw", seed, 2.5)
        write_run(tmp_path, "frugal", seed, 2.5 + shift)
    (answer,) = answers(read_study(tmp_path))
    assert answer.startswith("frugal: no claim.") and "contains 0" in answer
    # sd 0.010149, t(398) = 1.966: n > (1.966 * 0.010149 / 0.001) ** 2 = 398.1
    assert "needs about 399 seeds" in answer


def test_one_seed_is_no_claim(tmp_path):
    (answer,) = answers(read_study(make_study(tmp_path, ("adamw", "frugal"), (0,))))
    assert "no claim" in answer and "one seed has no interval" in answer


def test_table_fits_the_terminal(tmp_path):
    text = table(read_study(make_study(tmp_path)))
    assert max(map(len, text.splitlines())) <= 110
    assert re.search(r"frugal +2\.5320 ± 0\.0\d+ +1\.2660 +\+0\.0120 \(\+0\.0095 to \+0\.0145\) +1\.81 +20,000", text)
    assert "1e-03*" in text.replace("0.001*", "1e-03*") and "3/3" in text


def test_markdown_has_the_same_table(tmp_path):
    text = report(make_study(tmp_path)).with_suffix(".md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| frugal")]
    assert "+0.0120; 95 % t: +0.0095 to +0.0145" in rows[0] and "not tuned (default lr)" in rows[0]
    columns = {line.count("|") for line in text.splitlines() if line.startswith("| ") and "bits per byte" in line}
    assert columns == {rows[0].count("|")}


def test_what_is_missing_is_named(tmp_path):
    make_study(tmp_path, seeds=(0, 1))
    write_plan(tmp_path, ["adamw", "frugal", "signsgd"], [0, 1, 2], failures={"signsgd/seed-2": "out of memory"})
    (tmp_path / "frugal/seed-2").mkdir()
    (tmp_path / "frugal/seed-2/metrics.jsonl").write_text('{"step": 40, "tokens": 1, "seconds": 1, "loss": 3}\n{"st')
    (tmp_path / "signsgd/seed-2").mkdir()
    found = warnings(read_study(tmp_path))
    assert found[:3] == [
        "adamw seed 2: not started", "frugal seed 2: not finished, at step 40", "signsgd seed 2: out of memory",
    ]  # fmt: skip
    assert "adamw seed 2: not started" in report(tmp_path).read_text()
    assert "2/3" in table(read_study(tmp_path))


def test_a_study_without_a_finished_run_has_a_page(tmp_path):
    write_plan(tmp_path, ["adamw", "frugal"], [0, 1])
    assert "no claim" in report(tmp_path).read_text()


@pytest.mark.filterwarnings("error")
def test_runs_that_logged_once_have_a_page(tmp_path):
    """Seeds of one point each, which have no second in common."""
    for path in make_study(tmp_path).glob("*/seed-*/metrics.jsonl"):
        line, entry = json.loads(path.read_text().splitlines()[0]), read_record(path.parent / "record.json")
        path.write_text(json.dumps({**line, "seconds": 0.5 + int(path.parent.name[-1])}) + "\n")
        write_record(path.parent, entry)
    assert "Training loss against seconds" in report(tmp_path).read_text()


@pytest.mark.parametrize("file", ["record.json", "metrics.jsonl"])
def test_a_flipped_bit_is_a_line_and_not_a_number(tmp_path, file):
    path = make_study(tmp_path) / "frugal/seed-1" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    study = read_study(tmp_path)
    assert len(study.rows[1].done) == 2
    assert any(line.startswith("frugal seed 1: ") and file in line for line in warnings(study))
    report(tmp_path)


def test_a_curve_that_is_gone_is_a_line(tmp_path):
    (make_study(tmp_path) / "frugal/seed-1/metrics.jsonl").unlink()
    report(tmp_path)
    assert any("metrics.jsonl is missing" in line for line in warnings(read_study(tmp_path)))


def test_a_damaged_plan_and_no_plan_are_errors(tmp_path):
    with pytest.raises(UserError, match="study.json is missing"):
        report(tmp_path)
    make_study(tmp_path)
    content = (tmp_path / "study.json").read_bytes()
    (tmp_path / "study.json").write_bytes(content.replace(b'"jobs": 2', b'"jobs": 3'))
    with pytest.raises(UserError, match="study.json is damaged"):
        report(tmp_path)


def test_runs_on_different_data_are_not_compared(tmp_path):
    make_study(tmp_path, seeds=(0, 1))
    write_plan(tmp_path, ["adamw", "frugal", "signsgd"], [0, 1, 2])
    write_run(tmp_path, "frugal", 2, 2.5, data={"fingerprint": "other", "tokenizer": "bytes"})
    with pytest.raises(UserError, match="data.fingerprint"):
        report(tmp_path)


def test_warnings_name_what_weakens_the_comparison(tmp_path):
    make_study(tmp_path, ("adamw", "frugal"), (0, 1))
    trials = [{"lr": 1e-3, "loss": 3.0, "tokens": 100, "seconds": 2.0, "problem": ""},
              {"lr": 1e-2, "loss": None, "tokens": 0, "seconds": 0, "problem": "not finite"}]  # fmt: skip
    tuned = {"how": "tuned", "lr": 1e-3, "edge": "lower", "trials": trials}
    hand = {"how": "hand", "lr": 1e-3, "edge": None, "trials": []}
    write_plan(tmp_path, ["adamw", "frugal"], [0, 1, 2], lr={"adamw": tuned, "frugal": hand})
    machine = {**make_record("adamw", 2, 2.5)["machine"], "threads": 2}
    write_run(tmp_path, "adamw", 2, 2.54, machine=machine, commit="other", skipped_steps=3, diff_sha256="dirty")
    text = "\n".join(warnings(read_study(tmp_path)))
    for expected in (
        "frugal seed 2: not started", "the lower end of the grid", "lr 0.01 did not finish: not finite",
        "3 steps were skipped", "1 runs have no partner", "different commits", "different machines", "uncommitted",
        "different ways",
    ):  # fmt: skip
        assert expected in text, expected
    page = report(tmp_path).read_text()
    assert "Learning-rate trials" in page and "tuned, lower edge" in page and "lr set by hand" in page


def test_untuned_rows_are_marked(tmp_path):
    assert any("not tuned: adamw, frugal" in line for line in warnings(read_study(make_study(tmp_path))))


def test_more_arms_than_colours_are_one_below_the_other(tmp_path):
    arms = [f"arm-{i}" for i in range(12)]
    lr = {arm: {"how": "default", "lr": None, "edge": None, "trials": []} for arm in arms}
    asked = [{"name": "the worst?", "arms": ["arm-11", "arm-10"]}]
    write_plan(tmp_path, arms, [0, 1], contrasts=asked, lr=lr)
    for i, arm in enumerate(arms):
        for seed in (0, 1):
            write_run(tmp_path, arm, seed, 2.5 + 0.1 * i + 0.001 * seed * i)
    study = read_study(tmp_path)
    # the baseline, the question's arms, then the lowest losses
    assert list(colours(study)) == ["arm-0", "arm-11", "arm-10", "arm-1", "arm-2", "arm-3", "arm-4", "arm-5"]
    page = report(tmp_path).read_text()
    assert page.count("<h3>Differences</h3>") == 1 and "<h3>Loss against state memory</h3>" not in page
    keys = dict(
        re.findall(r'<td><span class="key" style="background: var\(--s(\d)\)"></span>([\w-]+)</td>', page)[::-1]
    )
    assert {arm: int(i) for i, arm in keys.items()} == colours(study)


def test_seeds_that_only_one_arm_was_to_have_are_no_loss(tmp_path):
    arms = {"adamw": {"tree": {}, "seeds": 2}, "frugal": {"tree": {}, "seeds": 4}}
    write_plan(tmp_path, [*arms], [0], arms=arms)
    for method, entry in arms.items():
        for seed in range(entry["seeds"]):
            write_run(tmp_path, method, seed, 2.5 + 0.1 * seed + 0.01 * seed * len(method))
    study = read_study(tmp_path)
    d = study.rows[1].difference
    assert (d.n, d.dropped) == (2, 0) and not any("no partner" in line for line in warnings(study))
    assert len(study.rows[1].done) == 4


def test_a_stored_study_of_today_is_read_and_written_as_it_is(tmp_path):
    folder = shutil.copytree(STORED, tmp_path / "compare")
    plan = read_plan(folder)
    rates = {arm: Tuning.from_json(tree) for arm, tree in plan["lr"].items()}
    assert {rate.how for rate in rates.values()} == {"tuned"} and all(len(rate.trials) == 2 for rate in rates.values())
    again = seal(plan | {"lr": {arm: rate.to_json() for arm, rate in rates.items()}})
    assert again == (STORED / "study.json").read_bytes()
    assert report(folder).with_suffix(".md").read_text() == (STORED / "report.md").read_text()


def test_an_older_study_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "study.json").write_bytes(seal({"format": 1, "methods": ["adamw"]}))
    with pytest.raises(UserError, match="older version; run the same command again"):
        report(tmp_path)
