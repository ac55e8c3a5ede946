"""C4's rules (arXiv 1910.10683, section 2.2), as its code and datatrove 0.10 have them, and mC4's for paragraphs.

They see each line without the white space around it. Surprises: a line that is dropped is looked at no further, so that
a curly bracket in it does not drop the document; words are counted before citations are taken out.
"""

import re

from thriftlab.data.rules import Lines, Text, register

FAMILIES = ("c4", "c4-no-punctuation")
LINES = Lines("c4", lambda text: [line.strip() for line in text.splitlines()], lambda k: "\n".join(k).strip(), True)
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_SENTENCE = re.compile(r"[.!?]\s+(?=\S)")  # between one and the next


def line(name: str, families: tuple[str, ...] = FAMILIES, drops_document: bool = False, **thresholds: float):
    return register(name, thresholds, families, lines=LINES, drops_document=drops_document)


@line("c4-long-words", most=1000)
def long_words(line: Text, most: float) -> Text | None:
    """lines with a word of more characters"""
    return line if len(line) <= most or all(len(word) <= most for word in line.words) else None


@line("c4-citations")
def citations(line: Text) -> Text:
    """lines with [1], [edit] or [citation needed], which are taken out"""
    return line.edited(_CITATION.sub("", line)) if "[" in line else line


@line("c4-punctuation", families=("c4",))
def punctuation(line: Text) -> Text | None:
    """lines that do not end in one of . ? ! " ', or end in ..."""
    return line if line.endswith((".", "?", "!", '"', "'")) and not line.endswith("...") else None


@line("c4-words", least=3)
def words(line: Text, least: float) -> Text | None:
    """lines of fewer words"""
    return line if len(line.words) >= least else None


@line("c4-lorem-ipsum", drops_document=True)
def lorem_ipsum(line: Text) -> Text | None:
    """lines with "lorem ipsum", in any case"""
    return line if "lorem ipsum" not in line.lower() else None


@line("c4-javascript")
def javascript(line: Text) -> Text | None:
    """lines with "javascript", in any case"""
    return line if "javascript" not in line.lower() else None


@line("c4-curly-bracket", drops_document=True)
def curly_bracket(line: Text) -> Text | None:
    """lines with {"""
    return line if "{" not in line else None


@line("c4-policy")
def policy(line: Text) -> Text | None:
    """lines that speak of cookies, terms of use or a privacy policy"""
    lower = line.lower()
    return line if not any(phrase in lower for phrase in POLICY) else None


@register("c4-sentences", {"least": 5}, FAMILIES)
def sentences(text: Text) -> float:
    """sentences: parts of a line between . ! or ? and white space"""
    return sum(1 + len(_SENTENCE.findall(line)) for line in text.splitlines() if line.strip())


@register("c4-paragraphs", {"least": 3, "characters": 200})
def paragraphs(text: Text, characters: float) -> float:
    """lines of so many characters or more (mC4, arXiv 2010.11934)"""
    return sum(len(line) >= characters for line in text.split("\n"))
