"""What a process does to files: every state on the way, as a kill at that moment leaves it, and a disk that is full."""

import builtins
import io
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

import pytest

from thriftlab.train.checkpoints import writer
from thriftlab.train.records import record

CALLS = ("chmod", "ftruncate", "mkdir", "rename", "replace", "rmdir", "unlink")


@contextmanager
def before_each_write(action):
    """Calls `action(label)` before anything that changes files; a line of metrics comes in two halves."""
    lock = RLock()

    def watched(function, label, changes=lambda *_, **__: True):
        def call(*arguments, **keywords):
            if not changes(*arguments, **keywords):
                return function(*arguments, **keywords)
            with lock:
                action(label(*arguments))
                return function(*arguments, **keywords)

        return call

    def to_write(file, mode="r", *_, **__):
        return not set(mode).isdisjoint("wax+") and not isinstance(file, int)

    def appended(file, content):
        with lock:
            for part in (content[: len(content) // 2], content[len(content) // 2 :]):
                action(f"append {Path(file.name).name}")
                append(file, part)

    append = record.append
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            function = getattr(os, name)
            patch.setattr(os, name, watched(function, lambda path, *_, name=name: f"{name} {short(path)}"))
        opened = watched(open, lambda path, *_: f"open {short(path)}", to_write)
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        patch.setattr(writer, "save_file", watched(writer.save_file, lambda _, path: f"open {short(path)}"))
        patch.setattr(record, "append", appended)
        yield


def short(path):
    """The name of what is written, without steps and process ids."""
    return "a descriptor" if isinstance(path, int) else "".join(c for c in Path(path).name if not c.isdigit())


def state_of(folder):
    """{path in it: content, None for a folder}."""
    paths = sorted(folder.rglob("*")) if folder.exists() else []
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def put_back(folder, state):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in state.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def states_of(folder, body):
    """The different states of a folder while `body` runs; what was opened to be written is also there in half."""
    states, before = [], [""]

    def add(state):
        if state not in states:
            states.append(state)

    def look(label):
        state, previous = state_of(folder), states[-1] if states else {}
        for name, content in state.items():
            in_place = ".tmp" in name or before[0] == f"open {short(name)}"
            if content and in_place and content != previous.get(name):
                add({**state, name: content[: len(content) // 2]})
        add(state)
        before[0] = label

    with before_each_write(look):
        body()
    look("")
    return states
