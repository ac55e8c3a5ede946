"""Sequences in which looking back pays: their chain, their periods, and how they come into windows."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from thriftlab.data.corpora.periodic import LETTERS, documents, generate
from thriftlab.data.corpora.readers import read
from thriftlab.data.errors import DataError
from thriftlab.data.shards import open_dataset
from thriftlab.launch.cli import main


def period(text):
    """The smallest period of a text, its length if there is none."""
    return next(p for p in range(1, len(text) + 1) if all(text[i] == text[i - p] for i in range(p, len(text))))


def test_a_sequence_is_a_function_of_its_number_and_the_seed():
    assert [*generate(5)] == [*generate(9)][:5] and [*generate(5)] == [*generate(5)]
    assert set(generate(5, seed=1)).isdisjoint(generate(5)) and len(set(generate(500))) == 500
    assert all(len(text) == 49 and set(text) <= set(LETTERS) for text in generate(50, length=49))


def test_about_half_are_periodic_with_periods_from_6_to_31():
    texts = [*generate(4000)]
    periods = Counter(period(text) for text in texts)
    within = sum(count for p, count in periods.items() if 6 <= p <= 31)
    assert 0.45 < within / len(texts) < 0.55
    assert {*range(6, 32)} <= {*periods}
    assert sum(count for p, count in periods.items() if p > 32) / len(texts) > 0.4  # the others have none
    assert {period(text) for text in generate(200, periodic=1)} <= {*range(1, 32)}


def test_a_letter_has_six_successors_with_weights_of_a_power():
    after = defaultdict(Counter)
    for text in generate(3000, periodic=0):
        for one, other in zip(text, text[1:], strict=False):
            after[one][other] += 1
    assert len(LETTERS) == 32 and set(after) == set(LETTERS) and {len(found) for found in after.values()} == {6}
    shares = np.mean([[n / found.total() for _, n in found.most_common()] for found in after.values()], 0)
    expected = np.array([k**-0.3 for k in range(1, 7)])
    assert shares == pytest.approx(expected / expected.sum(), abs=0.01)
    first = Counter(text[0] for text in generate(6400))
    assert set(first) == set(LETTERS) and max(abs(n - 200) for n in first.values()) < 6 * math.sqrt(200)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("lenght=3", "no argument 'lenght'"), ("length=x", "takes a number"), ("length=0", "at least 1"),
     ("successors=33", "1 to 32"), ("successors=0", "1 to 32")],
)  # fmt: skip
def test_a_wrong_argument_is_named(arguments, words):
    with pytest.raises(DataError, match=f"periodic.*{words}"):
        [*read(f"periodic:{arguments}")]


def test_a_document_is_a_window(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "prepare inputs.periodic.path=periodic:documents=300 holdout=0.1 holdout_bytes=0 out=here engine=here"
    assert main(command.split()) == 0
    data = open_dataset(tmp_path / "here")
    windows = data.windows("periodic", "train", 64)
    rows = windows[np.arange(len(windows))]
    assert windows.documents == len(windows) + 1 and (rows[:, 0] == 256).all() and (rows[:, 64] == 256).all()
    texts = {text for _, text, _ in documents("documents=300")}
    assert {data.tokenizer.decode(row[:64]) for row in rows} < texts
    assert main(command.split()) == 0  # the same request is known again
