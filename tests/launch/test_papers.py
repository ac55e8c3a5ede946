"""Studies of papers: settings against what was read in their scripts, every study valid, one run in miniature."""

import math

import pytest

from tests.tools import gang
from tests.tools.studies import write_plan, write_run
from thriftlab.launch import cli
from thriftlab.launch.report import published
from thriftlab.launch.report.results import read_study
from thriftlab.launch.studies import jobs, papers, written
from thriftlab.train.config.parse import read
from thriftlab.train.config.schema import RunConfig

# Of each paper, at 60M, 130M, 350M, 1B and 7B: thousands of steps, and settings of its own arm.
READ = {
    "galore": ("10 20 60 100 150", {"optim.lr": ".01 .01 .01 .01 .005", "optim.rank": "128 256 256 1024 1024",
               "optim.scale": ".25 .25 .25 .25 .25", "optim.gap": "200 200 200 200 500"}),
    "fira": ("10 20 60 100 10", {"optim.lr": ".01 .01 .01 .01 .005", "optim.rank": "128 256 256 512 64",
             "optim.alpha": ".25 .25 .25 .0625 .0625", "optim.gap": "200 200 200 200 500"}),
    "apollo": ("10 20 60 100 150", {"optim.lr": ".01 .01 .01 .01 .01", "optim.rank": "128 192 256 256 256",
               "optim.scale": "1 1 1 1 1"}),
    "frugal": ("200 200 300 500 150", {"optim.lr": ".001 .001 .001 .001 .0005", "optim.density": ".25 .25 .25 .25 0",
               "optim.gap": "200 200 200 200 500", "optim.split_lr_scale": "1 1 1 1 .3",
               "schedule.cycles": "20 10 5 5 1"}),
    "sltrain": ("11 22 65 140 150", {"optim.lr": ".003 .003 .003 .003 .003", "layer.rank": "128 256 256 512 1024",
                "layer.density": ".03 .03 .03 .03 .05", "layer.alpha": "32 16 16 8 8"}),
    "scale": ("11 20 60 100 150", {"optim.lr": ".001 .001 .001 .0002 .0001", "optim.momentum": ".9 .9 .9 .9 .9",
              "optim.plain_lr_scale": "20 20 20 5 10"}),
    "rmnp": ("10 20 60 90", {"optim.lr": ".005 .03 .005 .005", "optim.beta": ".95 .95 .95 .95",
             "optim.weight_decay": ".1 .1 .1 .1", "train.clip": "1 1 1 1"}),
    "lost": ("10 20 60 100 150", {"layer.rank": "128 256 256 512 1024", "layer.density": ".01 .01 .01 .01 .01"}),
}  # fmt: skip
SIZES = ("60m", "130m", "350m", "1b", "7b")


def request(*argv):
    return written.make_request(read([*argv]))


def configs(asked):
    return {arm.name: RunConfig.model_validate({**asked.base, **arm.tree}) for arm in asked.arms}


@pytest.mark.parametrize("paper", READ)
def test_settings_are_those_that_were_read(paper):
    steps, settings = READ[paper]
    for k, count in enumerate(steps.split()):
        asked = request(f"papers/{paper}-{SIZES[k]}")
        config = configs(asked)[paper]
        assert config.model.preset == f"llama-{SIZES[k]}" and config.data.sequence_length == 256
        assert (
            asked.budget["tokens"] == 1000 * int(count) * 512 * 256 == 1000 * int(count) * config.train.batch_size * 256
        )
        assert (config.schedule.final, config.schedule.warmup) == (0.1, 0.0714 if (paper, k) == ("sltrain", 3) else 0.1)
        for key, values in settings.items():
            section, _, name = key.partition(".")
            assert getattr(getattr(config, section), name) == pytest.approx(float(values.split()[k])), (key, SIZES[k])
        if paper not in ("rmnp", "lost"):
            assert config.train.clip == (1.0 if SIZES[k] == "7b" and paper not in ("apollo", "scale") else None)


def test_the_names_are_those_of_the_table():
    assert papers.names() == [
        f"papers/{p}-{SIZES[k]}" for p, (steps, _) in READ.items() for k in range(len(steps.split()))
    ]
    assert len(papers.names()) == 39


@pytest.mark.parametrize("name", papers.names())
def test_in_miniature_the_fractions_are_the_same(name):
    whole, mini = request(name), request(name, "mini=true")
    assert (mini.out, mini.budget["tokens"]) == (f"runs/{name}-mini", 500 * 8 * 256)
    assert "no reproduction" in mini.published["uncertain"][0]
    for large, small in zip(configs(whole).values(), configs(mini).values(), strict=True):
        assert small.model.preset == "nano" and small.schedule == large.schedule
        for section in ("optim", "layer"):
            own, other = getattr(small, section).model_dump(), getattr(large, section).model_dump()
            steps = whole.budget["tokens"] / 512 / 256
            for key, factor in (("gap", 500 / steps), ("rank", small.model.dim / large.model.dim)):
                if key in own and own["name"] != "adamw" and other[key] is not None:
                    assert own.pop(key) == max(1, round(other.pop(key) * factor)), key
            assert own == other


def test_the_numbers_beside(tmp_path):
    asked = request("papers/galore-130m").published
    assert asked["perplexity"] == {"adamw": 25.08, "galore": 25.36} and asked["batches"] == 170
    write_plan(tmp_path, ["galore"], [0, 1], published={**asked, "uncertain": ["the weather"]})
    for seed in (0, 1):
        write_run(tmp_path, "galore", seed, 3.0 + seed)
    title, (head, rows), note = published.section(read_study(tmp_path))
    assert len(head) == 5 and title == "Published" and "2cc66f8" in note and "Uncertain: the weather." in note
    right = math.exp(math.log(25.36) * 171 / 170)  # their loss was n / (n + 1) of the right one
    assert rows == [
        [("galore",), ("25.36",), (f"{right:.2f}",), (f"{math.exp(3.5):.2f}",), (f"{math.exp(3.5 * 170 / 171):.2f}",)],
        [("adamw",), ("25.08",), (f"{math.exp(math.log(25.08) * 171 / 170):.2f}",), ("-",), ("-",)],
    ]
    write_plan(tmp_path, ["galore"], [0, 1], published={**asked, "batches": None})
    assert [cell for (cell,) in published.section(read_study(tmp_path))[1][1][0]] == [
        "galore",
        "25.36",
        "-",
        "33.12",
        "-",
    ]


@pytest.mark.parametrize(("words", "said"), [
    (["papers/galore-2b"], "did you mean 'papers/galore-"),
    (["lost", "mini=true"], "mini is for the studies of papers, as papers/galore-60m"),
])  # fmt: skip
def test_what_there_is_not(words, said, capsys):
    assert cli.main(["study", *words]) == 2
    assert said in (found := capsys.readouterr().err) and found.count("\n") == 1


@pytest.mark.slow
def test_a_paper_runs_in_miniature(tmp_path, tiny_data, monkeypatch, capsys):
    monkeypatch.setattr(jobs.subprocess, "Popen", gang.Forked)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)
    tiny = ["model.layers=1", "data.sequence_length=32", "train.batch_size=2", "budget.tokens=640", "eval.tokens=500"]
    words = ["papers/frugal-130m", "--mini", f"data.path={tiny_data}", f"out={tmp_path}", "backend.device=cpu", *tiny]
    assert cli.main(["study", *words]) == 0, capsys.readouterr().err
    page = (tmp_path / "report.md").read_text()
    assert "## Published" in page and "| frugal | 18.60 | - | " in page and "no reproduction" in page


def test_the_studies_are_listed(capsys):
    assert cli.main(["study"]) == 0
    assert "papers/rmnp-SIZE, SIZE of 60m, 130m, 350m, 1b\n" in capsys.readouterr().out
