"""`thriftlab curate` end to end, on records written from a planted law."""

import math
import re

import numpy as np
import pytest

from tests.tools.studies import make_record
from tests.tools.tiny import tiny_config
from thriftlab.data.curation_law import Pool, UtilityLaw
from thriftlab.launch.cli import main
from thriftlab.train.loop import run
from thriftlab.train.records.record import read_record, write_record

M = 10**6
TRUTH = UtilityLaw.language_model([Pool("good", M, -0.22, 5.0), Pool("plain", 4 * M, -0.16, 9.0)], 2.0, 3.0, M)
BUDGETS = [M, 2 * M, 4 * M, 8 * M, 16 * M, 32 * M]


def write(folder, name, seed, tokens, weights, noise=0.0, law=TRUTH, extra=0.0, **changes):
    """A finished run that drew `tokens` of these sources by weight."""
    total, random = sum(weights.values()), np.random.default_rng([seed, tokens])
    loss = law.loss(tokens, weights) * math.exp(random.normal(0, noise)) + extra
    record = make_record("adamw", seed, loss)
    sources = {s: {"unique": int(law.named[s].tokens), "tokens": round(tokens * w / total)} for s, w in weights.items()}
    record["data"]["sources"] = sources
    record["results"]["sources"] = {"wiki": {"loss": loss + 0.5}}
    record["budget"]["tokens"] = tokens
    for path, value in changes.items():
        *keys, last = path.split("__")
        tree = record
        for key in keys:
            tree = tree.setdefault(key, {})
        tree[last] = value
    out = folder / name / f"{tokens}" / f"seed-{seed}"
    out.mkdir(parents=True)
    write_record(out, record)
    return out


def write_all(folder, noise=2e-4, seeds=1, mixed=(), law=TRUTH, budgets=BUDGETS):
    for name in law.named:
        for tokens in budgets:
            for seed in range(seeds):
                write(folder, name, seed, tokens, {name: 1}, noise, law)
    for i, weights in enumerate(mixed):
        for tokens in (4 * M, 16 * M):
            write(folder, f"mixed-{i}", 0, tokens, weights, noise, law)


def curate(capsys, *words):
    code = main(["curate", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_runs_with_a_repeated_pool_are_no_points_and_are_named(tmp_path, capsys):
    for seed in range(2):
        write(tmp_path, "good", seed, 4 * M, {"good": 1}, config__data__repetition={"fraction": 0.1})
    code, _, err = curate(capsys, tmp_path, "--budget", "tokens=2e6")
    assert code == 2 and err.count("repeats a pool by data.repetition") == 2 and err.count("\n") == 1


def test_the_best_data_for_each_budget(tmp_path, capsys):
    write_all(tmp_path, mixed=[{"good": 1, "plain": 4}])
    code, out, err = curate(capsys, tmp_path, "--budget", "tokens=2e6,2e7,1e9", "draws=30")
    assert (code, err) == (0, "")
    few, many, beyond, change, *rest = out.splitlines()
    assert few.startswith("2,000,000 tokens: good, predicted loss 4.62") and "below" in few
    assert re.search(r"Free weights: good 7.%, plain 2.%, predicted loss 4.62", few)
    assert re.match(r"2e\+07 tokens: good \+ plain, predicted loss", many)
    assert beyond.startswith("1e+09 tokens: no answer. Every candidate repeats a pool more often")
    assert re.match(r"From .* tokens on, .* FLOPs, good \+ plain is better than good \(95 % interval: ", change)
    assert "2 runs of mixtures were not fitted; gamma = 0 predicts them best" in out
    assert rest[-1] == str(tmp_path / "curate.html")
    page, text = (tmp_path / "curate.html").read_text(), (tmp_path / "curate.md").read_text()
    assert page.count("<svg ") == 3 and "<script" not in page and "$" not in page
    for words in ("Which data?", "Utility curves", "Predicted against observed", "Frontier"):
        assert words in page
    for words in (few, many, "| good | 1,000,000 | 6 | 32.00 |", "not fitted", "gamma: 0"):
        assert words in text
    true = TRUTH.loss(2 * M, {"good": 1})
    assert float(few.split()[5]) == pytest.approx(true, rel=2e-3)


def test_the_target_is_a_held_out_source(tmp_path, capsys):
    write_all(tmp_path)
    code, out, _ = curate(capsys, tmp_path, "--budget", "tokens=2e6", "target=wiki", "draws=20", f"out={tmp_path}/page")
    assert code == 0 and out.startswith("2,000,000 tokens: good, predicted loss 5.12")
    assert (tmp_path / "page" / "curate.md").exists() and not (tmp_path / "curate.md").exists()
    assert "no run mixes pools" in out
    code, _, err = curate(capsys, tmp_path, "--budget", "tokens=2e6", "target=books")
    assert (code, err) == (2, "error: target: nothing of 'books' is held out; there is wiki\n")


def test_a_mixture_as_a_pool_of_its_own(tmp_path, capsys):
    write_all(tmp_path, noise=0)
    for tokens in BUDGETS:
        write(tmp_path, "both", 0, tokens, {"good": 1, "plain": 4})
    code, out, _ = curate(capsys, tmp_path, "--budget", "tokens=2e6", "mixtures=own", "draws=20")
    assert code == 0 and out.startswith("2,000,000 tokens: good, predicted loss")
    assert "| good + plain | 5,000,000 | 6 |" in (tmp_path / "curate.md").read_text()


def test_parts_of_a_source_are_pools_of_their_own(tmp_path, capsys):
    for name, where in (("good", "score>0.7"), ("plain", "score>0.2")):
        for tokens in BUDGETS:
            run = write(tmp_path / name, name, 0, tokens, {name: 1})
            record = read_record(run / "record.json")
            record["data"]["sources"] = {"web": record["data"]["sources"][name]}
            record["config"]["data"] = {"sources": {"web": {"weight": 1, "where": where}}}
            (run / "record.json").unlink()
            write_record(run, {key: value for key, value in record.items() if key not in ("files", "sha256")})
    code, out, _ = curate(capsys, tmp_path, "--budget", "tokens=2e6", "mixtures=own", "draws=20")
    assert code == 0 and out.startswith("2,000,000 tokens: web[score>0.7], predicted loss 4.62")
    table = (tmp_path / "curate.md").read_text()
    assert "| web[score>0.7] | 1,000,000 | 6 |" in table and "| web[score>0.2] | 4,000,000 | 6 |" in table


def test_pools_without_runs_of_their_own_are_fitted_with_mixtures(tmp_path, capsys):
    for tokens in BUDGETS:
        write(tmp_path, "good", 0, tokens, {"good": 1})
    for tokens in [*BUDGETS, 48 * M, 64 * M]:
        write(tmp_path, "both", 0, tokens, {"good": 1, "plain": 1})
    code, out, _ = curate(capsys, tmp_path, "--budget", "tokens=2e7", "draws=20")
    expected = TRUTH.loss(20 * M, {"good": 1, "plain": 4})
    assert out.startswith("2e+07 tokens: good + plain, predicted loss")
    assert float(out.split("predicted loss ")[1].split()[0]) == pytest.approx(expected, abs=2e-4)
    assert code == 0 and "plain: fewer than two budgets of its own, so mixtures are fitted with the pools" in out


def test_what_is_not_identified_is_named(tmp_path, capsys):
    write_all(tmp_path / "a", noise=0, budgets=[M, 2 * M, 3 * M, 4 * M])
    code, out, _ = curate(capsys, tmp_path / "a", "--budget", "tokens=2e6", "draws=20")
    assert code == 0
    assert "tau of plain is not identified: 4 runs, 0 of them with 4 epochs or more; at least 5 are needed" in out
    assert "a half-life of 13 epochs (10 to 17) is assumed" in out
    write_all(tmp_path / "b", noise=0, budgets=[M])
    code, _, err = curate(capsys, tmp_path / "b", "--budget", "tokens=2e6")
    assert code == 2 and err.startswith("error: not identified: 2 runs for ") and err.count("\n") == 1


def test_runs_past_the_minimum_are_said(tmp_path, capsys):
    write_all(tmp_path, noise=0)
    write(tmp_path, "good", 0, 64 * M, {"good": 1}, extra=1.0)
    code, out, _ = curate(capsys, tmp_path, "--budget", "tokens=4e7", "draws=20")
    assert code == 0 and "good at 6.4e+07 tokens is past the minimum of its loss: not fitted" in out
    assert (
        "good |" in (tmp_path / "curate.md").read_text()
        and "beyond the fitted epochs of good" in (tmp_path / "curate.md").read_text()
    )


@pytest.mark.parametrize(
    "changes, words",
    [({"data__fingerprint": "other"}, "data.fingerprint is not the same"),
     ({"config__optim": {"name": "frugal", "lr": 1e-3}}, "config.optim is not the same"),
     ({"config__model": {"dim": 9}}, "config.model is not the same")],
)  # fmt: skip
def test_runs_that_differ_in_more_than_data_are_refused(tmp_path, capsys, changes, words):
    write(tmp_path, "good", 0, M, {"good": 1})
    write(tmp_path, "good", 1, M, {"good": 1}, **changes)
    code, _, err = curate(capsys, tmp_path, "--budget", "tokens=2e6")
    assert code == 2 and words in err and str(tmp_path) in err and err.count("\n") == 1


def test_runs_that_cannot_be_used_are_named(tmp_path, capsys):
    old = write(tmp_path, "good", 0, M, {"good": 1}, data__sources=None)
    lost = write(tmp_path, "good", 1, M, {"good": 1}, results__loss=None)
    (tmp_path / "good" / "running").mkdir()
    (tmp_path / "good" / "running" / "config.json").write_text("{}")
    write(tmp_path, "trials", 0, M, {"good": 1}, config__model={"dim": 9})
    code, _, err = curate(capsys, tmp_path, "--budget", "tokens=2e6")
    assert code == 2 and "not identified: none of the runs can be used" in err
    assert f"{old} was written before records named the tokens" in err and f"{lost} ended with a loss" in err
    assert "running/record.json is missing" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words, said",
    [(["--budget", "tokens=1e6"], "takes folders of finished runs"), (["nowhere", "--budget", "tokens=1e6"], "nowhere"),
     (["."], "budget"), ([".", "--budget", "flops=1e20"], "takes tokens alone"),
     ([".", "--budget", "tokens=0"], "budget"), ([".", "--budget", "tokens=1e6", "draw=5"], "draws")],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = curate(capsys, *words)
    assert code == 2 and said in err and err.count("\n") == 1


def test_a_run_records_the_tokens_of_its_sources(tiny_data, tmp_path):
    sources = {"plain": {"weight": 3}, "noisy": {"weight": 1}}
    data = {"path": str(tiny_data), "sequence_length": 32, "sources": sources}
    record = run(tiny_config(tiny_data, tmp_path / "out", data=data))
    used = record["data"]["sources"]
    assert sum(use["tokens"] for use in used.values()) == record["budget"]["tokens"] == 2048
    assert used["plain"]["tokens"] > used["noisy"]["tokens"] > 0
    assert all(use["unique"] > 20_000 and use["unique"] % 32 == 0 for use in used.values())
