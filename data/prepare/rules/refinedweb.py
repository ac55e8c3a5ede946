"""RefinedWeb's line rules (arXiv 2306.01116, appendix G.2), with the thresholds of DCLM (arXiv 2406.11794)."""

import re

from thriftlab.data.rules import Lines, Text, register

FAMILIES = ("refinedweb",)
LINES = Lines("refinedweb", lambda text: text.split("\n"), lambda kept: "\n".join(kept).strip())
_COUNTER = re.compile(
    r"\W*\d[\d.,]*[kmb]?\s+(?:likes|shares|comments|retweets|reposts|quotes|bookmarks|upvotes|downvotes|downloads|views"
    r"|followers)\W*"
)
_NO_CAPITALS = bytes(code for code in range(128) if not chr(code).isupper())
_CART = re.compile(r"\s?items in cart", re.IGNORECASE)
_READ_MORE = re.compile(r"\s?read more\.\.\.$", re.IGNORECASE)
_SIGN_IN = re.compile(r"^sign-in\s?", re.IGNORECASE)


def line(name: str, **thresholds: float):
    return register(name, thresholds, FAMILIES, lines=LINES)


@line("refinedweb-capitals", most=0.5)
def capitals(line: Text, most: float) -> Text | None:
    """lines with a larger share of capital letters"""
    count = len(line.encode().translate(None, _NO_CAPITALS)) if line.isascii() else sum(map(str.isupper, line))
    return line if count / len(line) <= most else None


@line("refinedweb-digits")
def digits(line: Text) -> Text | None:
    """lines of digits alone"""
    return line if not line.isdigit() else None


@line("refinedweb-counters")
def counters(line: Text) -> Text | None:
    """lines that are a counter, as 3 likes"""
    return line if not _COUNTER.fullmatch(line.lower()) else None


@line("refinedweb-words", least=2)
def words(line: Text, least: float) -> Text | None:
    """lines of fewer words"""
    return line if len(line.words) >= least else None


@line("refinedweb-cart", words=10)
def cart(line: Text, words: float) -> str | None:
    """lines of so many words or fewer with "items in cart", which is taken out"""
    return _without(_CART, line, words)


@line("refinedweb-read-more", words=10)
def read_more(line: Text, words: float) -> str | None:
    """lines of so many words or fewer that end in "Read more...", which is taken out"""
    return _without(_READ_MORE, line, words)


@line("refinedweb-sign-in", words=10)
def sign_in(line: Text, words: float) -> str | None:
    """lines of so many words or fewer that begin with "Sign-in", which is taken out"""
    return _without(_SIGN_IN, line, words)


def _without(phrase: re.Pattern[str], line: Text, most: float) -> str | None:
    """None where the phrase was all that there was."""
    if len(line.words) > most or not phrase.search(line):
        return line
    rest = phrase.sub("", line)
    return rest if rest.strip() else None


@register("refinedweb-newlines", {"most": 2}, FAMILIES, whole=True)
def newlines(text: str, most: float) -> str:
    """line ends in a row beyond so many, which are taken out"""
    return re.sub(f"\n{{{int(most) + 1},}}", "\n" * int(most), text)


@register("refinedweb-removed", {"most": 0.05}, FAMILIES, wordless=True)
def removed(text: Text) -> float:
    """words that the RefinedWeb rules took from the lines, of all words"""
    before, after = (len(each.split()) for each in text.passes.get(LINES.name, (text, text)))
    return (before - after) / before if before else 0.0
