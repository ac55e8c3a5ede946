"""Probes against slow references written from their definitions, on made-up attention, and in whole runs."""

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.tools import gang
from tests.tools.runs import LONG, assert_same, run_status, stop_at, traces
from tests.tools.tiny import tiny_config
from tests.tools.transformer import reference_logits
from thriftlab.data.errors import ConfigError
from thriftlab.data.shards import open_dataset
from thriftlab.train.backends import make_backend
from thriftlab.train.build import make_plan
from thriftlab.train.config.schema import RunConfig, fingerprint
from thriftlab.train.loop import run
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.probes import PROBES, base, measured
from thriftlab.train.probes import material as material_file
from thriftlab.train.probes.in_context import in_context, places
from thriftlab.train.probes.material import Material
from thriftlab.train.probes.memorised import memorised
from thriftlab.train.probes.prefix_matching import prefix_matching, sequences
from thriftlab.train.probes.previous_token import previous_token
from thriftlab.train.probes.subject import Subject
from thriftlab.train.records.record import read_metrics, read_record

NAMES = {
    "copy_loss", "copy_ratio", "second_occurrence_loss", "prefix_matching", "previous_token", "in_context", "pool_loss",
    "memorised",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
DELIMITER = 256
REPEATED = {"repetition": {"fraction": 0.5, "repeats": 4}}


def model(**changes):
    sizes = dict(preset=None, dim=12, layers=2, heads=2, hidden=16, vocab_size=257, init_std=0.4)
    made = GPT(ModelConfig(**{**sizes, **changes})).double()
    made.init_weights(5)
    return made


def subject(gpt, **options):
    backend = make_backend("single")
    backend.prepare(gpt, torch.optim.SGD(gpt.parameters(), lr=0.1))
    return Subject(backend, gpt, **options)


def material(path, length=45, pool=None):
    return Material(open_dataset(path), length, pool)


def pool_of(path, length):
    config = tiny_config(path, path, data={"sequence_length": length, **REPEATED})
    return make_plan(config, open_dataset(path), 8).pool


# ---------------------------------------------------------------------------------------------------- what they read


def held_out(path):
    return [np.fromfile(path / name / "validation-00000.bin", "<u2").tolist() for name in ("plain", "noisy")]


@pytest.mark.parametrize("size", [1, 4, 50])
def test_passages_are_held_out_text_within_documents(tiny_data, size):
    pieces = [tuple(text[i : i + size]) for text in held_out(tiny_data) for i in range(0, len(text) - size + 1, size)]
    whole = Counter(piece for piece in pieces if DELIMITER not in piece)
    found = material(tiny_data).passages(size)
    assert len(found) == min(64, sum(whole.values()))
    assert not Counter(map(tuple, found.tolist())) - whole  # none twice that is there once
    assert torch.equal(found, material(tiny_data, 99).passages(size))


def test_windows_are_those_of_held_out_losses(tiny_data):
    whole = [text[i : i + 46] for text in held_out(tiny_data) for i in range(0, len(text) - 45, 45)]
    found = material(tiny_data).windows().tolist()
    assert len(found) == min(256, len(whole)) and all(found.count(w) <= whole.count(w) for w in found)
    assert len(material(tiny_data, 10**6).windows()) == 0


def test_common_tokens_leave_a_tenth_at_each_end(tiny_data):
    counts = Counter(itertools.chain(*held_out(tiny_data)))
    del counts[DELIMITER]
    order = sorted(counts, key=lambda token: (counts[token], token))
    tenth = len(order) // 10
    data = material(tiny_data)
    assert tenth > 0 and data.common.tolist() == order[tenth : len(order) - tenth]
    assert set(data.random(7).flatten().tolist()) <= set(order[tenth : len(order) - tenth])
    rows = data.distinct(20, 9)
    assert rows.shape == (20, 9) and all(len(set(row)) == 9 for row in rows.tolist())
    assert set(rows.flatten().tolist()) <= set(data.common.tolist()) and len({tuple(r) for r in rows.tolist()}) == 20


# ------------------------------------------------------------------------------------------ slow references: losses


@pytest.fixture
def few(monkeypatch):
    """A slow reference is for a few rows."""
    monkeypatch.setattr(material_file, "PASSAGES", 5)
    monkeypatch.setattr(material_file, "WINDOWS", 9)


def nats(gpt, row):
    """Loss of each token of a row but the first."""
    logits = reference_logits(gpt, row[None, :-1])[0]
    return [math.log(logit.exp().sum()) - logit[token].item() for logit, token in zip(logits, row[1:], strict=True)]


def opened(tokens):
    return torch.tensor([DELIMITER, *tokens])


@pytest.mark.parametrize("kind", ["held_out", "random"])
def test_copying_is_the_loss_of_eleven_copies(tiny_data, few, kind):
    gpt, data = model(), material(tiny_data)
    passages = data.passages(4) if kind == "held_out" else data.random(4)
    losses = np.array([nats(gpt, opened(passage * 11)) for passage in passages.tolist()])  # [passages, 44]
    copies = [losses[:, 4 * i : 4 * i + 4].mean() for i in range(11)]
    found = measured(subject(gpt), data, ["copy_ratio", "copy_loss"])
    assert list(found) == ["copy_ratio", "copy_loss"]
    assert found["copy_loss"][kind] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["copy_loss"]["curve"][kind] == pytest.approx(copies, rel=1e-5)
    assert found["copy_ratio"][kind] == pytest.approx(np.mean(copies[1:]) / copies[0], rel=1e-5)


def test_second_occurrence_leaves_out_the_first_token(tiny_data, few):
    gpt, data = model(), material(tiny_data, 23)
    found = measured(subject(gpt), data, ["second_occurrence_loss"])["second_occurrence_loss"]
    for kind, passages in (("held_out", data.passages(11)), ("random", data.random(11))):
        losses = np.array([nats(gpt, opened(passage * 2)) for passage in passages.tolist()])  # of tokens 0 .. 21
        assert found[kind] == pytest.approx(losses[:, 12:].mean(), rel=1e-5)  # P + 1 .. 2P - 1


class Known:
    """Stands in for a model: its losses, choices and attention are given."""

    def __init__(self, **answers):
        self.answers = answers

    def __getattr__(self, name):
        return self.answers[name]


@pytest.mark.parametrize("length", [512, 600, 100, 64, 22])
def test_in_context_compares_late_with_early_tokens(tiny_data, length):
    def losses(rows):
        return torch.arange(1.0, rows.shape[1]).double().expand(len(rows), -1)  # token t has loss t

    expected = 450.0 if length >= 512 else {100: 65.0, 64: 42.0, 22: 14.0}[length]
    assert in_context(Known(losses=losses), material(tiny_data, length)) == {"in_context": expected}
    late, early = places(length)
    assert 1 <= early.start < early.stop <= late.start < late.stop <= length + 1


def test_in_context_is_of_held_out_windows(tiny_data, few):
    gpt, data = model(), material(tiny_data, 22)
    losses = np.array([nats(gpt, row) for row in data.windows()])
    late, early = losses[:, 14:16].mean(), losses[:, 0:2].mean()  # of tokens 15, 16 and 1, 2
    assert measured(subject(gpt), data, ["in_context"])["in_context"] == pytest.approx(late - early, rel=1e-4)


def test_pool_loss_is_the_loss_of_the_pool(tiny_data):
    pool, gpt = pool_of(tiny_data, 32), model()
    rows = torch.from_numpy(pool[np.arange(len(pool))].astype(np.int64))
    expected = np.mean([nats(gpt, row) for row in rows])
    found = measured(subject(gpt), material(tiny_data, 32, pool), ["pool_loss"])
    assert len(pool) == 8 and found == {"pool_loss": pytest.approx(expected, rel=1e-5)}


def greedy(gpt, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(gpt(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_memorised_is_greedy_continuation_of_half_a_window(tiny_data):
    """On a model that has learned a part of the pool by heart, against a decoder that goes token by token."""
    pool = pool_of(tiny_data, 22)
    rows = torch.from_numpy(pool[np.arange(len(pool))].astype(np.int64))
    gpt = model(dim=48, hidden=64, init_std=0.05)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for _ in range(60):
        gpt(rows[:3, :-1], rows[:3, 1:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    right = [greedy(gpt, row[:11], 11) == row[11:22] for row in rows.tolist()]
    assert 0 < sum(right) < len(rows)
    assert measured(subject(gpt), material(tiny_data, 22, pool), ["memorised"])["memorised"] == sum(right) / len(rows)


def test_memorised_needs_every_token_of_the_continuation(tiny_data):
    pool = pool_of(tiny_data, 32)
    asked = []

    def choices(rows):
        asked.append(rows.shape)
        wrong = rows[:, 1:].clone()
        wrong[0, -1] += 1  # the last token of the continuation
        wrong[1, 15] += 1  # its first
        wrong[2, 14] += 1  # the last of the prompt
        return wrong

    assert memorised(Known(choices=choices), material(tiny_data, 32, pool)) == {"memorised": 6 / 8}
    assert asked == [(8, 32)]


def test_without_a_pool_there_is_nothing_to_know_by_heart(tiny_data):
    assert measured(subject(model()), material(tiny_data), ["pool_loss", "memorised"]) == {
        "pool_loss": None, "memorised": None,
    }  # fmt: skip


# --------------------------------------------------------------------------------------- slow references: attention


@pytest.mark.parametrize("change", [{}, dict(heads=6, kv_heads=2, smeared_keys=True), dict(heads=1, qk_norm=True)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_models_own(change, masked):
    gpt, seen = model(**change), []
    if gpt.config.smeared_keys:
        for block in gpt.layers:
            torch.nn.init.uniform_(block.attn.smear, -2, 2)
    rows = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(1))
    rows[:, 0] = rows[:, 4] = DELIMITER
    reference_logits(gpt, rows, (0, 4) if masked else (0,), seen)
    found = subject(gpt, mask_delimiter=DELIMITER if masked else None).attention(rows)
    torch.testing.assert_close(found, torch.stack(seen).mean(0), rtol=1e-6, atol=1e-6)
    assert all(block.attn.watch is None for block in gpt.layers)


def brute_force_prefix(attention, tokens, delimiter=DELIMITER):
    """From the sequences themselves: a query in copies 2 to 4, and the position after each earlier like token."""
    copy, scores = (len(tokens[0]) - 1) // 4, []
    for row in tokens:
        assert row[0] == delimiter
        for query in range(1 + copy, len(row)):
            places = [i + 1 for i in range(query) if row[i] == row[query]]
            scores.append(sum(attention[..., query, place] for place in places))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("length", [45, 101, 400])
def test_prefix_matching_and_previous_token_follow_their_definitions(tiny_data, length):
    gpt, data = model(heads=3, dim=12), material(tiny_data, length)
    rows = sequences(data)
    assert rows.shape == (16, min(101, 1 + 4 * ((length - 1) // 4))) and len(rows) >= 10
    watched, seen = subject(gpt), []
    found = measured(watched, data, ["prefix_matching", "previous_token"])
    reference_logits(gpt, rows[:1], seen=seen) if length == 45 else None
    attention = watched.attention(rows)
    assert len(seen) == (length == 45) and attention.shape == (2, 3, rows.shape[1], rows.shape[1])
    expected = brute_force_prefix(attention, rows.tolist())
    assert found["prefix_matching"]["heads"] == [pytest.approx(layer, abs=1e-9) for layer in expected.tolist()]
    back = torch.stack([attention[..., i, i - 1] for i in range(1, rows.shape[1])]).mean(0)
    assert found["previous_token"]["heads"] == [pytest.approx(layer, abs=1e-9) for layer in back.tolist()]
    for score in found.values():
        assert score["max"] == max(map(max, score["heads"]))
        assert score["mean"] == pytest.approx(np.mean(score["heads"]))


def patterns(rows):
    """[layer 1, three heads]: induction, the token before, and all positions alike."""
    size = rows.shape[1]
    copy, attention = (size - 1) // 4, torch.zeros(1, 3, size, size).double()
    for i in range(size):
        attention[0, 0, i, i - copy + 1 if i > copy else 0] = 1
        attention[0, 1, i, max(i - 1, 0)] = 1
        attention[0, 2, i, : i + 1] = 1 / (i + 1)
    return attention


def test_made_up_heads_have_the_scores_that_they_should(tiny_data):
    data, known = material(tiny_data, 101), Known(attention=patterns)
    [prefix], [before] = (
        probe(known, data)[name]["heads"]
        for name, probe in (("prefix_matching", prefix_matching), ("previous_token", previous_token))
    )
    harmonic = sum((i - 1) // 25 / (i + 1) for i in range(26, 101)) / 75  # earlier copies, over visible positions
    assert prefix == pytest.approx([1.0, 0.0, harmonic]) and 0.03 < harmonic < 0.04
    assert before[1] == pytest.approx(1.0)
    assert before[2] == pytest.approx(sum(1 / (i + 1) for i in range(1, 101)) / 100)


def test_a_head_that_looks_at_the_same_token_or_before_it_scores_nothing(tiny_data):
    def attention(rows):
        size = rows.shape[1]
        copy, weights = (size - 1) // 4, torch.zeros(1, 2, size, size).double()
        for i in range(copy + 1, size):
            weights[0, 0, i, i - copy] = weights[0, 1, i, i - copy - 1] = 1
        return weights

    assert prefix_matching(Known(attention=attention), material(tiny_data))["prefix_matching"]["max"] == 0


# ------------------------------------------------------------------------------------------------------ whole runs

WATCHED = {"probes": {"every": 3}, "data": {"sequence_length": 32, **REPEATED}, "model": {"smeared_keys": True}}


def lines(out):
    return [line for line in read_metrics(out / "metrics.jsonl") if "probes" in line]


@pytest.mark.parametrize("train", [{"dropout": 0.3}, {"precision": "bf16"}], ids=str)
def test_probes_change_no_number_of_a_run_and_are_in_its_metrics_and_record(tiny_data, tmp_path, few, train):
    common = {"train": train, "eval": {"every": 3, "tokens": 500}}
    with_, without = (
        tiny_config(tiny_data, tmp_path / name, **{**WATCHED, **common, **change})
        for name, change in (("with", {}), ("without", {"probes": {}}))
    )
    record = run(with_)
    plain = run(without)
    a, b = traces(tmp_path / "with"), traces(tmp_path / "without")
    assert "probes" not in plain and not lines(tmp_path / "without")
    found = [(line["step"], set(line["probes"])) for line in lines(tmp_path / "with")]
    assert found == [(3, NAMES), (6, NAMES), (8, NAMES)]
    assert_same((*a[:2], [{k: v for k, v in line.items() if k != "probes"} for line in a[2]], *a[3:]), b)
    assert lines(tmp_path / "with")[-1]["probes"] == json.loads(json.dumps(record["probes"]))
    assert record["probes"] == read_record(tmp_path / "with" / "record.json")["probes"]
    repeated = record["results"]["sources"]["repeated"]["loss"]
    if "dropout" in train:  # in fp32; bf16 rounds by the shape of a forward
        assert record["probes"]["pool_loss"] == pytest.approx(repeated, abs=1e-6)
    heads = record["probes"]["prefix_matching"]["heads"]
    assert len(heads) == 2 and all(len(layer) == 2 and all(0 <= h <= 1 for h in layer) for layer in heads)


def test_probes_can_be_chosen_and_come_without_evaluations(tiny_data, tmp_path, few):
    chosen = {"every": 5, "names": ["in_context", "copy_ratio"]}
    record = run(tiny_config(tiny_data, tmp_path / "out", probes=chosen))
    found = lines(tmp_path / "out")
    assert [line["step"] for line in found] == [5, 8] and "eval" not in found[0] and "eval" in found[1]
    assert all(list(line["probes"]) == chosen["names"] for line in found) and list(record["probes"]) == chosen["names"]


@pytest.mark.slow
def test_stopped_and_resumed_is_unbroken(tiny_data, tmp_path, few):
    sections = {**LONG, **WATCHED, "probes": {"every": 5}}
    run(tiny_config(tiny_data, tmp_path / "whole", **sections))
    config = tiny_config(tiny_data, tmp_path / "broken", **sections)
    for step in (4, 9, 17):
        stop_at(config, step)
    run(config)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))
    records = [read_record(tmp_path / name / "record.json") for name in ("broken", "whole")]
    assert records[0]["probes"] == records[1]["probes"]


def flat(tree):
    if isinstance(tree, dict | list):
        return [x for part in (tree.values() if isinstance(tree, dict) else tree) for x in flat(part)]
    return [tree]


@pytest.mark.slow
@pytest.mark.parametrize("backend", [{}, {"name": "fsdp2"}, {"name": "deepspeed", "stage": 3}], ids=str)
def test_two_ranks_are_one(tiny_data, tmp_path, backend):
    sections = {**WATCHED, "budget": {"tokens": 4 * 8 * 32}, "checkpoint": {"every": 0}}
    run(tiny_config(tiny_data, tmp_path / "one", **sections))
    config = tiny_config(tiny_data, tmp_path / "two", **sections, backend=backend)
    gang.ranks(2, run_status, config.model_dump())
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one["step"] == two["step"] and one["probes"].keys() == two["probes"].keys()
        assert flat(two["probes"]) == pytest.approx(flat(one["probes"]), abs=2e-5)


@pytest.mark.slow
def test_a_compiled_model_is_measured_without_being_compiled(tiny_data):
    gpt, data = model(smeared_keys=True), material(tiny_data, 32, pool_of(tiny_data, 32))
    plain = measured(subject(gpt), data, list(PROBES))
    torch._dynamo.reset()
    watched = subject(gpt, compiled=True)
    watched.backend.module = torch.compile(gpt, backend=lambda *_: pytest.fail("it was compiled"))
    assert measured(watched, data, list(PROBES)) == plain


# --------------------------------------------------------------------------------------------------- configuration


def test_the_probe_of_the_docs_is_one(tiny_data, few, monkeypatch):
    monkeypatch.setattr(base, "PROBES", dict(PROBES))
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "probes.md").read_text(), re.DOTALL)[1]
    exec(code, {})
    data = material(tiny_data)

    def choices(rows):
        return rows[:, 1:] + (torch.arange(rows.shape[1] - 1) % 9 == 0).long()  # 5 of 45 are wrong

    known = Known(choices=choices)
    assert base.PROBES["greedy_accuracy"](known, data) == {"greedy_accuracy": pytest.approx(40 / 45)}
    with pytest.raises(ValueError, match="already a probe 'greedy_accuracy'"):
        exec(code, {})


def test_the_names_are_these():
    assert PROBES.keys() == NAMES
    with pytest.raises(ValidationError, match="no probe 'copyloss'; choose from copy_loss, "):
        RunConfig(probes={"every": 1, "names": ["copyloss"]})
    with pytest.raises(ValidationError, match="names has no effect with every=0"):
        RunConfig(probes={"names": ["copy_loss"]})


def test_without_probes_nothing_is_written_of_them_and_with_them_the_run_is_another():
    off, on = RunConfig(), RunConfig(probes={"every": 10})
    assert "probes" not in off.model_dump() and RunConfig.model_validate(on.model_dump()) == on
    assert fingerprint(off, "") != fingerprint(on, "")


def test_windows_that_are_too_short_are_refused_before_the_run(tiny_data, tmp_path, few):
    for length in (21, 22):
        config = tiny_config(tiny_data, tmp_path / str(length), data={"sequence_length": length}, probes={"every": 8})
        if length == 22:
            assert run(config)["probes"]["copy_ratio"]["random"] > 0
            continue
        with pytest.raises(ConfigError, match="windows of 22 tokens at least, and data.sequence_length = 21; raise it"):
            run(config)
