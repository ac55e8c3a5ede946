"""Text in, documents out: one lazy reader a format, and one clear error for everything that can be wrong with a file.

One file (text), one line (jsonl), one row (parquet, Hugging Face) is one document. Only the document being read is
held (of parquet: a row group), so a corpus may be larger than memory. Surprise: the usual reader of zstandard streams
takes a truncated file for a complete one, which would lose data silently; here the end of the last frame is checked.
"""

import gzip
import json
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from thriftlab.data.corpora import embedded, recipes, synthetic
from thriftlab.data.corpora.packages import DOWNLOADS
from thriftlab.data.errors import DataError

CHUNK = 1 << 16  # bytes; small, because a compressed chunk may hold a thousand times as much


class Document(NamedTuple):
    id: str
    text: str
    source: str
    metadata: dict[str, Any]


def read(
    path: str | Path, source: str = "", text_key: str = "text", streaming: bool = True, downloads: Path = DOWNLOADS
) -> Iterator[Document]:
    """Yields the documents of `path` in a fixed order, lazily.

    Args:
        path: a file or a folder of files (read recursively, in the order of their names): .jsonl, .ndjson and .json
            (one object a line) and .parquet; anything else is plain text; text and lines also as .gz and .zst.
            A folder saved by `datasets`' `save_to_disk`.
            "hf:NAME[:CONFIG[:SPLIT]]": a Hugging Face dataset, of the hub or a local path.
            "embedded[:PART]" (embedded.py). "synthetic[:ARGUMENT=VALUE,...]" (synthetic.py).
            "recipe:NAME:DOMAIN" (recipes.py).
        source: the name that the documents carry; `path` where empty.
        text_key: where a line or row keeps its text.
        streaming: of "hf:": read while downloading, instead of downloading and converting everything first.
        downloads: of "recipe:": where packages are, or are put.

    Raises DataError that names the file, the line and the remedy; nothing is skipped silently.
    """
    for identity, text, metadata in _rows(str(path), text_key, streaming, downloads):
        yield Document(identity, text, source or str(path), metadata)


def normalise(text: str) -> str:
    """Unicode NFC, Unix line ends, no NUL."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\0", ""))


def locate(path: str) -> tuple[str, str]:
    """(reader, what it is given) of a path that `read` takes; reader: embedded, synthetic, recipe, hf or files."""
    reader, _, argument = path.partition(":")
    if reader in ("hf", "recipe", *_GENERATORS):
        return reader, argument
    return "hf" if _saved_by_datasets(path) else "files", path


def files(path: str | Path) -> list[Path]:
    """The files that `read` opens for a file or folder, in its order; hidden ones are left out."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    found = [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
    if not found:
        raise DataError(f"{path}: the folder holds no files")
    return sorted(found, key=lambda file: file.relative_to(path).parts)


Row = tuple[str, str, dict[str, Any]]  # id, text, metadata


def _rows(path: str, text_key: str, streaming: bool, downloads: Path) -> Iterator[Row]:
    reader, place = locate(path)
    if reader in _GENERATORS:
        return _generated(_GENERATORS[reader], place)
    if reader == "recipe":
        return _generated(partial(recipes.documents, downloads=downloads), place)
    if reader == "hf":
        return _huggingface(place, text_key, streaming)
    return _files(Path(place), text_key)


def _generated(documents: Callable[[str], Iterator[Row]], argument: str) -> Iterator[Row]:
    try:
        yield from documents(argument)
    except ValueError as error:
        raise DataError(str(error)) from None


def _files(path: Path, text_key: str) -> Iterator[Row]:
    for file in files(path):
        empty = True
        name = file.name if file == path else file.relative_to(path).as_posix()
        for row, text, metadata in _reader(file)(file, text_key):
            empty = False
            yield name + row, text, metadata
        if empty:
            raise DataError(f"{file}: empty, there is no document in it; delete it or fetch it again")


def _reader(file: Path) -> Callable[[Path, str], Iterator[Row]]:
    suffixes = [suffix for suffix in file.suffixes if suffix not in (".gz", ".zst")]
    return _FORMATS.get(suffixes[-1] if suffixes else "", _text)


def _text(file: Path, text_key: str) -> Iterator[Row]:
    data = b"".join(_chunks(file))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 text (byte {error.start}); convert it (iconv -f latin1 -t utf-8), or move it out if it "
            "is no text. Read are .txt, .jsonl (both also .gz, .zst), .parquet and folders saved by `datasets`"
        ) from None
    if text:
        yield "", text, {}


def _lines(file: Path, text_key: str) -> Iterator[Row]:
    for number, line in enumerate(_split(_chunks(file)), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not a JSON object in UTF-8 ({error}); repair or delete the line") from None
        text = _field(row, text_key, where)
        yield f":{number}", text, {key: value for key, value in row.items() if key != text_key}


def _parquet(file: Path, text_key: str) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                raise DataError(_missing(str(file), text_key, columns))
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
                for number, text in enumerate(batch.column(0).to_pylist(), number + 1):  # noqa: B020
                    yield f":{number}", _field({text_key: text}, text_key, f"{file}, row {number}"), {}
    except (ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({error}); fetch it again") from None


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
            text = _field(row, text_key, f"hf:{specification}, row {number}")
            yield str(number), text, {key: value for key, value in row.items() if key != text_key}
    except DataError:
        raise
    except Exception as error:  # a library over a network raises whatever its parts raise
        raise DataError(
            f"hf:{specification}: Hugging Face `datasets` cannot read it ({type(error).__name__}: {error}); "
            "the form is hf:NAME[:CONFIG[:SPLIT]], the split is `train` unless given, and the hub needs a network"
        ) from error


_GENERATORS = {"embedded": embedded.documents, "synthetic": synthetic.documents}
_FORMATS = {".jsonl": _lines, ".ndjson": _lines, ".json": _lines, ".parquet": _parquet}


def _field(row: Any, key: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds {type(row).__name__}, not an object with a text; repair or delete it")
    if key not in row:
        raise DataError(_missing(where, key, row))
    text = row[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} holds {type(text).__name__}, not text; repair or delete it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}; repair or delete it") from None
    return text


def _missing(where: str, key: str, keys: Iterable[str]) -> str:
    return f"{where}: no text under {key!r}; there is {', '.join(keys) or 'nothing'}: choose one with text_key"


def _chunks(file: Path) -> Iterator[bytes]:
    try:
        if file.suffix == ".zst":
            yield from _zstandard(file)
            return
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{file}: damaged or truncated ({error}); fetch or compress it again") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None


def _zstandard(file: Path) -> Iterator[bytes]:
    """Decompresses frame after frame; EOFError when the file ends inside one."""
    frame = None
    with file.open("rb") as stream:
        while data := stream.read(CHUNK):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data
                frame = None if frame.eof else frame
    if frame:
        raise EOFError("the last frame is not complete")


def _split(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _saved_by_datasets(path: str) -> bool:
    return any(Path(path, mark).is_file() for mark in ("dataset_dict.json", "state.json"))


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)
