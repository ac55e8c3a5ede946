"""A user's Python file, run once in a process: what it registers can be chosen by name from then on."""

import hashlib
import importlib.util
import sys
from pathlib import Path

from thriftlab.data.errors import DataError


def load_plugin(path: str | Path) -> None:
    """DataError says what is wrong with the file; the caller names it."""
    name = f"thriftlab_plugin_{plugin_sha256(path)[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise DataError("is not a Python file (.py)")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise DataError(f"{type(error).__name__}: {error}") from error


def plugin_sha256(path: str | Path) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(error.strerror or str(error)) from None
