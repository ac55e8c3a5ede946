"""Text in, documents out: one lazy reader a format, and one clear error for everything that can be wrong with a file.

One file (text), one line (jsonl), one object (json), one row (parquet, Hugging Face) is one document. Only the document
being read is held, so a corpus may be larger than memory.
"""

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from thriftlab.data.corpora import embedded, periodic, recipes, streams, synthetic
from thriftlab.data.corpora.folders import Format, PassOver, formats, name_below, say
from thriftlab.data.corpora.packages import DOWNLOADS
from thriftlab.data.errors import DataError


class Document(NamedTuple):
    id: str
    text: str
    source: str
    metadata: dict[str, Any]


def read(
    path: str | Path,
    source: str = "",
    text_key: str = "text",
    streaming: bool = True,
    downloads: Path = DOWNLOADS,
    format: Format | None = None,
    pass_over: PassOver = say,
) -> Iterator[Document]:
    """Yields the documents of `path` in a fixed order, lazily.

    Args:
        path: a file or a folder of files (read recursively, in the order of their names), each read as its suffix says
            (folders.py): plain text, .jsonl and .ndjson (one object a line), .json (objects, or one array of them),
            .parquet; all but parquet also as .gz, .zst and .zstd.
            A folder saved by `datasets`' `save_to_disk`.
            "hf:NAME[:CONFIG[:SPLIT]]": a Hugging Face dataset, of the hub or a local path.
            "embedded[:PART]" (embedded.py). "synthetic[:ARGUMENT=VALUE,...]" (synthetic.py).
            "periodic[:ARGUMENT=VALUE,...]" (periodic.py).
            "recipe:NAME:DOMAIN" (recipes.py).
        source: the name that the documents carry; `path` where empty.
        text_key: where a line or row keeps its text.
        streaming: of "hf:": read while downloading, instead of downloading and converting everything first.
        downloads: of "recipe:": where packages are, or are put.
        format: of files: what they are read as, whatever their names say.
        pass_over: is told the name of every file that gives no document, and the reason.

    Raises DataError that names the file, the line and the remedy; nothing is skipped silently.
    """
    reader, place = locate(str(path), format)
    if reader in _GENERATORS:
        rows = _generated(_GENERATORS[reader], place)
    elif reader == "recipe":
        rows = _generated(partial(recipes.documents, downloads=downloads), place)
    elif reader == "hf":
        rows = _huggingface(place, text_key, streaming)
    else:
        rows = _files(Path(place), text_key, format, pass_over)
    for identity, text, metadata in rows:
        yield Document(identity, text, source or str(path), metadata)


def normalise(text: str) -> str:
    """Unicode NFC, Unix line ends, no NUL."""
    text = text.replace("\r\n", "\n").replace("\0", "")
    if re.search(r"[^\x00-\x7f]{1000}", text):
        text = _marks().sub(lambda marks: "".join(sorted(marks[0], key=unicodedata.combining)), text)
    return unicodedata.normalize("NFC", text)


@cache
def _marks() -> re.Pattern[str]:
    """A long row of combining marks: sorted as NFC wants it, or `unicodedata` takes the square of its length."""
    marks = "".join(filter(unicodedata.combining, map(chr, range(sys.maxunicode + 1))))
    return re.compile(f"[{marks}]{{1000,}}")


def locate(path: str, format: Format | None = None) -> tuple[str, str]:
    """(reader, what it is given) of a path that `read` takes; reader: hf, recipe, files, or a name of _GENERATORS."""
    reader, _, argument = path.partition(":")
    if reader not in ("hf", "recipe", *_GENERATORS):
        return "hf" if _saved_by_datasets(path) and not format else "files", path
    if format:
        raise DataError(f"{path}: format={format} is for files and folders; leave it out")
    return reader, argument


Row = tuple[str, str, dict[str, Any]]  # id, text, metadata


class Part(NamedTuple):
    """Bytes `start` to `stop` of lines of JSON, or row groups of parquet; `first`: the number of its first document."""

    start: int
    stop: int
    first: int


def _generated(documents: Callable[[str], Iterator[Row]], argument: str) -> Iterator[Row]:
    try:
        yield from documents(argument)
    except ValueError as error:
        raise DataError(str(error)) from None


def _files(path: Path, text_key: str, format: Format | None, pass_over: PassOver) -> Iterator[Row]:
    without = []
    found = formats(path, format, pass_over)
    for file, kind in found:
        empty, name = True, name_below(file, path)
        for row, text, metadata in rows(file, kind, text_key, given=format is not None):
            empty = False
            yield name + row, text, metadata
        if empty:
            without.append(file)
            pass_over(name, "empty")
    if len(without) == len(found):
        raise all_empty(without[0], path)


def rows(file: Path, format: Format, text_key: str, given: bool, part: Part | None = None) -> Iterator[Row]:
    """(what stands behind the file's name in the id, text, metadata) of the documents of a file, or of a part of it.

    `given`: the user named the format, so it is not asked whether the file is something else.
    """
    if part and format == "jsonl":
        lines = streams.lines_between(file, part.start, part.stop)
        yield from _objects(file, text_key, enumerate(lines, part.first))
    elif part:
        yield from _parquet(file, text_key, part)
    else:
        for row in _FORMATS[format](file, text_key):
            if format == "text" and not given:
                _ask(file, row[1])
            yield row


def all_empty(file: Path | str, path: Path | str) -> DataError:
    return DataError(f"{file}: empty, and there is no document in {path}; fetch or write it again")


def _ask(file: Path, text: str) -> None:
    """Refuses what is no plain text by its content: binary files, objects of JSON or an array of them."""
    if "\0" in text:
        raise DataError(
            f"{file}: plain text by its name, but character {text.index(chr(0))} is NUL, as in binary files and in "
            "UTF-16; move it out or convert it, or say format=text to read it without them"
        )
    if not (start := re.match(r"\s*(?=[{\[])", text)):
        return
    try:
        value, end = json.JSONDecoder().raw_decode(text, start.end())
    except (ValueError, RecursionError):
        return
    objects = value if isinstance(value, list) else [value]
    in_one_line = "\n" not in text[start.end() : end]
    if not all(isinstance(each, dict) for each in objects) or not (any(objects) or objects and in_one_line):
        return
    if re.compile(r"[ \t]*(\n|\Z)").match(text, end):
        how = "jsonl" if isinstance(value, dict) and in_one_line else "json"
        raise DataError(
            f"{file}: plain text by its name, but its first line is a JSON object; say which it is, format={how} or "
            "format=text"
        )


def _text(file: Path, text_key: str) -> Iterator[Row]:
    try:
        text = streams.whole(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 text (byte {error.start}); convert it (iconv -f latin1 -t utf-8), or move it out if it "
            "is no text"
        ) from None
    if text:
        yield "", text, {}


def _lines(file: Path, text_key: str) -> Iterator[Row]:
    yield from _objects(file, text_key, enumerate(streams.lines(file), 1))


def _objects(file: Path, text_key: str, lines: Iterable[tuple[int, bytes]]) -> Iterator[Row]:
    for number, line in lines:
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: not a JSON object in UTF-8 ({error}); repair or delete the line; format=json reads objects "
                "over several lines, and an array of them"
            ) from None
        yield f":{number}", *_text_and_rest(row, text_key, where)


def _values(file: Path, text_key: str) -> Iterator[Row]:
    for number, (line, row) in enumerate(streams.values(file), 1):
        yield f":{number}", *_text_and_rest(row, text_key, f"{file}, line {line}")


def _text_and_rest(row: Any, text_key: str, where: str) -> tuple[str, dict[str, Any]]:
    text = _field(row, text_key, where)
    return text, {key: value for key, value in row.items() if key != text_key}


def _parquet(file: Path, text_key: str, part: Part | None = None) -> Iterator[Row]:
    from pyarrow import ArrowException, large_binary, types
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file, pre_buffer=False, buffer_size=streams.CHUNK) as table:  # else it holds a row group
            if not table.metadata.num_rows:
                return
            columns = table.schema_arrow.names
            if text_key not in columns:
                raise DataError(_missing(str(file), text_key, columns))
            number = part.first - 1 if part else 0
            groups = range(part.start, part.stop) if part else range(table.num_row_groups)
            for batch in table.iter_batches(batch_size=64, columns=[text_key], row_groups=list(groups)):
                column = batch.column(0)
                if types.is_string(column.type) or types.is_large_string(column.type):
                    column = column.cast(large_binary())  # decoded below, where the row is known
                for number, text in enumerate(column.to_pylist(), number + 1):  # noqa: B020
                    yield f":{number}", _field({text_key: text}, text_key, f"{file}, row {number}"), {}
    except (ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({_one_line(error)}); fetch it again") from None


def _huggingface(specification: str, text_key: str, streaming: bool) -> Iterator[Row]:
    import datasets

    name, config, split = (specification.split(":") + ["", ""])[:3]
    try:
        if _saved_by_datasets(name):
            rows = datasets.load_from_disk(name)
            rows = rows[split or "train"] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
        for number, row in enumerate(rows):
            yield str(number), *_text_and_rest(row, text_key, f"hf:{specification}, row {number}")
    except DataError:
        raise
    except Exception as error:  # a library over a network raises whatever its parts raise
        raise DataError(
            f"hf:{specification}: Hugging Face `datasets` cannot read it ({type(error).__name__}: {_one_line(error)}); "
            "the form is hf:NAME[:CONFIG[:SPLIT]], the split is `train` unless given, and the hub needs a network"
        ) from error


_GENERATORS = {"embedded": embedded.documents, "synthetic": synthetic.documents, "periodic": periodic.documents}
_FORMATS: dict[Format, Callable[[Path, str], Iterator[Row]]] = {
    "text": _text,
    "jsonl": _lines,
    "json": _values,
    "parquet": _parquet,
}


def _field(row: Any, key: str, where: str) -> str:
    if not isinstance(row, dict):
        array = "; format=json reads a file that is one array" if isinstance(row, list) else ""
        raise DataError(f"{where}: holds {type(row).__name__}, not an object with a text; repair or delete it{array}")
    if key not in row:
        raise DataError(_missing(where, key, row))
    text = row[key]
    if not isinstance(text, str | bytes):
        raise DataError(f"{where}: {key!r} holds {type(text).__name__}, not text; repair or delete it")
    try:
        text, raw = (text, text.encode()) if isinstance(text, str) else (text.decode(), text)
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}; repair or delete it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {key!r} is not UTF-8 (byte {error.start}); repair or delete it") from None
    if len(raw) > streams.LARGEST:
        raise streams.too_large(where)
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _missing(where: str, key: str, keys: Iterable[str]) -> str:
    return f"{where}: no text under {key!r}; there is {', '.join(keys) or 'nothing'}: choose one with text_key"


def _saved_by_datasets(path: str) -> bool:
    """Whether `datasets` would load it: one of them alone may be a file of the corpus."""
    marks = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all(Path(path, name).is_file() for name in names) for names in marks)
