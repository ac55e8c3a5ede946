"""The embedded corpus: documentation of the running Python, about 2 MB of English technical prose, no download.

Three parts, each a source of its own, so that evaluation by source shows something real: `docstrings` (the standard
library's, one document a module), `topics` (the language reference of `pydoc_data.topics`, one document a section) and
`news` (IDLE's release notes, one document a release). The order is fixed. Licence: PSF-2.0.

Surprise: the text differs between Python versions, and distributions strip parts of it (Debian drops idlelib), so no
loss on it may be compared across machines unless the text's sha256 is equal. It is kept with the provenance.
"""

import ast
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

PARTS = ("docstrings", "topics", "news")
LICENCE = "PSF-2.0"

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Not documentation: other people's packages, tests, and tables whose docstrings are all one sentence.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
_HEADING = re.compile(r"(?m)^(\S[^\n]*)\n([*=\-~^])\2{2,}\n")


def documents(part: str = "") -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yields (id, text, {"part"}) of one of `PARTS`, or of all in that order; a stripped part yields nothing."""
    if part and part not in PARTS:
        raise ValueError(f"embedded:{part}: the embedded corpus has the parts {', '.join(PARTS)}")
    for name in [part] if part else PARTS:
        for identity, text in _READERS[name]():
            # A docstring may hold a lone surrogate, which UTF-8 cannot.
            yield f"{name}/{identity}", text.encode("utf-8", "replace").decode(), {"part": name}


def _docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        relative = path.relative_to(root)
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        if _SKIPPED.isdisjoint(relative.parts) and (text := _module_text(path, name)):
            yield relative.as_posix(), text


def _module_text(path: Path, name: str) -> str:
    """The docstrings of a module under their qualified names; "" if it has none or Python cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and Python 2 code that some distributions ship
        return ""
    entries = [(name, ast.get_docstring(tree)), *_definitions(tree, "")]
    return "\n\n".join(f"{title}\n\n{docstring}" for title, docstring in entries if docstring)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, str | None]]:
    for child in getattr(node, "body", ()):
        if isinstance(child, _DEFINITIONS):
            yield prefix + child.name, ast.get_docstring(child)
            yield from _definitions(child, f"{prefix}{child.name}.")


def _topics() -> Iterator[tuple[str, str]]:
    """Sections, not topics: long topics repeat short ones as sections, under another underline (which is dropped)."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic, text in sorted(topics.items()):
        before, *sections = _HEADING.split(text)
        titles, bodies = ["", *sections[0::3]], [before, *sections[2::3]]
        for number, (title, body) in enumerate(zip(titles, bodies, strict=True)):
            if body.strip():
                yield f"{topic}#{number}", f"{title}\n\n{body.strip()}\n".lstrip()


def _news() -> Iterator[tuple[str, str]]:
    folder = Path(sysconfig.get_paths()["stdlib"], "idlelib")
    for path in sorted(folder.glob("NEWS*.txt")):
        releases = re.split(r"(?m)^(?=What's New in )", path.read_text("utf-8", "replace"))
        for number, text in enumerate(filter(str.strip, releases)):
            yield f"{path.name}#{number}", inspect.cleandoc(text) + "\n"


_READERS = {"docstrings": _docstrings, "topics": _topics, "news": _news}
