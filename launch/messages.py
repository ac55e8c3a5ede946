"""What every command prints: how keys are written; when it warns, fails or is stopped, one line without a trace.

`pip install thriftlab` is for the optimizers and layers alone, so a command may lack a package: `missing_extra` says
what to install.
"""

import io
import json
import os
import re
import select
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

SYNTAX = """
key=value, --key=value and --key value are the same; values are text, numbers, true, null or [a, b].
--config FILE reads keys from a .yaml, .toml or .json file, any number of times. Later files win
over earlier ones, the command line over all, and on it the later of two values of one key.
--plugin FILE.py runs a Python file first, which may register methods, signals and schedules.
In paths, ~ and $NAME are replaced. Below: key=default, what it means (what it takes).
"""
PACKAGES = {"yaml": "pyyaml"}  # import name -> package, where the two differ by more than - and _
WITH_PLACE = warnings.formatwarning


def one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A RuntimeWarning is for the user, and says all; others are for programmers, who look for the place."""
    return (
        f"warning: {message}\n" if category is RuntimeWarning else WITH_PLACE(message, category, filename, lineno, line)
    )


def print_anything() -> None:
    """What a terminal cannot show is replaced by `?`; where there is none, as after `>&-`, nothing is printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def readers_left() -> bool:
    """Whether nobody reads what is printed any more, as after `| head`; if so nothing is printed from now on."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    gone = [stream for stream, event in poll.poll(0) if event & select.POLLERR]
    for stream in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    return bool(gone)


def is_message(error: Exception) -> bool:
    """A UserError speaks to the user; any other exception is a defect and keeps its traceback."""
    from thriftlab.data.errors import UserError

    return isinstance(error, UserError)


def fail(message: str, code: int = 2) -> int:
    mark = "error: " if 0 < code <= 128 else ""  # being stopped is no mistake
    print("\n".join(f"{mark}{line}" for line in message.splitlines()), file=sys.stderr)
    return code


def tell_torchrun(message: str) -> None:
    """Leave the message where torchrun takes it into its summary, which else says how to enable tracebacks."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def no_room_or_right(error: Exception) -> str | None:
    """What to do about a disk that is full or must not be written, or a path that cannot be; None for other errors."""
    from thriftlab.data.files import REMEDIES  # which numpy comes with, and --help is quick

    if not isinstance(error, OSError) or error.errno not in REMEDIES:
        return None
    place = error.filename or "what is printed, or a file"
    return f"{place}: {error.strerror}; {REMEDIES[error.errno]}, and start the same command again"


def missing_extra(error: Exception) -> str | None:
    """What to install, where `error` is the failed import of a package that an extra brings; None for other errors."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    name = error.name.partition(".")[0]
    package = PACKAGES.get(name, name).replace("_", "-")
    try:
        requirements = metadata.requires("thriftlab") or ()
    except metadata.PackageNotFoundError:  # run from the source
        return f"this command needs the package {package}, and {sys.executable} has none; pip install {package}"
    for requirement in requirements:
        required = re.match(rf"{re.escape(package)}\b(?!-)", requirement, re.IGNORECASE)
        extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
        if required and extra:
            return f"this command needs the package {package}: pip install 'thriftlab[{extra[1]}]'"
    return None
