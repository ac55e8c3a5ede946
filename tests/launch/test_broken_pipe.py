"""`thriftlab ... | head` ends quietly, as other tools do; what a terminal cannot show is replaced."""

import errno
import io
import subprocess
import sys
import warnings

import pytest

from tests.tools.tiny import tiny_config
from tests.tools.waiting import PATIENCE
from thriftlab.data.errors import UserError
from thriftlab.data.files import write_json
from thriftlab.launch import cli

COMMAND = [sys.executable, "-m", "thriftlab.launch"]


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_a_run_whose_reader_has_left(tiny_data, tmp_path, both):
    """The pipe breaks at the summary, when everything is saved, or at the first line of progress."""
    write_json(
        tmp_path / "run.json", tiny_config(tiny_data, tmp_path / "out", log={"progress": True}).model_dump(mode="json")
    )
    process = subprocess.Popen(
        [*COMMAND, "train", "--config", str(tmp_path / "run.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else subprocess.PIPE,
    )
    process.stdout.close()
    said = b"" if both else process.stderr.read()
    assert process.wait(PATIENCE) == 141
    assert b"Broken" not in said and b"Traceback" not in said and b"Exception" not in said
    assert (tmp_path / "out" / "record.json").exists() != both


@pytest.mark.slow
def test_help_whose_reader_has_left():
    process = subprocess.Popen([*COMMAND, "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(PATIENCE)) == (b"", 141)


def test_no_room_for_what_is_printed_is_one_line(monkeypatch, capsys):
    def full(argv):
        raise OSError(errno.ENOSPC, "No space left on device")  # of a stream, which has no file name

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(full, ""))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err.startswith("error: what is printed, or a file: No space left on device; make room")


def test_another_broken_pipe_is_a_defect_and_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise BrokenPipeError

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(broken, ""))
    with pytest.raises(BrokenPipeError):
        cli.main(["train"])


def speak(argv):
    print("0.5 ± 0.1", "a −", "\udcff")
    print(warnings.formatwarning("π", RuntimeWarning, "", 0), file=sys.stderr)
    raise UserError("no file é")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_that_cannot_show_everything(encoding, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(speak, ""))
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict"))
    assert cli.main(["train"]) == 2
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    printed, said = (stream.buffer.getvalue().decode(encoding) for stream in (sys.stdout, sys.stderr))
    assert printed.startswith("0.5 ? 0.1 a ?" if encoding == "ascii" else "0.5 ± 0.1 a ") and "?" in printed
    assert "error: no file " in said


def test_nowhere_to_print(monkeypatch):
    """As after `>&- 2>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["--help"]) == 0 and cli.main(["nothing"]) == 2
