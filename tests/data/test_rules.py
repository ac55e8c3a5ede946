"""The rules of cleaning, against references written from the papers: slow, and character by character."""

import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thriftlab.data import DataError, document_rule, line_rule
from thriftlab.data.plugins import load_plugin
from thriftlab.data.prepare.rules import RULES, chosen, families, gopher

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "rules.md").read_text()

# --- references: what each rule measures -----------------------------------------------------------------------------


def is_mark(word):
    return all(character in gopher.PUNCTUATION for character in word)


def share(flags):
    flags = list(flags)
    return flags.count(True) / len(flags)


def real_words(text):
    return [word for word in text.split() if not is_mark(word)]


def mean_length(text):
    lengths = [len(word) for word in real_words(text)]
    return sum(lengths) / len(lengths) if lengths else 0.0


def ends(line, tails):
    return any(line[-len(tail) :] == tail for tail in tails)


def later(parts):
    """Every part that stood before."""
    return [part for place, part in enumerate(parts) if part in parts[:place]]


def characters(parts):
    return sum(len(part) for part in parts)


def cut_at_runs(text, least):
    """At runs of `least` line ends or more."""
    parts, rest, run = [], "", 0
    for character in [*text, None]:
        if character == "\n":
            run += 1
            continue
        if run >= least:
            parts.append(rest)
            rest = ""
        else:
            rest += "\n" * run
        run = 0
        rest += character or ""
    return [*parts, rest]


def top(text, n):
    words = text.split()
    grams = [" ".join(words[place : place + n]) for place in range(len(words) - n + 1)]
    if not grams:
        return 0.0
    counts = [grams.count(gram) for gram in grams]
    best = grams[counts.index(max(counts))]  # the first of equals
    return len(best) * max(counts) / len(text)


def repeated(text, n):
    words, place, seen, found = text.split(), 0, [], 0
    while place + n <= len(words):
        gram = "".join(words[place : place + n])
        if gram in seen:
            found, place = found + len(gram), place + n
        else:
            seen.append(gram)
            place += 1
    return found / len(text)


def sentences(text):
    return sum(len(re.split(r"(?<=[.!?])\s+", line.strip())) for line in text.splitlines() if line.strip())


def solid(text):
    return [line for line in text.split("\n") if line.split()]


STOP = ("the", "be", "to", "of", "and", "that", "have", "with")
MEASURES = {
    "gopher-words": lambda text: len(real_words(text)),
    "gopher-word-length": mean_length,
    "gopher-hashes": lambda text: text.count("#") / len(text.split()),
    "gopher-ellipses": lambda text: (text.count("...") + text.count("…")) / len(text.split()),
    "gopher-bullets": lambda text: share(line.lstrip()[:1] in tuple("•-") for line in text.splitlines()),
    "gopher-ellipsis-lines": lambda text: share(ends(line.rstrip(), ("...", "…")) for line in text.splitlines()),
    "gopher-letters": lambda text: share(any(c.isalpha() for c in word) for word in text.split()),
    "gopher-stop-words": lambda text: sum(stop in text.split() for stop in STOP),
    "dclm-stop-words": lambda text: sum(text.split().count(stop) for stop in STOP),
    "gopher-duplicate-paragraphs": lambda text: len(later(p := cut_at_runs(text.strip(), 2))) / len(p),
    "gopher-duplicate-paragraph-characters": lambda t: characters(later(cut_at_runs(t.strip(), 2))) / len(t),
    "gopher-duplicate-lines": lambda text: len(later(parts := cut_at_runs(text, 1))) / len(parts),
    "gopher-duplicate-line-characters": lambda text: characters(later(cut_at_runs(text, 1))) / len(text),
    **{f"gopher-top-{n}-grams": lambda text, n=n: top(text, n) for n in (2, 3, 4)},
    **{f"gopher-duplicate-{n}-grams": lambda text, n=n: repeated(text, n) for n in range(5, 11)},
    "c4-sentences": sentences,
    "c4-paragraphs": lambda text, long=200: len([line for line in text.split("\n") if not len(line) < long]),
    "fineweb-punctuation": lambda text: share(line[-1] in gopher.TERMINAL for line in solid(text)),
    "fineweb-short-lines": lambda text, short=30: share(not len(line) > short for line in solid(text)),
    "fineweb-duplicate-characters": lambda text: characters(later(solid(text))) / len(text.replace("\n", "")),
    "fineweb-newlines": lambda text: text.count("\n") / len(text.split()),
    "refinedweb-removed": lambda text: 0.0,
}

PARTS = st.sampled_from(
    "a b ab ba c the of The and x. y! z? wait... so… … ... - • # ## 1 12 2 123 —quote— “ it's Über ½ １ 北京。 । "
    "Lorem JavaScript javascript { terms [1] [] [edit] [citation needed]. [x] end\" end' LIKES UP".split(" ")
    + ["", "w" * 29, "w" * 30, "v" * 1001, "v" * 1000, "lorem ipsum", "Privacy Policy", "terms of use", "use cookies"]
    + ["a b c d e f g h i j k l."]
)
GAPS = st.sampled_from(
    [" "] * 12 + ["\n"] * 6 + ["\n\n", "\n\n\n", "\n\n\n\n", " \n", "\n ", "  ", "\t", "\f", "\x85", "\u2028"]
)


@st.composite
def texts(draw):
    """Of few words, so that much is repeated."""
    words = draw(st.lists(st.tuples(PARTS, GAPS), min_size=1, max_size=60))
    again = draw(st.integers(0, len(words)))
    words += words[again : again + draw(st.integers(0, 30))] * draw(st.integers(0, 3))
    return "".join(part + gap for part, gap in words)


def passes(name, text, **thresholds):
    return chosen([name], {name: thresholds}).clean(text).reason is None


# --- document rules --------------------------------------------------------------------------------------------------


def test_every_document_rule_has_a_reference():
    assert {rule.name for rule in RULES.values() if not rule.edits and not rule.file} == MEASURES.keys()


@pytest.mark.parametrize("name", MEASURES)
@settings(max_examples=60, deadline=None)
@given(text=texts())
def test_a_document_passes_at_what_it_measures_and_not_just_beyond(name, text):
    if not text.split():
        return
    value = MEASURES[name](text)
    least = "least" in RULES[name].thresholds
    for key, away in [("least", math.inf)] * least + [("most", -math.inf)] * ("most" in RULES[name].thresholds):
        others = {"least": -math.inf, "most": math.inf}
        open_ends = {other: others[other] for other in RULES[name].thresholds if other in others and other != key}
        assert passes(name, text, **open_ends, **{key: value})
        assert not passes(name, text, **open_ends, **{key: math.nextafter(value, away)})


@pytest.mark.parametrize("n", [2, 3, 4])
def test_numbers_of_n_grams_fit_whatever_the_vocabulary(n, monkeypatch):
    """With so large a vocabulary the numbers of pairs are made anew before they are extended."""
    from thriftlab.data.prepare.rules import repetition

    numbered = repetition._numbered
    monkeypatch.setattr(repetition, "_numbered", lambda text: numbered(text)._replace(size=2**31))
    for same in ("y z", "x y z"):
        text = " ".join(f"{head} {same}" for head in "abcdefgh")
        assert passes(f"gopher-top-{n}-grams", text, most=top(text, n))
        assert not passes(f"gopher-top-{n}-grams", text, most=math.nextafter(top(text, n), 0))


@pytest.mark.parametrize("name", [name for name in RULES if "duplicate" in name and name.endswith("-grams")])
def test_duplicates_do_not_depend_on_the_hash(name, monkeypatch):
    """With a base of 1 the hash is the sum of the characters, and many different n-grams share one."""
    from thriftlab.data.prepare.rules import repetition

    monkeypatch.setattr(repetition, "_BASE", 1)
    monkeypatch.setattr(repetition, "_INVERSE", 1)
    text = "a b c d e f g h i j b a c d e f g h i j k a b c d e f g h i j l " * 2 + "1 2 3 4 5 6 7 8 9 10 11 2 3 "
    value = MEASURES[name](text)
    assert value > 0 and passes(name, text, most=value) and not passes(name, text, most=math.nextafter(value, 0))


def filler(length):
    """So many characters of different words, with a space before each."""
    text = "".join(f" {one}{other}{one}" for one in "qrstuv" for other in "0123456789")[:length]
    return text if not text.endswith(" ") else text[:-1] + "q"


def twice(words, length):
    """Some words, twice, in a text of `length` characters."""
    return (text := f"{words} zz {words}") + filler(length - len(text))


def words_of(count, total, letters="abcdefghijk"):
    """`count` different words of `total` characters together."""
    return [letter * (1 + (total - count if place == 0 else 0)) for place, letter in enumerate(letters[:count])]


def lines(count, of, line, other):
    return "\n".join([line] * count + [f"{other} {number:02}" for number in range(of - count)])


W = "word " * 47
AT_THE_LIMITS = [  # rule, a text that just passes, one that just fails
    ("gopher-words", "w " * 50 + "- ... —", "w " * 49 + "- ... —"),
    ("gopher-words", "w " * 100_000 + "-", "w " * 100_001),
    ("gopher-word-length", "abc " * 10 + "-", "abc " * 9 + "ab"),
    ("gopher-word-length", "abcdefghij " * 10 + "-", "abcdefghij " * 10 + "abcdefghijk"),
    ("gopher-hashes", "w " * 49 + "#####", "w " * 49 + "######"),
    ("gopher-ellipses", "w " * 48 + "...... ………", "w " * 48 + "...... …………"),
    ("gopher-bullets", lines(9, 10, "  - a", "b"), lines(10, 11, " • a", "b")),
    ("gopher-ellipsis-lines", lines(3, 10, "a...  ", "b"), lines(4, 13, "a…", "b")),
    ("gopher-letters", "w " * 40 + "1 " * 10, "w " * 39 + "1 " * 10),
    ("gopher-stop-words", "the cat of The", "the cat the Of"),
    ("dclm-stop-words", "the cat the", "the cat The"),
    ("gopher-duplicate-paragraphs", "\n\n".join([*"abcdefg"] + ["a"] * 3), "\n\n\n".join([*"abcde"] + ["a"] * 3)),
    ("gopher-duplicate-paragraph-characters", "bb\n\naa\n\naa", "b\n\naa\n\naa"),
    ("gopher-duplicate-lines", "\n".join([*"abcdefg"] + ["a"] * 3), "\n".join([*"abcdef"] + ["a"] * 3)),
    ("gopher-duplicate-line-characters", "b" * 4 + "\naa\naa", "b" * 3 + "\naa\naa"),
    *((f"gopher-top-{n}-grams", twice(gram := " ".join(words_of(n, total)), 100), twice(gram, 99))
      for n, total in ((2, 9), (3, 7), (4, 5))),
    *((f"gopher-duplicate-{n}-grams", twice(gram := " ".join(words_of(n, 20 - n)), 100), twice(gram, 99))
      for n in range(5, 11)),
    ("c4-sentences", "a. b! c? d. e", "a. b! c? d. e."[:-3]),
    ("c4-paragraphs", "\n".join(["a" * 200] * 3), "\n".join(["a" * 200, "a" * 199, "a" * 200])),
    ("fineweb-punctuation", lines(3, 25, "a.", "b"), lines(2, 25, "a.", "b")),
    ("fineweb-short-lines", lines(67, 100, "a" * 30, "b" * 31), lines(68, 100, "a" * 30, "b" * 31)),
    ("fineweb-duplicate-characters", "a\na\n" + "b" * 98, "a\na\n" + "b" * 97),
    ("fineweb-newlines", "a b c d e f g h\ni\n\nj", "a b c d e f g h\ni\n\n\nj"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(AT_THE_LIMITS)), ids=lambda i: f"{AT_THE_LIMITS[i][0]}-{i}")
def test_default_thresholds_are_kept_by_equality(number):
    name, good, bad = AT_THE_LIMITS[number]
    assert chosen([name], {}).clean(good) == (good, None, {})
    assert chosen([name], {}).clean(bad) == (bad, name, {})


def test_every_document_rule_is_tried_at_its_default_threshold():
    assert {name for name, _, _ in AT_THE_LIMITS} == MEASURES.keys() - {"refinedweb-removed"}


def test_the_reference_of_punctuation_is_unicodes():
    """Spot checks of what the ranges hold."""
    assert len(gopher.TERMINAL) == 159 and len(gopher.PUNCTUATION) == 281
    assert {*"!.?。।؟۔…"} - {"…"} < {*gopher.TERMINAL} and not {*'",;:)'} & {*gopher.TERMINAL}
    assert {*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…—“”１\x85"} < {*gopher.PUNCTUATION}
    assert not {*"aZ09é½№ \n"} & {*gopher.PUNCTUATION}


# --- line rules ------------------------------------------------------------------------------------------------------


def c4(text, punctuation=True):
    """(text, reason, edits) of C4's algorithm."""
    kept, edits = [], {}

    def edit(name):
        edits[f"c4-{name}"] = edits.get(f"c4-{name}", 0) + 1

    for line in text.splitlines():
        line = line.strip()
        words = line.split()
        if [word for word in words if len(word) > 1000]:
            edit("long-words")
            continue
        without = re.sub(r"\[[0-9]*\]|\[edit\]|\[citation needed\]", "", line)
        if without != line:
            edit("citations")
        line = without
        if punctuation and (line[-1:] not in tuple(".?!\"'") or line[-3:] == "..."):
            edit("punctuation")
            continue
        if len(words) < 3:
            edit("words")
            continue
        if re.search("lorem ipsum", line, re.IGNORECASE):
            return text, "c4-lorem-ipsum", edits
        if re.search("javascript", line, re.IGNORECASE):
            edit("javascript")
            continue
        if "{" in line:
            return text, "c4-curly-bracket", edits
        if re.search("terms of use|privacy policy|cookie policy|uses? cookies|use of cookies", line, re.IGNORECASE):
            edit("policy")
            continue
        kept.append(line)
    after = "\n".join(kept).strip()
    return after, "c4-sentences" if sentences(after) < 5 else None, edits


@pytest.mark.parametrize("family", ["c4", "c4-no-punctuation"])
@settings(max_examples=200, deadline=None)
@given(text=texts())
def test_c4_is_its_algorithm(family, text):
    assert chosen([family], {}).clean(text) == c4(text, punctuation=family == "c4")


LONG = "One two. Three four! Five six? Seven eight. Nine ten."


@pytest.mark.parametrize(
    "line, expected",
    {
        "a bracket { kills.": ("c4-curly-bracket", {}),
        "a bracket { on a line that goes": (None, {"c4-punctuation": 1}),
        "two {.": (None, {"c4-words": 1}),
        "javascript and { are here.": (None, {"c4-javascript": 1}),
        "cookies: we use cookies and {.": ("c4-curly-bracket", {}),
        "Lorem Ipsum, and javascript.": ("c4-lorem-ipsum", {}),
        "Lorem Ipsum on a line that goes": (None, {"c4-punctuation": 1}),
        "ends in dots...": (None, {"c4-punctuation": 1}),
        "ends in an ellipsis…": (None, {"c4-punctuation": 1}),
        "Our Cookie Policy is here.": (None, {"c4-policy": 1}),
        "v" * 1001 + " is { long.": (None, {"c4-long-words": 1}),
        "See [1] here.": (None, {"c4-citations": 1}),
        "Cited at the end. [2]": (None, {"c4-citations": 1, "c4-punctuation": 1}),
        "he said 'yes'": (None, {}),
    }.items(),
    ids=range(14),
)
def test_a_line_meets_c4s_rules_in_order(line, expected):
    text = f"{LONG}\n  {line}  \n{LONG}"
    cleaned = chosen(["c4"], {}).clean(text)
    assert cleaned == c4(text) and (cleaned.reason, cleaned.edits) == expected


def test_the_first_line_that_drops_the_document_names_the_reason():
    text = f"{LONG}\nA bracket {'{'} here.\nLorem ipsum dolor."
    for names in (["c4"], ["c4-lorem-ipsum", "c4-curly-bracket"]):
        assert chosen(names, {}).clean(text) == (text, "c4-curly-bracket", {})


def refinedweb(text):
    """(text, reason, edits), rule by rule over all lines."""
    lines, edits = text.split("\n"), {}

    def drop(name, bad):
        nonlocal lines
        gone = [line for line in lines if line and bad(line)]
        lines = [line for line in lines if not (line and bad(line))]
        if gone:
            edits[f"refinedweb-{name}"] = len(gone)

    def cut(name, change):
        nonlocal lines
        after = [change(line) if len(line.split()) <= 10 else line for line in lines]
        if changed := [1 for one, other in zip(lines, after, strict=True) if one != other]:
            edits[f"refinedweb-{name}"] = len(changed)
        lines = [new for old, new in zip(lines, after, strict=True) if old == new or new.split()]

    counted = "likes shares comments retweets reposts quotes bookmarks upvotes downvotes downloads views followers"
    drop("capitals", lambda line: sum(c.isupper() for c in line) * 2 > len(line))
    drop("digits", lambda line: all(c.isdigit() for c in line))
    drop("counters", lambda line: re.search(rf"^\W*\d[,.\d]*[KMB]?\s+({'|'.join(counted.split())})\W*$", line, re.I))
    drop("words", lambda line: len(line.split()) < 2)
    cut("cart", lambda line: re.sub(r"(?i)\s?items in cart", "", line))
    cut("read-more", lambda line: re.sub(r"(?i)\s?read more[.]{3}$", "", line))
    cut("sign-in", lambda line: re.sub(r"(?i)^sign-in\s?", "", line))
    edited = "\n".join(lines).strip()
    while "\n\n\n" in edited:
        edited = edited.replace("\n\n\n", "\n\n")
        edits["refinedweb-newlines"] = 0
    if "refinedweb-newlines" in edits:
        edits["refinedweb-newlines"] = "\n".join(lines).strip().count("\n") - edited.count("\n")
    before, after = len(text.split()), len(edited.split())
    return edited, "refinedweb-removed" if before and (before - after) / before > 0.05 else None, edits


SHORT = """An Ordinary Line of words|two words|SHOUTED LINE|ABcd|ABCd|2024|12 ٣٤|3 likes|(1,204 Views)|2.5K followers!
|7 likes each|5likes|one| |||\t x|Sign-in|Sign-in to read|sign-in now Read more...|Read more...|read more
|No, read more... never|1 items in cart|items in cart|a b c d e f g h items in cart|a b c d e f g items in cart
|ÜBER ÄÖ x|Read more…""".replace("\n", "").split("|")
WEB = st.sampled_from(
    SHORT + [f"a long line of {n} words, so that what is removed is a small share of them" for n in range(9)]
)


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(WEB, max_size=14), long=st.integers(0, 12))
@example(lines=["An Ordinary Line of words", "", "one", "", "two words"], long=9)
def test_refinedweb_is_its_rules_one_after_the_other(lines, long):
    text = "\n".join([*lines, *["so many words that it stays and what goes is a small share of them all"] * long])
    assert chosen(["refinedweb"], {}).clean(text) == refinedweb(text)


def test_refinedweb_drops_a_document_that_loses_more_than_a_twentieth_of_its_words():
    rest = "\n".join(["ten words in this line are what it has, yes"] * 9)
    exactly = f"{rest}\nfive words in this line\nNOW BUY IT ALL TODAY"
    assert chosen(["refinedweb"], {}).clean(exactly) == (exactly[:-21], None, {"refinedweb-capitals": 1})
    beyond = f"{rest}\nfour words in this\nNOW BUY IT ALL TODAY"
    assert chosen(["refinedweb"], {}).clean(beyond).reason == "refinedweb-removed"
    # What C4's rules take does not count.
    assert chosen(["refinedweb", "c4-punctuation"], {}).clean(exactly).reason is None


# --- thresholds of line rules ----------------------------------------------------------------------------------------

LINE_THRESHOLDS = [  # rule, thresholds, lines, what stays
    ("c4-long-words", {"most": 3}, ["abc abc", "abcd"], ["abc abc"]),
    ("c4-words", {"least": 2}, ["a b", "a"], ["a b"]),
    ("refinedweb-capitals", {"most": 0.25}, ["Abcd", "ABcd", "ÄÖcd"], ["Abcd"]),
    ("refinedweb-words", {"least": 3}, ["a b c", "a b", ""], ["a b c"]),
    ("refinedweb-cart", {"words": 4}, ["1 items in cart", "a b items in cart"], ["1", "a b items in cart"]),
    ("refinedweb-read-more", {"words": 3}, ["a Read more...", "a b Read more..."], ["a", "a b Read more..."]),
    ("refinedweb-sign-in", {"words": 2}, ["Sign-in a", "Sign-in a b"], ["a", "Sign-in a b"]),
    ("refinedweb-newlines", {"most": 1}, ["a", "", "", "b"], ["a", "b"]),
]


@pytest.mark.parametrize("name, thresholds, before, after", LINE_THRESHOLDS, ids=lambda v: v if type(v) is str else "")
def test_thresholds_of_line_rules(name, thresholds, before, after):
    cleaned = chosen([name], {name: thresholds}).clean("\n".join(before))
    assert cleaned.text == "\n".join(after) and cleaned.edits.keys() == {name}


def test_parameters_of_document_rules():
    assert passes("c4-paragraphs", "ab\nabc\nabc", least=2, characters=3)
    assert not passes("c4-paragraphs", "ab\nabc\nabc", least=2, characters=4)
    assert passes("fineweb-short-lines", "ab\nabc\nabc", most=0.4, characters=2)
    assert not passes("fineweb-short-lines", "ab\nabc\nabc", most=0.4, characters=3)


# --- several rules ---------------------------------------------------------------------------------------------------

FAMILIES = {  # in the order of the papers' code
    "gopher-quality": "words word-length hashes ellipses bullets ellipsis-lines letters stop-words",
    "gopher-repetition": "duplicate-paragraphs duplicate-paragraph-characters duplicate-lines "
    "duplicate-line-characters top-2-grams top-3-grams top-4-grams duplicate-5-grams duplicate-6-grams "
    "duplicate-7-grams duplicate-8-grams duplicate-9-grams duplicate-10-grams",
    "c4": "long-words citations punctuation words lorem-ipsum javascript curly-bracket policy sentences",
    "c4-no-punctuation": "long-words citations words lorem-ipsum javascript curly-bracket policy sentences",
    "fineweb": "punctuation short-lines duplicate-characters newlines",
    "refinedweb": "capitals digits counters words cart read-more sign-in newlines removed",
}
FAMILIES = {name: [f"{name.split('-')[0]}-{rule}" for rule in rules.split()] for name, rules in FAMILIES.items()}
FAMILIES["gopher"] = FAMILIES["gopher-quality"] + FAMILIES["gopher-repetition"]


def names(*families):
    return [rule.name for rule in chosen(families, {}).rules]


def test_families_have_their_rules_in_order():
    assert families() == FAMILIES
    for family in FAMILIES:
        assert names(family) == FAMILIES[family]


def test_order_is_lines_then_documents_then_repetition_however_they_are_named():
    expected = [
        *FAMILIES["refinedweb"][:-1], *FAMILIES["c4"][:-1],  # lines
        "refinedweb-removed", "c4-sentences", *FAMILIES["gopher-quality"], *FAMILIES["fineweb"],
        *FAMILIES["gopher-repetition"],
    ]  # fmt: skip
    assert names("gopher", "c4", "fineweb", "refinedweb") == expected
    assert names("fineweb", "refinedweb", "c4-no-punctuation", "gopher-repetition", "gopher", "c4") == expected


@settings(max_examples=100, deadline=None)
@given(text=texts())
def test_the_first_of_several_families_that_fails_names_the_reason(text):
    after, reason, _ = c4(text, punctuation=False)
    order = [*FAMILIES["gopher-quality"], *FAMILIES["fineweb"], *FAMILIES["gopher-repetition"]]
    limits = {"gopher-words": {"least": 3.0}, "fineweb-duplicate-characters": {"most": 0.2}}
    if reason is None:
        for name in order:
            bounds = RULES[name].thresholds | limits.get(name, {})
            value = MEASURES[name](after)
            if value < bounds.get("least", value) or value > bounds.get("most", value):
                reason = name
                break
    assert chosen(["fineweb", "gopher", "c4-no-punctuation"], limits).clean(text)[:2] == (after, reason)


ALL = [name for name in RULES if not RULES[name].file]


@settings(max_examples=150, deadline=None)
@given(text=texts(), names=st.one_of(st.lists(st.sampled_from(ALL), min_size=1, max_size=6), st.just(ALL)))
def test_what_is_explained_is_what_is_done(text, names):
    rules = chosen(names, {})
    cleaned, findings = rules.clean(text), rules.explain(text)
    failed = [finding.rule for finding in findings if not finding.passed]
    assert cleaned.reason == (failed[0] if failed else None)
    assert list(dict.fromkeys(finding.rule for finding in findings)) == [rule.name for rule in rules.rules]
    edits = {finding.rule: finding.value for finding in findings if finding.limit is None and finding.value}
    assert edits == cleaned.edits
    for finding in findings:
        assert finding.limit is None or finding.passed or finding.value != finding.limit
        assert finding.what and "\n" not in finding.what
    assert type(cleaned.text) is str and pickle.loads(pickle.dumps(rules)).clean(text) == cleaned


def test_an_explanation_shows_values_limits_and_lines():
    findings = chosen(["c4-words", "gopher-words"], {"gopher-words": {"least": 4}}).explain("one two three\nfour")
    assert [tuple(finding) for finding in findings] == [
        ("c4-words", "lines of fewer words", 1.0, None, True),
        ("gopher-words", "words that are not punctuation alone: at least", 3.0, 4, False),
        ("gopher-words", "words that are not punctuation alone: at most", 3.0, 100_000, True),
    ]


def test_no_rules_leave_a_text_as_it_is_and_without_words_it_measures_nothing():
    assert chosen([], {}).clean(" a\n\n\nb ") == (" a\n\n\nb ", None, {})
    for text in ("", " \n\n "):
        assert chosen(["gopher-repetition"], {}).clean(text).reason is None
        assert chosen(["gopher"], {}).clean(text).reason == "gopher-words"


# --- names and thresholds --------------------------------------------------------------------------------------------

REFUSED = {
    "rules: there is no 'gofer'; near to it: gopher": (["gofer"], {}),
    "rules: there is no 'c4-curly'; near to it: c4-curly-bracket": (["c4", "c4-curly"], {}),
    "rules: there is no 'xyz'; families: refinedweb, c4, c4-no-punctuation, gopher, gopher-quality, fineweb, "
    "gopher-repetition; rules: docs/rules.md": (["xyz"], {}),
    "rule.gopher-wrds: there is no such rule; near to it: gopher-words": (["gopher"], {"gopher-wrds": {"least": 1}}),
    "rule.gopher-words: is set, but not among the chosen rules; add gopher-words to rules": (
        ["c4"],
        {"gopher-words": {"least": 1}},
    ),
    "rule.gopher-words.leest: there is no such threshold; those of gopher-words: least, most": (
        ["gopher"],
        {"gopher-words": {"leest": 1}},
    ),
    "rule.c4-javascript.most: there is no such threshold; those of c4-javascript: none": (
        ["c4"],
        {"c4-javascript": {"most": 1}},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_there_is_refused_in_one_line(message):
    with pytest.raises(DataError) as caught:
        chosen(*REFUSED[message])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# --- own rules -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_plugins_are_left():
    before = dict(RULES)
    yield
    for name in RULES.keys() - before.keys():
        del RULES[name]
    for name in [name for name in sys.modules if name.startswith("thriftlab_plugin_")]:
        del sys.modules[name]


def test_own_rules_act_after_those_of_the_package_and_before_repetition():
    @document_rule("my-length", most=40, unit=1)
    def length(text, unit):
        """length"""
        return len(text) * unit

    @line_rule("my-lines", letter=2)
    def shorten(line, letter):
        return None if line == "drop me now" else line.replace("x" * int(letter), "y")

    order = [rule.name for rule in chosen(["gopher", "my-length", "c4-words", "my-lines"], {}).rules]
    assert order == ["c4-words", "my-lines", *FAMILIES["gopher-quality"], "my-length", *FAMILIES["gopher-repetition"]]
    rules = chosen(["my-length", "my-lines"], {"my-length": {"unit": 2}})
    text = "\n  axxb c\ndrop me now\n\nend "
    assert rules.clean(text) == ("\n  ayb c\n\nend ", None, {"my-lines": 2})
    assert chosen(["my-lines", "my-length"], {"my-length": {"unit": 4}}).clean(text).reason == "my-length"
    assert chosen(["my-lines"], {"my-lines": {"letter": 3}}).clean(text).edits == {"my-lines": 1}
    assert rules.explain(text)[0].what == "shorten"


def test_own_rules_that_cannot_be_are_refused():
    with pytest.raises(DataError, match="document rule mine: never drops a document; give it least=NUMBER or most="):
        document_rule("mine", limit=3)
    with pytest.raises(DataError, match="rule gopher-words: there is one of that name in thriftlab; choose another"):
        line_rule("gopher-words")(lambda line: line)


@pytest.mark.parametrize("broken", [lambda text: 1 / 0, lambda text: "a", lambda text: None])
def test_a_mistake_in_an_own_rule_is_named(broken):
    document_rule("mine", most=3)(broken)
    with pytest.raises(DataError, match=rf"^rule mine: (ZeroDivisionError: .*|gives .*number); mend it in {__file__}$"):
        chosen(["mine"], {}).clean("a text")
    line_rule("lines")(lambda line: 3)
    with pytest.raises(DataError, match=r"^rule lines: gives 3, and not the line, or None to drop it; mend it in"):
        chosen(["lines"], {}).clean("a text")


EXAMPLE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]


def test_the_example_of_the_docs_is_short_and_works(tmp_path):
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 10
    (tmp_path / "mine.py").write_text(EXAMPLE)
    load_plugin(tmp_path / "mine.py")
    rules = chosen(["too-many-digits", "no-shouting"], {})
    assert rules.clean("BUY NOW\nwords 123").text == "words 123"
    assert rules.clean("w 1234").reason == "too-many-digits"
    relaxed = chosen(["too-many-digits"], {"too-many-digits": {"most": 0.9}})
    assert relaxed.clean("w 1234").reason is None


def test_a_plugin_that_changed_takes_the_place_of_the_old_one_and_another_does_not(tmp_path):
    file = tmp_path / "mine.py"
    for limit in (1, 5):
        file.write_text(f"from thriftlab.data import document_rule\ndocument_rule('mine', most={limit})(lambda t: 3)\n")
        load_plugin(file)
        assert passes("mine", "text") == (limit == 5)
    (tmp_path / "copy.py").write_text(file.read_text() + "# another")
    with pytest.raises(DataError, match=f"rule mine: there is one of that name in {file}; choose another name"):
        load_plugin(tmp_path / "copy.py")


@pytest.mark.slow
def test_a_process_that_never_saw_the_plugin_gets_its_rules(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(EXAMPLE)
    load_plugin(file)
    rules = chosen(["gopher-words", "no-shouting", "too-many-digits"], {"gopher-words": {"least": 1}})
    (tmp_path / "rules.pickle").write_bytes(pickle.dumps(rules))
    code = "import pickle, sys; print(tuple(pickle.load(open(sys.argv[1], 'rb')).clean('BUY NOW\\nwords 123456')))"

    def ask():
        command = [sys.executable, "-c", code, str(tmp_path / "rules.pickle")]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    assert ask().stdout == f"{tuple(rules.clean(chr(10).join(['BUY NOW', 'words 123456'])))}\n"
    file.unlink()
    assert f"rule no-shouting: {file} cannot be run in a worker process: No such file or directory" in ask().stderr


# --- docs ------------------------------------------------------------------------------------------------------------


def test_the_page_lists_every_rule_with_its_thresholds():
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| ([^|]*) \|$", PAGE, re.MULTILINE))
    expected = {
        rule.name: ", ".join(f"`{key}={value:g}`" for key, value in rule.thresholds.items()) or "none"
        for rule in RULES.values()
        if not rule.file
    }
    assert {name: limits.replace("100_000", "100000") for name, limits in rows.items() if name in expected} == expected
