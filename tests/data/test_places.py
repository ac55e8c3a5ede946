"""Where a prepared folder may lie, and that a preparation goes on from whatever a killed one left."""

import builtins
import errno
import fcntl
import io
import os
import shutil
import subprocess

import pytest

from thriftlab.data.errors import DataError
from thriftlab.data.prepare import Input, PrepareConfig, prepare
from thriftlab.data.prepare import pipeline as module
from thriftlab.data.shards import open_dataset

SMALL = "synthetic:documents=12,words=20"


def config(out, path=SMALL, **options):
    return PrepareConfig(out=out, inputs={"web": Input(path=path)}, holdout_bytes=0, **options)


def content(folder):
    """Bytes by name, of all that two equal preparations have in common."""
    files = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    files = {name: data for name, data in files.items() if name.suffix not in (".json", ".sha256")}
    return files | {"fingerprint": open_dataset(folder).fingerprint}


# --- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["empty", "nothing", "prepared", "link"])
def test_out_may_be_a_link(tmp_path, there):
    real = tmp_path / "disk" / "real"
    real.parent.mkdir()
    if there == "empty":
        real.mkdir()
    if there == "prepared":
        prepare(config(real, SMALL + ",seed=1"))
    if there == "link":
        real.symlink_to("further")
    out = tmp_path / "out"
    out.symlink_to("disk/real")
    first = prepare(config(out, force=there == "prepared"))
    assert out.readlink().name == "real" and open_dataset(real).fingerprint == first.fingerprint
    assert prepare(config(out)).notes == ("already prepared",) == prepare(config(real)).notes
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"]
    assert sorted(os.listdir(real.parent)) == sorted(["real", *["further"] * (there == "link")])


@pytest.fixture
def never_read(monkeypatch):
    monkeypatch.setattr(module, "cut", lambda *given: pytest.fail("the corpus was read"))


def test_places_where_no_folder_can_be_are_refused_before_anything_is_read(tmp_path, never_read):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for out in ("/", tmp_path / "loop", tmp_path / "file", tmp_path / "file" / "below", "/proc/out"):
        with pytest.raises(DataError, match=f"{out}: (cannot be made|holds something)"):
            prepare(config(out))


@pytest.mark.parametrize("code", ["EBUSY", "EXDEV"])
def test_a_folder_that_cannot_be_renamed_is_refused_before_anything_is_read(tmp_path, never_read, monkeypatch, code):
    (tmp_path / "mount").mkdir()
    number = getattr(errno, code)
    rename = os.rename

    def refuse(source, target):
        if "mount" in (os.path.basename(source), os.path.basename(target)):
            raise OSError(number, os.strerror(number))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(DataError, match=f"mount: .*{os.strerror(number)}.*choose a folder in it: out=.*mount/data"):
        prepare(config(tmp_path / "mount"))
    assert os.listdir(tmp_path) == ["mount"]


@pytest.mark.parametrize("options", [["-t", "tmpfs", "none"], ["--bind"]])
def test_a_mount_point_is_refused_before_anything_is_read(tmp_path, monkeypatch, options):
    mount = tmp_path / "mount"
    (tmp_path / "disk").mkdir()
    mount.mkdir()
    source = [] if "none" in options else [tmp_path / "disk"]
    if not shutil.which("mount") or subprocess.run(["mount", *options, *source, mount], capture_output=True).returncode:
        pytest.skip("this process may not mount")
    try:
        with monkeypatch.context() as patch, pytest.raises(DataError, match=f"out={mount}/data"):
            patch.setattr(module, "cut", lambda *given: pytest.fail("the corpus was read"))
            prepare(config(mount))
        prepare(config(mount / "data"))
        open_dataset(mount / "data")
    finally:
        subprocess.run(["umount", mount], check=True)


def test_an_empty_folder_survives_a_failure(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "a.txt").write_text("one document is too few")
    with pytest.raises(DataError, match="too few"):
        prepare(config(tmp_path / "out", str(tmp_path / "a.txt")))
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "out"]


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, code):
    def refuse(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(RuntimeWarning, match=f"{tmp_path}: its file system has no locks .{os.strerror(code)}"):
        prepare(config(tmp_path / "out"))
    open_dataset(tmp_path / "out")


@pytest.mark.parametrize("code, remedy", [(errno.EACCES, "get the right to write"), (errno.ENOSPC, "make room"),
                                          (errno.ENOENT, "choose another out$")])  # fmt: skip
def test_a_folder_that_cannot_be_made_is_one_line_with_what_helps(tmp_path, never_read, monkeypatch, code, remedy):
    def refuse(path, *given, **named):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(DataError, match=f"out: cannot be made .*{os.strerror(code)}.*{remedy}") as refused:
        prepare(config(tmp_path / "out"))
    assert "\n" not in str(refused.value)


# --- stopped after each write ----------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


CHANGES = ("rename", "replace", "mkdir", "rmdir", "unlink", "remove")


def stop_after(patch, most):
    """Lets `most` changes of the disk happen; then none any more, as if the process were dead. Returns their count."""
    done = [0]

    def count():
        if done[0] == most:
            raise Killed
        done[0] += 1

    def counted(change):
        def changed(*given, **named):
            count()
            return change(*given, **named)

        return changed

    def opened(file, mode="r", *given, _open=io.open, **named):
        if set(mode) & set("wax+"):
            count()
        return _open(file, mode, *given, **named)

    for name in CHANGES:
        patch.setattr(os, name, counted(getattr(os, name)))
    patch.setattr(io, "open", opened)
    patch.setattr(builtins, "open", opened)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("before, every", [("nothing", 1), ("another", 7), ("empty", 9), ("link", 9)])
def test_every_prefix_of_the_writes_is_a_state_that_the_same_command_goes_on_from(tmp_path, monkeypatch, before, every):
    expected = content(prepare(config(tmp_path / "expected")).path)
    prepare(config(tmp_path / "another", SMALL + ",seed=1"))
    old = content(tmp_path / "another")
    settings = config(tmp_path / "work" / "out", force=True)

    def reset():
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        (tmp_path / "work").mkdir()
        if before == "empty":
            settings.out.mkdir()
        if before == "another":
            shutil.copytree(tmp_path / "another", settings.out)
        if before == "link":
            settings.out.symlink_to("real")

    reset()
    with monkeypatch.context() as patch:
        done = stop_after(patch, -1)
        prepare(settings)
    total = done[0]
    assert total > 12
    for most in [*range(0, total - 12, every), *range(total - 12, total)]:  # folders change their names at the end
        reset()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_after(patch, most)
            prepare(settings)
        if settings.out.exists() and any(settings.out.iterdir()):
            assert content(settings.out) in (old, expected), "whole, or not there"
        if before == "another":
            there = settings.out if settings.out.exists() else settings.out.with_name(".out.old")
            assert content(there) in (old, expected), "what was there is not lost"
        prepare(settings)
        assert content(settings.out) == expected
        assert set(os.listdir(tmp_path / "work")) <= {"out", "real"}
