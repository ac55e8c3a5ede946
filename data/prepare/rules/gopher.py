"""Gopher's quality rules (arXiv 2112.11446, appendix A1.1), as FineWeb applies them (datatrove 0.10).

Words are what white space separates.
"""

from thriftlab.data.rules import Text, register

FAMILIES = ("gopher", "gopher-quality")
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
# ASCII's punctuation, that of CCNet's normaliser (arXiv 1911.00359; the digit is in its list) and control characters.
_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～"
_CONTROL = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))
_RANGES = """
    21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d6
    17d9-17da 1803 1809 1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 2e2e
    2e3c 2e53-2e54 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe52
    fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 111c5-111c6
    111cd 111de-111df 11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 1173c-1173e 11944
    11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 16b37-16b38 16b44 16e98 1bc9f
    1da88
"""


def _characters(ranges: str) -> str:
    """Of code points in hexadecimal, single ones or FIRST-LAST."""
    pairs = [each.split("-") for each in ranges.split()]
    return "".join(chr(code) for pair in pairs for code in range(int(pair[0], 16), int(pair[-1], 16) + 1))


TERMINAL = _characters(_RANGES)  # what ends a sentence in some script: Unicode's property Sentence_Terminal, nearly
PUNCTUATION = "".join(sorted({*_MARKS, *_CONTROL, *TERMINAL}))


def quality(name: str, **thresholds: float):
    return register(name, thresholds, FAMILIES)


def _mixed(text: Text) -> list[str]:
    """The words that are not letters alone."""
    return [word for word in text.words if not word.isalpha()]


def _marks(text: Text) -> list[str]:
    """The words that are punctuation alone."""
    return [word for word in text.shared(_mixed) if not word.strip(PUNCTUATION)]


def _lines(text: Text) -> list[str]:
    return text.splitlines()


@quality("gopher-words", least=50, most=100_000)
def words(text: Text) -> float:
    """words that are not punctuation alone"""
    return len(text.words) - len(text.shared(_marks))


@quality("gopher-word-length", least=3, most=10)
def word_length(text: Text) -> float:
    """mean length of the words that are not punctuation alone"""
    counted = len(text.words) - len(text.shared(_marks))
    characters = sum(map(len, text.words)) - sum(map(len, text.shared(_marks)))
    return characters / counted if counted else 0.0


@quality("gopher-hashes", most=0.1)
def hashes(text: Text) -> float:
    """number signs for each word"""
    return text.count("#") / len(text.words)


@quality("gopher-ellipses", most=0.1)
def ellipses(text: Text) -> float:
    """ellipses (... or …) for each word"""
    return (text.count("...") + text.count("…")) / len(text.words)


@quality("gopher-bullets", most=0.9)
def bullets(text: Text) -> float:
    """lines that begin with a bullet (• or -), of all lines"""
    lines = text.shared(_lines)
    return sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines)


@quality("gopher-ellipsis-lines", most=0.3)
def ellipsis_lines(text: Text) -> float:
    """lines that end in an ellipsis, of all lines"""
    lines = text.shared(_lines)
    return sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines)


@quality("gopher-letters", least=0.8)
def letters(text: Text) -> float:
    """words with a letter, of all words"""
    without = sum(not any(map(str.isalpha, word)) for word in text.shared(_mixed))
    return (len(text.words) - without) / len(text.words)


@quality("gopher-stop-words", least=2)
def stop_words(text: Text) -> float:
    """different words of: the, be, to, of, and, that, have, with"""
    return len(STOP_WORDS.intersection(text.words))


@register("dclm-stop-words", {"least": 2})
def all_stop_words(text: Text) -> float:
    """words that are one of: the, be, to, of, and, that, have, with (DCLM, arXiv 2406.11794)"""
    return sum(word in STOP_WORDS for word in text.words)
