"""FineWeb's own rules (arXiv 2406.17557, section 3.6). Lines of white space alone do not count."""

from thriftlab.data.prepare.rules.gopher import TERMINAL
from thriftlab.data.rules import Text, register

_TERMINAL = tuple(TERMINAL)


def fineweb(name: str, **thresholds: float):
    return register(name, thresholds, ("fineweb",))


def _lines(text: Text) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


@fineweb("fineweb-punctuation", least=0.12)
def punctuation(text: Text) -> float:
    """lines that end in terminal punctuation, of all lines"""
    lines = text.shared(_lines)
    return sum(line.endswith(_TERMINAL) for line in lines) / len(lines)


@fineweb("fineweb-short-lines", most=0.67, characters=30)
def short_lines(text: Text, characters: float) -> float:
    """lines of so many characters or fewer, of all lines"""
    lines = text.shared(_lines)
    return sum(len(line) <= characters for line in lines) / len(lines)


@fineweb("fineweb-duplicate-characters", most=0.01)
def duplicate_characters(text: Text) -> float:
    """characters in repeated lines, of all but line ends"""
    lines = text.shared(_lines)
    repeated = sum(map(len, lines)) - sum(map(len, set(lines)))
    return repeated / (len(text) - text.count("\n"))


@fineweb("fineweb-newlines", most=0.3)
def newlines(text: Text) -> float:
    """line ends for each word"""
    return text.count("\n") / len(text.words)
