"""The manifest of a prepared folder, and the proof that the folder is still what it says.

manifest.json names every file with its sha256; manifest.sha256 holds its own (`sha256sum -c manifest.sha256` reads it).
A flipped byte, a missing or a truncated file is an error at opening. The surprise: hashes are remembered only for files
that have rested a while, because a file written twice within one clock tick keeps its time stamp (git's "racy" case).
"""

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # those of typing do not do for pydantic before Python 3.12
)

import numpy as np
from pydantic import (
    AfterValidator,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)  # fmt: skip
from typing_extensions import TypedDict

from thriftlab.data.errors import DataError

FORMAT = 1
REMEDY = "run `thriftlab prepare` again"
VERIFIED = ".verified.json"
SETTLED = 2.0  # seconds

Manifest = dict[str, Any]


# ------------------------------------------------------------- what others read of a manifest; there may be more in it


def _inside(name: str) -> str:
    if not name.isprintable() or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError("not the name of a file below the folder")
    return name


def _summed(split: Manifest) -> Manifest:
    for key in ("tokens", "documents", "bytes"):
        if split[key] != sum(shard[key] for shard in split["shards"]):
            raise ValueError(f"{key}: not the sum over its shards")
    return split


def _scored(source: Manifest) -> Manifest:
    shards = [*source["train"]["shards"], *source["validation"]["shards"]]
    needed = {"scores_file", "scores_sha256"} if source.get("columns") else set()
    if any(needed != {"scores_file", "scores_sha256"} & shard.keys() for shard in shards):
        raise ValueError(
            "columns: every shard has scores_file and scores_sha256 where there are columns, and only there"
        )
    return source


FileName = Annotated[str, AfterValidator(_inside)]
SourceName = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]


class Shard(TypedDict):
    file: FileName
    sha256: str
    ends_file: FileName
    ends_sha256: str
    tokens: PositiveInt
    documents: PositiveInt
    bytes: NonNegativeInt
    scores_file: NotRequired[FileName]
    scores_sha256: NotRequired[str]


class Split(TypedDict):
    shards: list[Shard]
    tokens: NonNegativeInt
    documents: NonNegativeInt
    bytes: NonNegativeInt


class Source(TypedDict):
    train: Annotated[Split, AfterValidator(_summed)]
    validation: Annotated[Split, AfterValidator(_summed)]
    columns: NotRequired[dict[str, PositiveInt]]  # of the scores, and their units in 1


class TokenizerEntry(TypedDict):
    name: str
    vocab_size: PositiveInt
    delimiter: NonNegativeInt
    sha256: str
    file: NotRequired[FileName]


class Written(TypedDict):
    format: int
    tokenizer: TokenizerEntry
    dtype: Literal["uint16", "uint32"]
    sources: dict[SourceName, Annotated[Source, AfterValidator(_scored)]]
    drops: NotRequired[dict[str, int]]
    made: NotRequired[Manifest]


WRITTEN = TypeAdapter(Written)


# ------------------------------------------------------------------------------------------------ writing and reading


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write manifest.json and its hash, last of all files; returns the fingerprint.

    "format" is added. Whatever may differ between two equal preparations (dates, paths, timings, versions) belongs
    under the key "made", the only one that the fingerprint leaves out.
    """
    text = json.dumps({"format": FORMAT} | manifest, indent=1, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_bytes(text.encode(errors="backslashreplace"))  # a path that is not UTF-8
    (folder / "manifest.sha256").write_text(_checksum_line(folder / "manifest.json"))
    return fingerprint({"format": FORMAT} | manifest)


def _checksum_line(path: Path) -> str:
    return f"{file_sha256(path)}  {path.name}\n"  # `sha256sum -c` reads it


def fingerprint(manifest: Manifest) -> str:
    """sha256 of the canonical JSON of the manifest without "made"."""
    content = {key: value for key, value in manifest.items() if key != "made"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The verified manifest of a prepared folder."""
    path, checksum = folder / "manifest.json", folder / "manifest.sha256"
    try:
        return _read_manifest(path, checksum)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); repair that, or {REMEDY}") from error


def _read_manifest(path: Path, checksum: Path) -> Manifest:
    for file in (path, checksum):
        if not file.is_file():
            raise DataError(
                f"{file}: missing, so this is no prepared data set; `thriftlab prepare` makes prepared/embedded, and "
                "`thriftlab prepare --recipe medium` prepared/medium; the file of a study names what makes its own"
            )
    if checksum.read_bytes() != _checksum_line(path).encode():
        raise DataError(f"{path}: does not match its hash in {checksum}: one of the two was changed; {REMEDY}")
    try:
        manifest = json.loads(path.read_bytes())
        if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
            raise DataError(f"{path}: format {manifest['format']}, and this version reads {FORMAT}; {REMEDY}")
        WRITTEN.validate_python(manifest, strict=True)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "all of it"
        raise DataError(f"{path}: {place}: {error.errors()[0]['msg']}, though its hash is right; {REMEDY}") from None
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON ({error}), though its hash is right; {REMEDY}") from None
    return manifest


def _expected(manifest: Manifest) -> dict[str, tuple[str, int | None]]:
    """File -> (sha256, size in bytes where the manifest implies it)."""
    width = np.dtype(manifest["dtype"]).itemsize
    files: dict[str, tuple[str, int | None]] = {}
    for file, sha256 in manifest.get("made", {}).get("documents", {}).items():
        files[file] = (sha256, None)
    if file := manifest["tokenizer"].get("file"):
        files[file] = (manifest["tokenizer"]["sha256"], None)
    for source in manifest["sources"].values():
        for shard in (*source["train"]["shards"], *source["validation"]["shards"]):
            files[shard["file"]] = (shard["sha256"], shard["tokens"] * width)
            files[shard["ends_file"]] = (shard["ends_sha256"], None)
            if "scores_file" in shard:
                files[shard["scores_file"]] = (shard["scores_sha256"], None)
    return files


def verify_files(folder: Path, manifest: Manifest, hashes: bool = True) -> None:
    """Refuse a missing, truncated or changed file; with hashes=False by presence and size alone.

    A file that was hashed before, under this very manifest, is hashed again only if its size or time stamps moved.
    """
    expected = _expected(manifest)
    for name, (_, size) in expected.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: missing; {REMEDY}")
        if size is not None and path.stat().st_size != size:
            raise DataError(f"{path}: {path.stat().st_size} bytes, the manifest says {size}; {REMEDY}")
    if not hashes:
        return
    stamps = {name: _stamp(folder / name) for name in expected}
    known = _read_verified(folder)
    unknown = [name for name in expected if known.get(name) != stamps[name]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(file_sha256, [folder / name for name in unknown])
        for name, digest in zip(unknown, digests, strict=True):
            if digest != expected[name][0]:
                raise DataError(f"{folder / name}: changed since it was prepared (sha256 differs); {REMEDY}")
    if unknown:
        _write_verified(folder, stamps)


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_verified(folder: Path) -> dict[str, list[int]]:
    try:
        cache = json.loads((folder / VERIFIED).read_bytes())
        return cache["files"] if cache["manifest"] == file_sha256(folder / "manifest.json") else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # absent or damaged: everything is hashed again


def _write_verified(folder: Path, stamps: dict[str, list[int]]) -> None:
    settled = {name: stamp for name, stamp in stamps.items() if time.time() - max(stamp[1:]) * 1e-9 > SETTLED}
    text = json.dumps({"manifest": file_sha256(folder / "manifest.json"), "files": settled})
    temporary = folder / f"{VERIFIED}.{os.getpid()}"
    with contextlib.suppress(OSError):  # a read-only folder is hashed at every opening
        temporary.write_text(text)
        temporary.replace(folder / VERIFIED)
