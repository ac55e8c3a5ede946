"""Signals in a run: on every backend the objective of one process; resumed bitwise; reference losses end to end."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.tools import gang, zero_cases
from tests.tools.runs import LAYERWISE, LONG, NORMAL, assert_same, run_status, stop_at, stop_rank, traces
from tests.tools.tiny import tiny_config
from tests.tools.zero_cases import LENGTH, ROWS, difference, weights
from thriftlab.data.errors import UserError
from thriftlab.data.files import replace_atomically, seal
from thriftlab.data.loader import Batch, batches
from thriftlab.data.shards import open_dataset, write_manifest
from thriftlab.launch.cli import main
from thriftlab.train.backends import make_backend
from thriftlab.train.backends.base import Backend
from thriftlab.train.build import make_plan
from thriftlab.train.config.schema import RunConfig, fingerprint
from thriftlab.train.loop import run
from thriftlab.train.objective import Objective
from thriftlab.train.records.record import read_metrics, read_record
from thriftlab.train.signals import SIGNALS
from thriftlab.train.signals.reference import open_reference, read_reference
from thriftlab.train.step import train_step
from thriftlab.train.windows import split_windows
from thriftlab.train.write_reference import ReferenceConfig, load_model, write_reference

# ----------------------------------------------------------------------------------------------------------- backends

STEPS = 7  # with one in which rows have nothing to predict, and with a second subspace
SOURCE = torch.tensor([0, 1, 0, 2, 2, 1, 0, 0, 1, 0, 2, 0])
CASES = {  # signal, its options, those of the objective, micro-batches of a rank
    "linupper": ("linupper", {"r": 0.4}, {}, 1),
    "linupper, ahead": ("linupper", {"r": 0.4, "w_max": 1.5}, {}, 2),
    "linupper, lagged": ("linupper", {"r": 0.4}, {"statistics": "lagged"}, 2),
    "rho1": ("rho1", {"reference": "-", "keep": 0.6}, {}, 2),
    "doremi": ("doremi", {"reference": "-"}, {}, 1),
    "focal": ("focal", {}, {}, 2),
}
STAGES = {"ddp": [None], "owned": [None], "fsdp2": [None], "deepspeed": [0, 1, 2, 3]}
# As in test_zero's "close": sums of gradients are taken in another order, and nothing else differs.
TOLERANCE = 5e-6


def batch(step, ranks, world):
    """Rows of these ranks, one after the other; in every fifth step some have nothing to predict."""
    order = torch.cat([torch.arange(rank, ROWS, world) for rank in ranks])
    return Batch(zero_cases.batch(step, 0, 1).tokens[order], SOURCE[order], order + step * ROWS)


def reference_losses(batch):
    draw = torch.Generator().manual_seed(1)
    return (5 * torch.rand(STEPS * ROWS, LENGTH, generator=draw))[batch.sample]


def trained(backend, case, rows, ranks, world):
    name, options, how, _ = CASES[case]
    signal = SIGNALS[name](**options)
    reference = reference_losses if signal.reference else None
    objective, losses = Objective(signal, "abc", delimiter=3, reference=reference, **how), []
    for step in range(STEPS):
        objective.at(step, 0.5, watched=True)
        result = train_step(backend, batch(step, ranks, world), None, rows, "fp32", 0.5, objective)
        losses.append((result.loss, result.grad_norm, result.weights["loss"].item(), result.weights["ess"].item()))
    return losses


def on_backend(name):
    """For each stage and case: the largest difference of a weight to one process, and the losses of both."""
    backend, found = make_backend(name), {}
    for stage in STAGES[name]:
        for case, (_, _, _, accumulate) in CASES.items():
            if stage is None:
                backend.prepare(*zero_cases.build("galore"))
            else:
                zero_cases.prepared(backend, stage, "galore")
            rows = ROWS // backend.world // accumulate
            ours = trained(backend, case, rows, [backend.rank], backend.world)
            alone = Backend()
            alone.prepare(*zero_cases.build("galore"))
            theirs = trained(alone, case, rows, range(backend.world), backend.world)
            found[case, stage] = difference(weights(backend), weights(alone)), ours, theirs
    backend.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_every_backend_minimises_what_one_process_does(name):
    for found in gang.ranks(2, on_backend, name):
        assert len(found) == len(CASES) * len(STAGES[name])
        for what, (apart, ours, theirs) in found.items():
            assert apart <= TOLERANCE, what
            for a, b in zip(ours, theirs, strict=True):
                assert a == pytest.approx(b, rel=1e-5), what
        ends = {what: tuple(ours[-1]) for what, (_, ours, _) in found.items()}
        assert len({ends[what] for what in ends if what[1] == STAGES[name][0]}) == len(CASES)


SIGNALLED = {
    "exact": {"name": "linupper", "warmup": 0.2},
    "lagged": {"name": "extremes", "statistics": "lagged", "warmup": 0.0},
    "documents": {"name": "linupper", "unit": "document"},
    "tokens": {"name": "rho1", "keep": 0.3},
    "sources": {"name": "domains", "alpha": {"noisy": 5.0}},
    "shuffled": {"name": "quadratic", "shuffle": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SIGNALLED)
def test_ways_that_change_speed_and_memory_change_nothing_else(tiny_data, tmp_path, monkeypatch, reference, case):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager", fullgraph=True))
    small = {**NORMAL, "micro_batch_size": 4}
    ways = {
        "plain": small,
        "layerwise": {**LAYERWISE, "micro_batch_size": 4},
        "checkpointing": {**small, "activation_checkpointing": True},
        "recomputed loss": {**small, "loss_keep_bytes": 0},
        "compile": {**small, "compile": True},
        "whole": NORMAL,
        "ones": {**NORMAL, "micro_batch_size": 1},
    }
    signal, loss = told(SIGNALLED[case], reference), {}
    for way, train in ways.items():
        loss[way] = run(tiny_config(tiny_data, tmp_path / way, signal=signal, train=train))["results"]["loss"]
    assert loss["layerwise"] == loss["checkpointing"] == loss["recomputed loss"] == loss["plain"]
    for way in ("compile", "whole", "ones"):
        assert loss[way] == pytest.approx(loss["plain"], abs=2e-5)
    uniform = run(tiny_config(tiny_data, tmp_path / "uniform", train=small))["results"]["loss"]
    assert abs(uniform - loss["plain"]) > 5e-5  # it would have been seen above


# ------------------------------------------------------------------------------------------------------------- resume

RESUMED = {
    "lagged": {"name": "linupper", "statistics": "lagged", "warmup": 0.0},
    "shuffled": {"name": "extremes", "shuffle": True, "r_final": 2.0, "ramp": 0.3},
    "coba": {"name": "coba", "every": 2, "window": 8, "warmup": 4, "tokens": 200},
    "famo": {"name": "famo", "every": 3, "tokens": 200},
    "doremi": {"name": "doremi", "eta": 0.5},
}


@pytest.fixture(scope="module")
def reference(tiny_data, tmp_path_factory):
    """Of a run of eight steps on the tiny data."""
    folder = tmp_path_factory.mktemp("judge")
    run(tiny_config(tiny_data, folder / "run"))
    return write_reference(ReferenceConfig(run=str(folder / "run"), out=str(folder / "reference")))


def remembered(out):
    last = sorted((out / "checkpoints").glob("step-*"))[-1]
    return {name: tensor.tobytes() for name, tensor in load_file(last / "signal.safetensors").items()}


def told(signal, reference):
    return {**signal, **({"reference": str(reference)} if signal["name"] in ("doremi", "rho1") else {})}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_stopped_and_resumed_is_unbroken(tiny_data, tmp_path, reference, case):
    signal = told(RESUMED[case], reference)
    whole, broken = (tiny_config(tiny_data, tmp_path / name, signal=signal, **LONG) for name in ("whole", "broken"))
    run(whole)
    for step in (1, 8, 17):
        stop_at(broken, step)
    run(broken)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))
    assert remembered(tmp_path / "broken") == remembered(tmp_path / "whole")
    assert bool(remembered(tmp_path / "whole")) == (case != "shuffled")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lagged", "famo"])
def test_two_ranks_resume_bitwise_and_one_goes_on_where_two_stopped(tiny_data, tmp_path, reference, case):
    given = {"signal": RESUMED[case], "backend": {"name": "deepspeed", "stage": 2}, **LONG}
    whole, broken, moved = (tiny_config(tiny_data, tmp_path / name, **given) for name in ("whole", "broken", "moved"))
    gang.ranks(2, run_status, whole.model_dump())
    for config in (broken, moved):
        assert all("after step 11" in words for words in gang.ranks(2, stop_rank, config.model_dump(), 11))
    gang.ranks(2, run_status, broken.model_dump())
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))
    assert remembered(tmp_path / "broken") == remembered(tmp_path / "whole")
    run(tiny_config(tiny_data, tmp_path / "moved", **{**given, "backend": {}}))
    run(tiny_config(tiny_data, tmp_path / "alone", **{**given, "backend": {}}))
    for other in ("whole", "moved"):
        lines = [traces(tmp_path / name)[2] for name in (other, "alone")]
        for a, b in zip(*lines, strict=True):
            assert a.get("loss") == pytest.approx(b.get("loss"), abs=2e-5)
            assert a.get("signal", {}).get("ess") == pytest.approx(b.get("signal", {}).get("ess"), abs=1e-4)


@pytest.mark.parametrize("tokens", [200, 10_000])
def test_held_out_losses_are_handed_on_when_they_are_due(tiny_data, tmp_path, monkeypatch, tokens):
    """At step 0, before a weight has moved, and then every so many steps; of each source by itself."""
    seen = []
    monkeypatch.setattr(SIGNALS["famo"], "validated", lambda self, losses, step, **_: seen.append((step, losses)))
    signal, ruler = {"name": "famo", "every": 3, "tokens": tokens}, {"every": 3, "tokens": tokens}
    run(tiny_config(tiny_data, tmp_path / "out", signal=signal, eval=ruler))
    assert [step for step, _ in seen] == [0, 3, 6]
    lines = [line["eval"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "eval" in line]
    measured = [[line["sources"][name]["loss"] for name in ("plain", "noisy")] for line in lines[:2]]
    assert [losses.tolist() for _, losses in seen[1:]] == measured  # the evaluations after steps 3 and 6


# --------------------------------------------------------------------------------------------------- reference losses


@pytest.mark.slow
@pytest.mark.parametrize("mask", [False, True])
def test_reference_losses_are_the_models(tiny_data, tmp_path, mask):
    config, dataset = tiny_config(tiny_data, tmp_path / "run", data={"document_mask": mask}), open_dataset(tiny_data)
    run(config)
    folder = write_reference(ReferenceConfig(run=str(tmp_path / "run"), out=str(tmp_path / "losses"), batch_size=7))
    model = load_model(config, dataset, tmp_path / "run").double()
    for name in ("plain", "noisy"):
        windows = dataset.windows(name, "train", 32)
        windows = torch.from_numpy(windows[np.arange(len(windows))].astype(np.int64))
        inputs, targets = windows[:, :-1], windows[:, 1:]
        documents = (inputs == dataset.tokenizer.delimiter).cumsum(1) if mask else None
        logits = model(inputs, documents=documents).detach()
        exact = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none").numpy()
        written = np.load(folder / f"{name}.npy")
        assert written.dtype == np.float16 and written.shape == exact.shape
        assert np.abs(written - exact).max() <= 2**-11 * exact.max() + 1e-4  # half of a digit of fp16, and fp32


def test_the_model_that_judges_is_the_last_checkpoint(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "run", layer={"name": "lost", "rank": 8, "density": 0.1})
    run(config)
    last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    saved = load_file(last / "model.safetensors") | load_file(last / "buffers.safetensors")
    model = load_model(config, open_dataset(tiny_data), tmp_path / "run")
    assert any(name.endswith("sp_index") for name in saved)
    ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(
        (ours[name].detach().numpy() == tensor.reshape(ours[name].shape)).all() for name, tensor in saved.items()
    )


@pytest.mark.parametrize("sources", [{}, {"noisy": {"weight": 1.0}, "plain": {"weight": 2.0}}])
def test_a_row_meets_its_own_losses(tiny_data, reference, sources):
    """Looked up by the sources and windows of a mixture, or computed anew from the tokens."""
    config, dataset = tiny_config(tiny_data, "-", data={"sources": sources}), open_dataset(tiny_data)
    model, plan = load_model(config, dataset, reference.parent / "run"), make_plan(config, dataset, 8)
    look_up, batch_of = open_reference(reference, dataset, plan), batches(plan, 0, 1, torch.device("cpu"))
    seen = set()
    for step in range(8):
        batch = batch_of(step)
        with torch.no_grad():
            losses = model(*split_windows(batch.tokens))
        assert (look_up(batch) - losses).abs().max() <= 2**-11 * losses.max() + 1e-4
        seen |= set(batch.source.tolist())
    assert seen == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rho1", "doremi", "curriculum"])
def test_from_a_run_to_a_run(tiny_data, tmp_path, monkeypatch, name):
    """As a user does it, with folders of one's own and one source left out."""
    monkeypatch.chdir(tmp_path)
    run(tiny_config(tiny_data, tmp_path / "small"))
    assert main(["reference", "run=small", "out=losses", "batch_size=7"]) == 0
    signal = {"name": name, "reference": "losses", **({"until": 1.0} if name == "curriculum" else {})}
    sources = {"noisy": {"weight": 1.0}}
    entry = run(tiny_config(tiny_data, tmp_path / "out", signal=signal, data={"sources": sources}))
    assert entry["method"] == name and entry["status"] == "done"
    lines = [line["signal"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "signal" in line]
    assert len(lines) == 8 and all(line["share"] == {"noisy": pytest.approx(1)} for line in lines)
    if name == "rho1":
        assert [line["ess"] for line in lines] == [pytest.approx(0.6, abs=2e-3)] * 8


def refusal(function, *arguments):
    with pytest.raises(UserError) as refused:
        function(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_reference_losses_cannot_be_used_for(tiny_data, reference, tmp_path):
    def rho1(folder=reference, **data):
        signal = {"name": "rho1", "reference": str(folder)}
        return tiny_config(tiny_data, tmp_path / "out", signal=signal, data=data)

    assert "reference.json is missing; write it with: thriftlab reference run=" in refusal(run, rho1(tmp_path / "no"))
    assert "of sequence_length 32, and this run has 16; write others" in refusal(run, rho1(sequence_length=16))
    copy = shutil.copytree(reference, tmp_path / "copy")
    entry = read_reference(reference)
    replace_atomically(copy / "reference.json", seal({**entry, "data": "other"}))
    assert f"of data other, and this run has {entry['data']}; write others" in refusal(run, rho1(copy))
    replace_atomically(copy / "reference.json", seal(entry))
    raw = bytearray((copy / "plain.npy").read_bytes())
    raw[-1] ^= 1
    (copy / "plain.npy").write_bytes(raw)
    assert "plain.npy does not match reference.json; write it again" in refusal(run, rho1(copy))
    (copy / "noisy.npy").unlink()
    (copy / "plain.npy").write_bytes((reference / "plain.npy").read_bytes())
    for verify in (True, False):
        assert "noisy.npy cannot be read (" in refusal(run, rho1(copy, verify=verify))
    np.save(copy / "noisy.npy", np.zeros((3, 32), np.float16))
    assert "noisy.npy does not match reference.json" in refusal(run, rho1(copy, verify=False))
    text = (copy / "reference.json").read_text()
    (copy / "reference.json").write_text(text.replace('"sequence_length": 32', '"sequence_length": 33'))
    assert "reference.json is damaged" in refusal(run, rho1(copy))
    assert not (tmp_path / "out" / "record.json").exists()


def test_what_cannot_judge(tiny_data, tmp_path, capsys):
    stop_at(tiny_config(tiny_data, tmp_path / "half", **LONG), 8)
    assert main(["reference", f"run={tmp_path / 'half'}"]) == 2
    assert "record.json" in capsys.readouterr().err
    assert main(["reference", f"run={tmp_path / 'none'}"]) == 2
    assert main(["reference"]) == 2
    assert "run" in capsys.readouterr().err
    run(tiny_config(tiny_data, tmp_path / "done"))
    shutil.copytree(tiny_data, tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    manifest["tokenizer"]["vocab_size"] += 1
    write_manifest(tmp_path / "other", manifest)
    assert main(["reference", f"run={tmp_path / 'done'}", f"data={tmp_path / 'other'}"]) == 2
    assert "has another; prepare one of them again with the tokenizer of the other" in capsys.readouterr().err


def test_the_result_depends_on_the_reference_and_not_on_where_it_lies(reference, tmp_path):
    def print_of(folder):
        return fingerprint(RunConfig(signal={"name": "rho1", "reference": str(folder)}), "")

    copy = shutil.copytree(reference, tmp_path / "copy")
    assert print_of(copy) == print_of(reference)
    replace_atomically(copy / "reference.json", seal({**read_reference(reference), "run": "another"}))
    assert print_of(copy) != print_of(reference)


# ------------------------------------------------------------------------------------------------------ what is said


def test_a_batch_that_counts_like_less_than_half_is_warned_of_once(tiny_data, tmp_path):
    with pytest.warns(
        RuntimeWarning, match=r"step \d: the weights leave an effective batch of \d\d% of its tok"
    ) as seen:
        run(tiny_config(tiny_data, tmp_path / "sharp", signal={"name": "extremes", "r": 0.02, "warmup": 0.0}))
    assert len([w for w in seen if "effective batch" in str(w.message)]) == 1


def test_a_gentle_signal_is_not_warned_of(tiny_data, tmp_path, recwarn):
    run(tiny_config(tiny_data, tmp_path / "gentle", signal={"name": "linupper", "r": 10}))
    assert not [w for w in recwarn if "effective batch" in str(w.message)]
    lines = read_metrics(tmp_path / "gentle" / "metrics.jsonl")
    assert all(0.9 < line["signal"]["ess"] < 1 for line in lines if "signal" in line)
    assert read_record(tmp_path / "gentle" / "record.json")["signal"] == {}
