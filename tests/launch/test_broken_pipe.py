"""`thriftlab ... | head` ends quietly, as other tools do."""

import subprocess
import sys

import pytest

from tests.tools.tiny import tiny_config
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
    assert process.wait(60) == 141
    assert b"Broken" not in said and b"Traceback" not in said and b"Exception" not in said
    assert (tmp_path / "out" / "record.json").exists() != both


def test_help_whose_reader_has_left():
    process = subprocess.Popen([*COMMAND, "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 141)


def test_another_broken_pipe_is_a_defect_and_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise BrokenPipeError

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(broken, ""))
    with pytest.raises(BrokenPipeError):
        cli.main(["train"])
