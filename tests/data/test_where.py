"""Expressions over scores: against Python's own evaluation in fractions, and what is refused."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftlab.data.errors import DataError
from thriftlab.data.where import parse

UNITS = {"score": 65536, "trigram": 65536, "pool": 1, "model": 1000}
OPERATORS = [">", ">=", "<", "<=", "==", "!="]
NUMBERS = st.one_of(
    st.integers(-4, 4).map(str),
    st.decimals(-5, 5, places=4).map(str),
    st.sampled_from(["0.5", "-.25", "1e-9", "2e9", "123456789012", "-1e300", "0.0001220703125"]),
)


@st.composite
def comparisons(draw):
    """Text with marks around its numbers: a column beside a number, in either order, sometimes between two."""
    name, a, b = draw(st.sampled_from(sorted(UNITS))), f"«{draw(NUMBERS)}»", f"«{draw(NUMBERS)}»"
    first, second = draw(st.sampled_from(OPERATORS)), draw(st.sampled_from(OPERATORS))
    return draw(st.sampled_from([f"{name}{first}{a}", f"{a} {first} {name}", f"{a}{first}{name}{second}{b}"]))


EXPRESSIONS = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        inner.map(lambda e: f"not ({e})"),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({t[0]}) {t[1]} {t[2]}"),
    ),
    max_leaves=6,
)
VALUES = st.one_of(st.integers(-5, 5), st.integers(-(2**31), 2**31 - 1), st.integers(-(2**18), 2**18))
ROWS = st.lists(st.tuples(*[VALUES] * len(UNITS)), min_size=1, max_size=6)


@given(EXPRESSIONS, ROWS)
@settings(deadline=None, max_examples=150)
def test_choices_are_those_of_fractions(expression, rows):
    columns = {name: np.array([row[i] for row in rows], np.int32) for i, name in enumerate(UNITS)}
    found = parse(expression.replace("«", "").replace("»", "")).choose(columns, UNITS)
    exact = expression.replace("«", "Fraction('").replace("»", "')")
    for i in range(len(rows)):
        values = {name: Fraction(int(columns[name][i]), unit) for name, unit in UNITS.items()}
        assert found[i] == eval(exact, {"Fraction": Fraction}, values)


def test_no_rounding_decides():
    """0.7 is 45875.2 units, 0.5 is 32768 of them, and 1/3 of a unit beside a value is another value."""
    score = {"score": np.array([32767, 32768, 32769, 45875, 45876], np.int32)}

    def chosen(text):
        return parse(text).choose(score, UNITS).tolist()

    assert chosen("score>0.7") == chosen("score>=0.7") == [False] * 4 + [True]
    assert chosen("score>0.5") == [False, False, True, True, True]
    assert chosen("score>=.5") == [False, True, True, True, True]
    assert chosen("score==0.5") == [False, True, False, False, False]
    assert chosen("score==0.7") == [False] * 5 and chosen("score!=0.7") == [True] * 5
    assert chosen("0.5 < score < 0.7") == [False, False, True, True, False]
    assert chosen(" score > 0.7 or not score >= 0.5 ") == [True, False, False, False, True]


def test_names_and_pickles():
    where = parse("score>0.5 and (trigram<4 or not pool==3) and score<1")
    assert where.columns == ["pool", "score", "trigram"]
    columns = {name: np.array([3, 40000], np.int32) for name in where.columns}
    again = pickle.loads(pickle.dumps(where))
    assert again.choose(columns, UNITS).tolist() == where.choose(columns, UNITS).tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not an expression"),
        ("score>", "not an expression"),
        ("score=0.5", "not an expression"),
        ("score>0.5\nand pool==1", "not an expression"),
        ("not " * 5000 + "pool==1", "not an expression"),
        ("score", "score is not a comparison"),
        ("0.5", "0.5 is not a comparison"),
        ("score>0.5 and pool", "pool is not a comparison"),
        ("score>0.5 & (pool==1)", "0.5 & (pool == 1) is not a number"),
        ("score>trigram", "score > trigram does not compare a score with a number"),
        ("1<2", "1 < 2 does not compare a score with a number"),
        ("score in 1", "score in 1 does not compare a score with a number"),
        ("score>'0.5'", "'0.5' is not a number"),
        ("score>True", "True is not a number"),
        ("score>1e999", "1e309 is not a number"),
        ("score>2j", "2j is not a number"),
        ("score+1>2", "score + 1 > 2 does not compare a score with a number"),
        ("__import__('os').getcwd()", "is not a comparison"),
        ("pool==__import__('os').getpid()", "is not a number"),
        ("score>0.5 if pool==1 else pool==2", "is not a comparison"),
        ("[x for x in pool]", "is not a comparison"),
        ("score>0\0", "not an expression"),
    ],
)
def test_what_is_no_such_expression_is_refused_in_a_line(text, says):
    with pytest.raises(DataError) as error:
        parse(text)
    assert str(error.value).startswith(f"where={text!r}: ") and "\n" not in str(error.value)
    assert f"{says}; write comparisons of a score with a number" in str(error.value)


def test_an_unknown_score_is_refused():
    columns = {"score": np.zeros(1, np.int32), "pool": np.zeros(1, np.int32)}
    with pytest.raises(DataError, match=r"^where='scor>0.5': no score 'scor'; did you mean score\?$"):
        parse("scor>0.5").choose(columns, UNITS)
    with pytest.raises(DataError, match="^where='pool==1 or x<1': no score 'x'; there is score, pool$"):
        parse("pool==1 or x<1").choose(columns, UNITS)
    with pytest.raises(DataError, match="there is none$"):
        parse("pool==1").choose({}, {})
