"""Packages of public registries: kept in a folder, held against their hashes, read as archives.

A package lies in FOLDER/REGISTRY/NAME/VERSION as its registry gave it. npm and PyPI never change a version, so theirs
is pinned with the sha256 of the file. A Debian archive holds only the newest one: what came is taken, and told.

One surprise: pip runs the setup.py of a source package to learn its name, before anybody could look at it. So pip is
given the hash as well.
"""

import io
import lzma
import re
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote

import zstandard

from thriftlab.data.errors import DataError
from thriftlab.data.manifest import file_sha256
from thriftlab.data.workspace import install, workspace

DOWNLOADS = Path("prepared/.downloads")
Member = tuple[str, bytes]  # a file of an archive: its path, its content
DAMAGES = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError, ValueError)


class Package(NamedTuple):
    registry: str  # debian, npm, pypi
    name: str
    version: str = ""  # of Debian whatever it has
    sha256: str = ""
    options: tuple[str, ...] = ()  # of pip, to get the same file on every machine

    def __str__(self) -> str:
        return " ".join(filter(None, [self.registry, self.name, self.version]))


def command(package: Package) -> list[str]:
    """What puts the package into the current folder; pip reads the rest of the request from its input."""
    match package.registry:
        case "debian":
            return ["apt-get", "download", "--quiet", package.name]
        case "npm":
            return ["npm", "pack", "--loglevel=error", f"{package.name}@{package.version}"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    return [*pip, *package.options, "--requirement", "/dev/stdin"]


REMEDY = {
    "debian": "`apt-get update` (as root) renews the list of packages, and this one is of Debian 12",
    "npm": "npm comes with Node.js and needs a network",
    "pypi": "pip needs a network",
}


# --- having it -------------------------------------------------------------------------------------------------------


def place(package: Package, downloads: Path) -> Path:
    return downloads / package.registry / package.name / package.version


def found(package: Package, downloads: Path) -> Path | None:
    """The file of the package if it is there."""
    return next(iter(_files(place(package, downloads))), None)


def fetch(package: Package, downloads: Path) -> Path:
    """The file of the package, from the folder or else from its registry. DataError says why it cannot be had."""
    folder = place(package, downloads)
    if not found(package, downloads):
        with workspace(folder) as work:
            if not _files(folder):  # another process may have been first
                _download(package, work, folder)
                install(work, folder)
    if len(files := _files(folder)) > 1:
        raise DataError(f"{folder}: holds {len(files)} files and should hold one, {package}; delete the others")
    _verify(package, files[0], "delete it and run again")
    return files[0]


def describe(package: Package, file: Path) -> dict[str, str]:
    """What a manifest says of a package. Debian writes the version into the name of the file, NAME_VERSION_MACHINE."""
    version = package.version or unquote(file.name.partition("_")[2].rpartition("_")[0])
    known = {"registry": package.registry, "name": package.name, "version": version}
    return known | {"file": file.name, "sha256": file_sha256(file)}


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.is_file() and not file.name.startswith("."))


def _download(package: Package, work: Path, folder: Path) -> None:
    words, request = command(package), f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
    try:
        done = subprocess.run(words, cwd=work, input=request, capture_output=True, text=True)
        problem = done.stderr.strip() or done.stdout.strip() if done.returncode else ""
    except OSError as error:
        problem = f"{words[0]}: {error.strerror}"
    files = _files(work)
    if problem or len(files) != 1:
        raise DataError(
            f"{package} cannot be had: `{' '.join(words)}` says: {problem or 'nothing'}\n"
            f"{REMEDY[package.registry]}; or put its file into {folder}"
        )
    _verify(package, files[0], f"the registry, or what lies between, gave `{' '.join(words)}` another file")


def _verify(package: Package, file: Path, remedy: str) -> None:
    if package.sha256 and (sha256 := file_sha256(file)) != package.sha256:
        raise DataError(f"{file}: not {package}, whose sha256 is {package.sha256}, but of {sha256}; {remedy}")


# --- reading it ------------------------------------------------------------------------------------------------------


def members(archive: Path, wanted: str) -> Iterator[Member]:
    """The files of a .deb, .whl, or (compressed) .tar whose path the expression is found in, in the archive's order."""
    reader = {".deb": _deb, ".whl": _zip}.get(archive.suffix, _tar)
    try:
        yield from reader(archive, re.compile(wanted))
    except DAMAGES as error:
        raise DataError(f"{archive}: damaged or truncated ({error}); delete it and run again") from None


def _zip(archive: Path, wanted: re.Pattern[str]) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for name in filter(wanted.search, file.namelist()):
            yield name, file.read(name)


def _tar(archive: Path | BinaryIO, wanted: re.Pattern[str]) -> Iterator[Member]:
    stream = archive.open("rb") if isinstance(archive, Path) else archive
    with stream, tarfile.open(fileobj=stream, mode="r|*") as file:
        for entry in file:
            if entry.isfile() and wanted.search(entry.name) and (content := file.extractfile(entry)):
                yield entry.name.removeprefix("./"), content.read()


def _deb(archive: Path, wanted: re.Pattern[str]) -> Iterator[Member]:
    """data.tar.* of an ar archive: members begin at even bytes with a header of 60, name first, size at its end."""
    with archive.open("rb") as file:
        file.seek(8)
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode().strip(" /"), int(header[48:58])
            if name.startswith("data.tar"):
                body = file.read(size)
                if len(body) < size:
                    raise EOFError("it ends inside its data")
                data: BinaryIO = io.BytesIO(body)
                if name.endswith(".zst"):  # as Ubuntu packs them; tarfile knows the others
                    data = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(data))
                yield from _tar(data, wanted)
                return
            file.seek(size + size % 2, io.SEEK_CUR)
    raise EOFError("it has no data")
