"""Options of a run, end to end: what must not change the result does not, and what must does."""

import pytest

from tests.tools.tiny import tiny_config
from thriftlab.data.errors import UserError
from thriftlab.train.log import Counters
from thriftlab.train.loop import run
from thriftlab.train.records.record import read_metrics
from thriftlab.train.step import StepResult


def losses(path, out, /, **sections):
    run(tiny_config(path, out, **sections))
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"activation_checkpointing": True}, {"deterministic": True}],
    ids=str,
)
def test_how_a_batch_is_computed_does_not_matter(tiny_data, tmp_path, train):
    plain = losses(tiny_data, tmp_path / "plain")
    assert losses(tiny_data, tmp_path / "other", train=train) == pytest.approx(plain, abs=2e-6)


def test_bf16_is_near_and_not_equal(tiny_data, tmp_path):
    plain, bf16 = (losses(tiny_data, tmp_path / p, train={"precision": p}) for p in ("fp32", "bf16"))
    assert bf16 == pytest.approx(plain, abs=0.02) and bf16 != plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [{"data": {"document_mask": True}}, {"schedule": {"name": "wsd"}}, {"train": {"clip": 0.01}}, {"seed": 1},
     {"data": {"sources": {"plain": {"weight": 1}}}}, {"data": {"sequence_length": 16}}, {"optim": {"lr": 2e-3}}],
    ids=str,
)  # fmt: skip
def test_what_is_set_is_used(tiny_data, tmp_path, sections):
    if "data" in sections and "document_mask" in sections["data"]:
        sections = {**sections, "data": {**sections["data"], "sequence_length": 200}}  # so that documents meet
        plain = losses(tiny_data, tmp_path / "plain", data={"sequence_length": 200})
    else:
        plain = losses(tiny_data, tmp_path / "plain")
    assert losses(tiny_data, tmp_path / "other", **sections) != plain


def test_the_learning_rate_follows_the_schedule(tiny_data, tmp_path):
    schedule = {"name": "linear", "warmup": 0.25, "final": 0.0}
    run(tiny_config(tiny_data, tmp_path / "out", schedule=schedule, optim={"lr": 1.0e-3}))
    rates = [line["lr"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "lr" in line]
    middles = [(step + 0.5) / 8 for step in range(8)]
    expected = [1e-3 * (p / 0.25 if p < 0.25 else (1 - p) / 0.75) for p in middles]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_a_batch_that_the_ranks_cannot_share_is_refused(tiny_data, tmp_path, monkeypatch):
    from thriftlab.train.backends.base import Backend

    monkeypatch.setattr(Backend, "world", 3)
    with pytest.raises(UserError, match="not a multiple of the 3 ranks"):
        run(tiny_config(tiny_data, tmp_path / "out"))


def test_a_vocabulary_that_is_too_small_is_refused(tiny_data, tmp_path):
    with pytest.raises(UserError, match="vocab_size"):
        run(tiny_config(tiny_data, tmp_path / "out", model={"vocab_size": 100}))


def test_a_pattern_that_matches_nothing_is_refused(tiny_data, tmp_path):
    with pytest.raises(UserError, match="matches no parameter"):
        run(tiny_config(tiny_data, tmp_path / "out", optim={"include": ["zzz"]}))


def test_counters_count():
    counters = Counters()
    for applied, seconds, timed in ((False, 9.0, False), (True, 1.0, True), (False, 3.0, True)):
        counters.add(StepResult(loss=1.5, grad_norm=1.0, tokens=100, applied=applied), seconds, timed)
    assert (counters.step, counters.tokens, counters.seconds) == (3, 300, 13.0)
    assert (counters.skipped, counters.skipped_in_a_row) == (2, 1)
    assert counters.tokens_per_second() == 200 / 4.0


def test_the_first_steps_of_a_process_are_not_timed(tiny_data, tmp_path, monkeypatch):
    seen = []
    add = Counters.add
    monkeypatch.setattr(Counters, "add", lambda *a, **k: (seen.append(k["timed"]), add(*a, **k))[1])
    run(tiny_config(tiny_data, tmp_path / "out"))
    assert seen == [False, False] + [True] * 6
