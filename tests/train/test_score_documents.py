"""Nats per token under a finished run: against the model called plainly, document by document."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from tests.tools.tiny import tiny_config
from thriftlab.data.corpora.synthetic import generate
from thriftlab.data.errors import UserError
from thriftlab.data.shards import open_dataset
from thriftlab.launch import cli
from thriftlab.train import score_documents
from thriftlab.train.config.schema import DataConfig
from thriftlab.train.loop import run
from thriftlab.train.score_documents import Scorer, scorer

LENGTH = 32
TEXTS = [
    "", "a", "x" * LENGTH, "y" * (LENGTH + 1), "ß and \U0001f600", "<|endoftext|> is text",
    *generate(documents=3, words=150), *generate(documents=2, words=5, noise=0.5),
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("judge") / "run"
    run(tiny_config(tiny_data, out, optim={"lr": 1e-2}))
    return out


def plain_nats(model, text):
    """In windows of LENGTH from the delimiter on; logits from the hidden states, losses from log_softmax."""
    ids = [256, *text.encode()]
    total = 0.0
    for start in range(0, len(ids) - 1, LENGTH):
        inputs, targets = ids[start : start + LENGTH], ids[start + 1 : start + LENGTH + 1]
        inputs = torch.tensor(inputs[: len(targets)])[None]
        with torch.no_grad():
            logits = model(inputs)[0]
        total += float(F.cross_entropy(logits.double(), torch.tensor(targets), reduction="sum"))
    return total / max(len(ids) - 1, 1)


def test_nats_are_those_of_the_model(finished):
    score = scorer(finished)
    _, _, model = score_documents.load(finished)
    found, wanted = score(TEXTS), [plain_nats(model, text) for text in TEXTS]
    assert found.dtype == np.int32 and found[0] == 0
    assert np.abs(found / score_documents.UNIT - wanted).max() < 0.5e-3 + 2e-5
    assert np.ptp(found[1:]) > score_documents.UNIT / 10
    thousandths = np.rint(found / score_documents.UNIT * 1000).astype(np.int64)
    assert (thousandths * score_documents.UNIT // 1000 == found).all()


def test_scores_depend_neither_on_the_batch_nor_on_the_process(finished, monkeypatch):
    whole = scorer(finished)(TEXTS)
    again = pickle.loads(pickle.dumps(Scorer(finished)))
    score_documents.load.cache_clear()
    assert np.concatenate([again(TEXTS[:4]), again([]), again(TEXTS[4:][::-1])[::-1]]).tolist() == whole.tolist()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert again(iter(TEXTS)).tolist() == whole.tolist() and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_every_id_is_a_target_once():
    for size in (0, 1, 2, 5, 6, 7, 200):
        ids = np.arange(size + 1, dtype=np.uint32)
        rows = list(score_documents.windows(ids, 6))
        assert [int(i) for block in rows for row in block for i in row[1:]] == ids[1:].tolist()
        assert all((block[:, 1:] == block[:, :-1] + 1).all() and len(block) <= score_documents.ROWS for block in rows)


def test_what_decides_a_score_is_told(finished):
    about = scorer(finished).about()
    record = json.loads((finished / "record.json").read_text())
    assert about == {"run": record["fingerprint"], "cpu": record["machine"]["cpu"]}


def test_a_run_without_an_end_or_finite_losses_is_refused(finished, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="record.json"):
        scorer(tmp_path)
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint"):
        scorer(copy)
    losses = np.full((1, 1), np.nan, np.float32)
    monkeypatch.setattr(score_documents, "token_losses", lambda *_: losses)
    with pytest.raises(UserError, match="losses that are not finite"):
        scorer(finished)(["a"])


@pytest.mark.slow
def test_prepare_scores_with_a_run_and_training_chooses_by_it(finished, tmp_path, capsys):
    """From the command line to a run that reads only what the model finds likely."""
    made = tmp_path / "made"
    prepare = ["prepare", f"out={made}", "inputs.a.path=synthetic:documents=60", f"perplexity.run={finished}",
               "pools.by=model", "pools.count=2"]  # fmt: skip
    assert cli.main(prepare) == 0
    files = sorted((made / "documents").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist() if row["split"] == "train"]
    nats = scorer(finished)([row["text"] for row in rows])
    assert [row["model"] for row in rows] == pytest.approx((nats / 65536).tolist(), rel=1e-6)
    config = tiny_config(made, tmp_path / "run")
    chosen = config.model_copy(update={"data": DataConfig.model_validate(
        config.data.model_dump() | {"sources": {"a": {"where": "pool==0"}}}
    )})  # fmt: skip
    record = run(chosen)
    assert record["results"]["loss"] > 0
    tokens = sum(row["tokens"] for row in rows if row["pool"] == 0)
    assert open_dataset(made).windows("a", "train", LENGTH, "pool==0").tokens == tokens
    assert cli.main(prepare) == 0 and "already prepared" in capsys.readouterr().out
