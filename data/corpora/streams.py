"""The bytes of a file, unpacked, in pieces: chunks, lines, values of JSON.

What is held is one piece and no more than LARGEST. The cost is linear in the bytes, whatever the length of a line.
How a file is packed is seen from its first bytes, which no text in UTF-8 has, and else from its suffix. Surprise: the
usual reader of zstandard streams takes a truncated file for a complete one, which would lose data silently; here the
end of the last frame is checked.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from thriftlab.data.errors import DataError

CHUNK = 1 << 16  # bytes
FEED = 1 << 10  # compressed bytes at a time: a block of zstandard may hold 30,000 times as much
WINDOW = 1 << 31  # bytes that zstandard may look back, all of which are held; its own most, `zstd --long=31`
LARGEST = 1 << 28  # bytes of one document, or of the line that holds it

GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # the first frame of what pzstd writes
FOREIGN = (  # place and bytes of what is neither read nor text in UTF-8
    (0, codecs.BOM_UTF16_LE, "UTF-16; convert it: iconv -f utf-16 -t utf-8"),
    (0, codecs.BOM_UTF16_BE, "UTF-16; convert it: iconv -f utf-16 -t utf-8"),
    (0, b"BZh", "compressed by bzip2; unpack it"),
    (0, b"\xfd7zXZ", "compressed by xz; unpack it"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4; unpack it"),
    (0, b"PK\x03\x04", "a zip archive; unpack it"),
    (0, b"PAR1\x15", "a parquet file; give it that suffix, or format=parquet"),
    (257, b"ustar", "a tar archive; unpack it"),
)
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def too_large(where: str) -> DataError:
    return DataError(
        f"{where}: larger than {LARGEST >> 20} MiB, the most that one document may have; cut it into documents, one a "
        "file, or one a line of jsonl"
    )


def chunks(file: Path) -> Iterator[bytes]:
    """Pieces of CHUNK bytes at most. DataError for what is no text in UTF-8 by its first bytes."""
    pieces = _unpacked(file)
    if head := next(pieces, b""):
        for place, mark, what in FOREIGN:
            if head.startswith(mark, place):
                raise DataError(f"{file}: {what}")
        yield head
    yield from pieces


def _unpacked(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as stream:
            packing = _packing(file, stream.peek(4))
            if packing == "zstandard":
                yield from _zstandard(stream, file)
            elif packing == "gzip":
                yield from _gzip(stream)
            else:
                yield from iter(lambda: stream.read(CHUNK), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{file}: damaged or truncated ({error}); fetch or compress it again") from None
    except OSError as error:
        raise unreadable(file, error) from None


def is_packed(file: Path) -> bool:
    """DataError for what is no text in UTF-8 by its first bytes."""
    next(chunks(file), b"")
    try:
        with file.open("rb") as stream:
            return _packing(file, stream.peek(4)) is not None
    except OSError as error:
        raise unreadable(file, error) from None


def _packing(file: Path, head: bytes) -> str | None:
    suffix, gzipped = file.suffix.lower(), head.startswith(GZIP)
    if head.startswith(ZSTANDARD) or SKIPPABLE.match(head) or suffix in (".zst", ".zstd") and not gzipped:
        return "zstandard"
    return "gzip" if gzipped or suffix == ".gz" else None


def unreadable(file: Path, error: OSError) -> DataError:
    return DataError(f"{file}: cannot be read ({error.strerror or error})")


def whole(file: Path) -> bytes:
    held, size = [], 0
    for chunk in chunks(file):
        held.append(chunk)
        if (size := size + len(chunk)) > LARGEST:
            raise too_large(str(file))
    return b"".join(held)


def lines(file: Path) -> Iterator[bytes]:
    held: list[bytes] = []
    size, number = 0, 1
    for chunk in chunks(file):
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            yield b"".join([*held, line])
            held, size, number = [], 0, number + 1
        held.append(rest)
        if (size := size + len(rest)) > LARGEST:
            raise too_large(f"{file}, line {number}")
    if size:
        yield b"".join(held)


def lines_between(file: Path, start: int, stop: int) -> Iterator[bytes]:
    """The lines of a file that is not packed which begin at byte `start` or later, and before `stop`."""
    try:
        with file.open("rb") as stream:
            if start:  # the line of the byte before began there at the latest
                stream.seek(start - 1)
                while (skipped := stream.readline(CHUNK)) and not skipped.endswith(b"\n"):
                    pass
            while stream.tell() < stop and (line := stream.readline(LARGEST + 2)):
                if len(line.removesuffix(b"\n")) > LARGEST:
                    raise too_large(f"{file}, the line at byte {stream.tell() - len(line)}")
                yield line.removesuffix(b"\n")
    except OSError as error:
        raise unreadable(file, error) from None


def line_ends(file: Path, start: int, stop: int) -> int:
    """How many lines end in the bytes from `start` to `stop` of a file that is not packed."""
    found = 0
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            while start < stop and (chunk := stream.read(min(1 << 20, stop - start))):
                found, start = found + chunk.count(b"\n"), start + len(chunk)
    except OSError as error:
        raise unreadable(file, error) from None
    return found


def values(file: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of the JSON values of a file, one after the other; of its elements if it is one array."""
    text = _Text(file)
    array = text.next() == "["
    if array:
        text.move(text.at + 1)
        if text.next() == "]":
            return text.end()
    while text.next() or array:
        line = text.line
        yield line, text.value()
        if array and text.next() == "]":
            return text.end()
        if array:
            text.comma()


class _Text:
    """A place in the text of a file, of which only what the value there needs is held."""

    def __init__(self, file: Path) -> None:
        self.file, self.text, self.at, self.line, self.ended = file, "", 0, 1, False
        self.pieces = _decoded(file)

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def read_on(self) -> None:
        """Holds twice as much, from here on: so that a value is parsed again only a few times, however long it is."""
        held = [self.text[self.at :]]
        size, wanted = len(held[0]), 2 * len(held[0])
        while not self.ended and size <= wanted:
            held.append(next(self.pieces, ""))
            size += len(held[-1])
            self.ended = not held[-1]
        self.text, self.at = "".join(held), 0

    def next(self) -> str:
        """The character that is next but for white space, which is skipped; "" at the end."""
        while True:
            self.move(_SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read_on()

    def value(self) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if self.ended or end < len(self.text):  # else it may be half a number
                    self.move(end)
                    return value
            except (ValueError, RecursionError) as error:
                if self.ended or not self._cut(error):
                    raise self.wrong(error) from None
            if len(self.text) - self.at > LARGEST:
                raise too_large(f"{self.file}, line {self.line}")
            self.read_on()

    def comma(self) -> None:
        if self.next() != ",":
            raise self.wrong("no comma or ] behind an element of the array")
        self.move(self.at + 1)

    def end(self) -> None:
        self.move(self.at + 1)
        if self.next():
            raise self.wrong("more behind the array")

    def wrong(self, error: object) -> DataError:
        what = error.msg if isinstance(error, json.JSONDecodeError) else error
        return DataError(
            f"{self.file}, line {self.line}: not JSON ({what}); read are objects one after the other, or one array of "
            "them; repair the file"
        )

    def _cut(self, error: Exception) -> bool:
        """Whether the value may only be cut off where the held text ends."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16  # longer than any word or escape


def _decoded(file: Path) -> Iterator[str]:
    decoder, done = codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        for chunk in chunks(file):
            if piece := decoder.decode(chunk):
                yield piece
            done += len(chunk)
        if piece := decoder.decode(b"", final=True):
            yield piece
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (after byte {done}, {error.reason}); convert it (iconv -t utf-8)") from None


def _gzip(stream: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stream) as unpacked:
        yield from iter(lambda: unpacked.read(CHUNK), b"")
    if not stream.tell():
        raise EOFError("it is empty")


def _zstandard(stream: BinaryIO, file: Path) -> Iterator[bytes]:
    """Unpacks frame after frame; EOFError when the file ends inside one."""
    unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW)
    frame, head = None, b""
    while data := stream.read(FEED):
        while data:
            if frame is None:
                frame, head = unpacker.decompressobj(), b""
            head = (head + data)[:16]
            try:
                piece = frame.decompress(data)
            except zstandard.ZstdError:
                if head.startswith(ZSTANDARD) and head[4] & 3:  # the size of a dictionary's number
                    raise DataError(
                        f"{file}: compressed with a dictionary, which is not in it; unpack it: zstd -d -D DICTIONARY"
                    ) from None
                if (window := _window(head)) <= WINDOW:
                    raise
                raise DataError(
                    f"{file}: needs a window of {window >> 20} MiB of memory, and the limit is {WINDOW >> 20} MiB; "
                    "compress it again with a smaller one, as `zstd --long=27`"
                ) from None
            yield from (piece[start : start + CHUNK] for start in range(0, len(piece), CHUNK))
            data = frame.unused_data
            frame = None if frame.eof else frame
    if frame or not head:
        raise EOFError("the last frame is not complete" if head else "it is empty")


def _window(head: bytes) -> int:
    """The window that the head of a frame asks for (RFC 8878, 3.1.1.1)."""
    if not head.startswith(ZSTANDARD):
        return 0
    if len(head) < 6 or head[4] & 32:  # a single segment, of the size of the content
        return max(0, zstandard.frame_content_size(head))
    base = 1 << 10 + (head[5] >> 3)
    return base + base // 8 * (head[5] & 7)
