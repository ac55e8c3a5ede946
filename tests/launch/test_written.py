"""Studies that are written down: arms, questions, equal tuning."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests.tools.studies import write_plan, write_run
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import ConfigError
from thriftlab.launch import cli
from thriftlab.launch.report.page import write_report
from thriftlab.launch.report.results import read_study
from thriftlab.launch.report.stats import holm, t_test
from thriftlab.launch.report.words import answers
from thriftlab.launch.studies import written
from thriftlab.launch.studies.arms import StudyRequest
from thriftlab.launch.studies.run import make_setting
from thriftlab.train.config.parse import read

STUDY = {
    "question": "Which?",
    "base": {"budget": {"tokens": 5120}, "optim": {"weight_decay": 0.1}},
    "seeds": 2,
    "lr_grid": [1e-3, 2e-3],
    "trial_fraction": 0.5,
    "arms": {
        "adamw": {"lr_grid": "5e-4,1e-3"},
        "small": {"layer": {"name": "lost", "rank": 8}, "seeds": 4},
        "hand": {"optim": {"lr": 0.01}},
    },
    "contrasts": [{"name": "the layer", "arms": ["small", "adamw"]}],
}


def request(argv):
    return written.make_request(read(argv))


@pytest.fixture
def file(tmp_path, tiny_data):
    def write(**changes):
        path = tmp_path / "mine.yaml"
        study = {**STUDY, **changes}
        tiny = tiny_config(tiny_data, tmp_path).model_dump(mode="json")
        study["base"] = {**{key: tiny[key] for key in ("data", "model", "train", "eval")}, **study["base"]}
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return str(path)

    return write


def test_a_study_becomes_arms_with_what_differs(file):
    asked = request([file(), "--jobs", "3", "train.clip=0.5", "budget.tokens=10240"])
    assert asked.budget == {"tokens": 10240, "flops": None, "seconds": None} and asked.jobs == 3
    assert asked.out == "runs/mine" and asked.question == "Which?" and asked.trial_fraction == 0.5
    assert [(arm.name, arm.seeds, arm.lr_grid, arm.lr) for arm in asked.arms] == [
        ("adamw", 2, (5e-4, 1e-3), None), ("small", 4, (1e-3, 2e-3), None), ("hand", 2, (1e-3, 2e-3), 0.01)
    ]  # fmt: skip
    assert StudyRequest.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    setting = make_setting(asked, on_gpu=False, precision="fp32")
    job = setting.job("small/seed-3", asked.arms[1], 3, setting.budget, 2e-3)
    c = job.config
    assert (c.seed, c.layer.name, c.layer.rank, c.optim.lr, c.optim.weight_decay) == (3, "lost", 8, 2e-3, 0.1)
    assert c.train.clip == 0.5 and c.budget.tokens == 10240 and job.arm == "small"
    assert setting.job("hand/seed-0", asked.arms[2], 0, setting.budget).config.optim.lr == 0.01


def test_another_budget_takes_the_place_of_the_written_one(file):
    assert request([file(), "budget.flops=1e12"]).budget == {"tokens": None, "flops": 1e12, "seconds": None}


def test_seeds_of_the_command_line_are_every_arms(file):
    assert [arm.seeds for arm in request([file(), "--seeds", "1"]).arms] == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"arms": {"a": {}, "b": {"lr_grid": [1, 2, 3]}}, "contrasts": []},
            "has 2 trials of its learning rate and b 3",
        ),
        ({"contrasts": [{"name": "x", "arms": ["small", "smal"]}]}, "contrast 'x' is of 'smal'; arms: adamw, small"),
        ({"arms": {}}, "arms"),
        ({"qestion": "?"}, "unknown key 'qestion'; did you mean 'question'"),
        ({"base": {"budget": {"tokens": 5120}, "trian": {}}}, "trian"),
        ({"arms": {"a": {"seed": 3}}, "contrasts": []}, "mine.yaml, arm a: seed cannot be set here"),
        ({"arms": {"a": {"budget": {"tokens": 1}}}, "contrasts": []}, "arm a: budget.tokens cannot be set here"),
        ({"arms": {"a": {"lr": 0.1}}, "contrasts": []}, "arm a: unknown key 'lr'; did you mean 'optim.lr'?"),
        ({"arms": {"../a": {}}, "contrasts": []}, "'../a' cannot be the name of an arm"),
        ({"arms": {"trials": {}}, "contrasts": []}, "'trials' cannot be the name of an arm"),
        ({"lr_grid": [1e-3]}, "small: lr_grid has one value"),
        ({"trial_fraction": 2}, "trial_fraction = 2 is not possible"),
    ],
)
def test_mistakes_of_a_file_are_one_line(file, changes, words):
    with pytest.raises(ConfigError, match=".yaml|learning rate|lr_grid") as refused:
        request([file(**changes)])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_an_unknown_study_or_none_says_which_there_are(capsys):
    assert cli.main(["study", "losst"]) == 2 and "there are curation, lost" in capsys.readouterr().err
    assert cli.main(["study"]) == 0 and "Which part of LOST pays" in capsys.readouterr().out


def test_an_unknown_key_of_an_arm_is_found_before_anything_runs(file, capsys, tmp_path):
    path = file(arms={"a": {}, "b": {"layer": {"name": "lost", "rnak": 3}}}, contrasts=[])
    assert cli.main(["study", path, "--out", str(tmp_path / "out")]) == 2
    assert "b: unknown key 'layer.rnak'" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/*"))


def test_a_rate_for_all_is_that_of_every_arm_without_its_own(file):
    arms = request([file(), "optim.lr=0.5"]).arms
    assert [(float(arm.lr), arm.tuned) for arm in arms] == [(0.5, False), (0.5, False), (0.01, False)]


@pytest.mark.parametrize("argument", ["seed=3", "trian.clip=1", "--arms", "layer.rank=3"])
def test_what_the_base_does_not_take_is_refused(file, argument, capsys):
    assert cli.main(["study", file(), *([argument, "x"] if argument.startswith("-") else [argument])]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: command line: ") and said.count("\n") == 1


@pytest.mark.parametrize("name", written.studies())
def test_the_packaged_studies_can_be_run(name):
    asked = request([name])
    assert {tuple(c.arms) for c in asked.contrasts} and len(asked.arms) > 2
    if Path(asked.base["data"]["path"]).exists():
        setting = make_setting(asked, on_gpu=False, precision="fp32")
        for arm in asked.arms:
            setting.job("x", arm, 0, setting.budget)


def test_questions_are_answered_with_interval_and_adjusted_p(tmp_path):
    contrasts = [{"name": "sign", "arms": ["signsgd", "adamw"]}, {"name": "split", "arms": ["frugal", "adamw"]}]
    arms = {m: {"tree": {"layer": {"name": m}}, "seeds": n} for m, n in (("adamw", 4), ("frugal", 3), ("signsgd", 4))}
    write_plan(tmp_path, [*arms], [0], question="Which pays?", arms=arms, contrasts=contrasts)
    shift = {"adamw": [0, 0, 0, 0], "frugal": [0.01, -0.02, 0.01], "signsgd": [0.2, 0.21, 0.19, 0.2]}
    for method, shifts in shift.items():
        for seed, by in enumerate(shifts):
            write_run(
                tmp_path,
                method,
                seed,
                2.5 + 0.1 * seed + by,
                model={"parameters": len(method) * 1000, "flops_per_token": 1},
            )
    study = read_study(tmp_path)
    sign, split = study.contrasts
    assert sign.difference.n == 4 and split.difference.n == 3
    assert sign.adjusted == pytest.approx(2 * t_test(shift["signsgd"]))
    assert split.adjusted == pytest.approx(max(t_test(shift["frugal"]), sign.adjusted))
    first, second = answers(study)
    assert first.startswith("Sign: signsgd ends 0.2000 nats/token above adamw (95 % CI")
    assert second.startswith("Split: frugal: no claim.")
    page = write_report(study)
    text = (tmp_path / "report.md").read_text()
    assert "Which pays?" in text and "- base: model.preset=null model.dim=64" in text
    assert "| sign | signsgd − adamw | +0.2000; 95 % t:" in text
    assert "+0.200, +0.210, +0.190, +0.200" in text and "layer.name=signsgd" in text
    assert "0, 1, 2 (adamw to 3, signsgd to 3)" in text and "<h2>Questions</h2>" in page.read_text()


def test_what_is_kept_of_a_study_stands_by_itself(tmp_path):
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    runs.mkdir()
    write_plan(runs, ["adamw"], [0, 1, 2], failures={"adamw/seed-2": f"see {runs}/adamw/seed-1/train.log"})
    for seed in (0, 1):
        write_run(runs, "adamw", seed, 2.5 + seed)
    assert cli.main(["report", str(runs), str(kept)]) == 0
    text, figures = (kept / "report.md").read_text(), {path.name for path in kept.glob("*.svg")}
    assert {path.name for path in kept.iterdir()} == {"report.md", "runs.jsonl", "study.json", *figures}
    assert figures == set(re.findall(r"!\[.*?\]\((.*?)\)", text)) and len(figures) == 4
    for figure in figures:
        svg = (kept / figure).read_text()
        assert ElementTree.fromstring(svg).tag.endswith("svg") and "var(" not in svg and len(svg) < 100_000
    lines = [json.loads(line) for line in (kept / "runs.jsonl").read_text().splitlines()]
    assert [(line["arm"], line["seed"], line["loss"], line["lr"]) for line in lines] == [
        ("adamw", 0, 2.5, 1e-3), ("adamw", 1, 3.5, 1e-3)
    ]  # fmt: skip
    assert {line["commit"] for line in lines} == {"0123456789abcdef"}
    assert max(map(len, (kept / "runs.jsonl").read_text().splitlines())) < 2000
    assert "adamw/seed-1/train.log" in text and str(tmp_path) not in text
    assert cli.main(["report", str(runs), str(kept)]) == 0  # again
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    assert cli.main(["report", str(runs), str(tmp_path / "other")]) == 2


def test_holm_against_its_definition():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_t_test_against_scipy():
    from scipy import stats

    sample = [0.1, -0.3, 0.2, 0.4]
    assert t_test(sample) == pytest.approx(stats.ttest_1samp(sample, 0).pvalue, rel=1e-12)
    assert (t_test([0, 0]), t_test([1, 1])) == (1.0, 0.0)


def test_the_example_of_the_help_is_a_study(tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(written.example().replace(", ...", ""))
    asked = request([str(path)])
    assert [(arm.name, arm.seeds, len(arm.lr_grid)) for arm in asked.arms] == [("adamw", 3, 3), ("lost", 8, 3)]
