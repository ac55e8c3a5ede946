"""Mirrors: real offline files, nothing imported when disabled, nothing that waits or stops the training."""

import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tools.waiting import PATIENCE
from thriftlab.data.errors import UserError
from thriftlab.train.records.tracking import Tracker, flatten, tracker, wandb_mode


def section(wandb="disabled", tensorboard=False):
    return SimpleNamespace(wandb=wandb, tensorboard=tensorboard, project="tests", group=None)


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """No key, no settings and no network address of wandb, whoever runs this."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


MIRROR = """
import sys, warnings
from pathlib import Path
from types import SimpleNamespace
from thriftlab.train.records.tracking import tracker
log = SimpleNamespace(wandb=sys.argv[1], tensorboard=False, project="tests", group="g")
mirror = tracker(log, Path(sys.argv[2]), "run", {"seed": 1, "optim": {"name": "adamw", "lr": 1e-3}}, "abc123")
for step in range(1, 4):
    mirror.log({"step": step, "tokens": 100 * step, "loss": 1 / step, "grad_norm": None}, 100 * step)
mirror.log({"step": 3, "tokens": 300, "eval": {"loss": 0.5, "sources": {"docs": {"loss": 0.25}}}}, 300)
mirror.finish()
print("wandb" in sys.modules)
"""


def run_mirror(mode: str, out: Path, **environment: str) -> str:
    """Mirror a small run in a process of its own, which sits at a terminal where nobody answers; what it printed."""
    theirs, ours = pty.openpty()
    printed: list[bytes] = []

    def read():
        while not b"".join(printed).endswith(b"END"):
            printed.append(os.read(theirs, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    command = [sys.executable, "-W", "always::RuntimeWarning", "-c", MIRROR, mode, str(out)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdin=ours,
            stdout=subprocess.PIPE,
            stderr=ours,
            timeout=PATIENCE,
        )
    finally:
        os.write(ours, b"END")
        reader.join()
        os.close(ours)
        os.close(theirs)
    text = b"".join(printed).decode().removesuffix("END")
    assert done.returncode == 0, text
    return done.stdout.decode().splitlines()[-1] + "\n" + text


def records(out: Path) -> list[list[dict]]:
    """What wandb's own reader finds in every run file, oldest first."""
    wandb = shutil.which("wandb", path=Path(sys.executable).parent)
    runs = []
    for file in sorted(out.glob("wandb/offline-run-*/run-abc123.wandb")):
        lines = subprocess.check_output([wandb, "leet", "inspect", "--json", file], text=True).splitlines()
        runs.append([json.loads(line) for line in lines])
    return runs


def history(run: list[dict]) -> list[dict]:
    rows = [record["history"] for record in run if record["type"] == "history"]
    return [{key: value for key, value in row["item"].items() if not key.startswith("_")} for row in rows]


LOGGED = [
    {"step": 1, "tokens": 100, "loss": 1},
    {"step": 2, "tokens": 200, "loss": 0.5},
    {"step": 3, "tokens": 300, "loss": 1 / 3},
    {"step": 3, "tokens": 300, "eval/loss": 0.5, "eval/sources/docs/loss": 0.25},
]


@pytest.mark.slow
def test_offline_writes_what_was_logged_and_resumes_under_the_same_id(tmp_path):
    assert "Warning" not in run_mirror("offline", tmp_path)
    assert "Warning" not in run_mirror("online", tmp_path, WANDB_MODE="offline")
    first, second = records(tmp_path)
    assert history(first) == history(second) == LOGGED
    (described,) = [record["run"] for record in first if record["type"] == "run"]
    config = described["config"]["update"]
    assert {key: config[key] for key in ("seed", "optim.name", "optim.lr")} == {
        "seed": 1, "optim.name": "adamw", "optim.lr": 1e-3,
    }  # fmt: skip
    assert (described["run_id"], described["project"], described["run_group"]) == ("abc123", "tests", "g")
    metrics = [record["metric"] for record in first if record["type"] == "metric"]
    assert any(m.get("glob_name") == "*" and m["step_metric"] == "tokens" for m in metrics)


@pytest.mark.parametrize(("mode", "environment"), [("disabled", "offline"), ("disabled", ""), ("online", "disabled")])
def test_disabled_imports_nothing_and_leaves_nothing(tmp_path, mode, environment):
    assert run_mirror(mode, tmp_path, WANDB_MODE=environment) == "False\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_online_without_a_key_goes_on_offline_and_does_not_ask(tmp_path):
    printed = run_mirror("online", tmp_path)
    assert printed.count("RuntimeWarning") == 1 and "no API key" in printed
    assert [history(run) for run in records(tmp_path)] == [LOGGED]


@pytest.mark.slow
def test_online_without_a_network_goes_on_offline(tmp_path):
    printed = run_mirror("online", tmp_path, WANDB_API_KEY="0123456789" * 4, WANDB_INIT_TIMEOUT="2")
    assert printed.count("RuntimeWarning") == 1 and "wandb (online) failed" in printed
    assert [history(run) for run in records(tmp_path)] == [LOGGED]


def test_the_environment_chooses_between_online_and_offline(monkeypatch):
    for said, mode in (("dryrun", "offline"), ("run", "online"), ("offline", "offline"), ("disabled", "disabled")):
        monkeypatch.setenv("WANDB_MODE", said)
        assert wandb_mode(section("online")) == mode
        assert wandb_mode(section("disabled")) == "disabled"


BROKEN = {  # where wandb fails -> what it is there
    "import": None,
    "setup": "setup",
    "settings": "Settings",
    "init": "init",
    "define_metric": "define_metric",
    "log": "log",
    "finish": "finish",
}


def fake_wandb(broken):
    """A module that fails in one of its functions."""

    def does(name):
        def call(*args, **kwargs):
            if name == broken:
                raise RuntimeError(f"{name} is broken\nand says more")
            return module

        return call

    module = SimpleNamespace(api_key="k" * 40, **{name: does(name) for name in [*BROKEN.values(), "teardown"] if name})
    module.settings = module
    return module


@pytest.mark.parametrize("where", BROKEN)
def test_wandb_may_fail_anywhere_and_warns_once(where, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(BROKEN[where]) if where != "import" else None)
    monkeypatch.setenv("WANDB_RUN_ID", "")
    with pytest.warns(RuntimeWarning, match="training goes on") as caught:
        mirror = tracker(section("online"), tmp_path, "run", {}, "abc")
        for step in (1, 2):
            mirror.log({"step": step}, step)
        mirror.finish()
    assert len(caught) == 1 and "\n" not in str(caught[0].message) and mirror.mirrors == []


@pytest.mark.parametrize("name", ["WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_INIT_TIMEOUT", "WANDB_MODE"])
def test_an_empty_variable_is_none(name, tmp_path, monkeypatch):
    module, asked = fake_wandb(""), {}
    module.init = lambda **words: asked.update(words) or module
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv(name, "")
    tracker(section("online"), tmp_path, "run", {}, "abc").finish()
    assert (asked["id"], asked["project"], asked["mode"]) == ("abc", "tests", "online")


@pytest.mark.slow
def test_an_address_that_wandb_refuses_stops_nothing(tmp_path):
    printed = run_mirror("online", tmp_path, WANDB_BASE_URL="api.wandb.ai")
    assert printed.count("RuntimeWarning") == 1 and "base_url = 'api.wandb.ai'" in printed
    assert "training goes on" in printed


# ------------------------------------------------------------------------------------------------------ TensorBoard


def test_tensorboard_that_cannot_write_warns_once(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.warns(RuntimeWarning, match="TensorBoard does not start: .*; training goes on without it") as caught:
        assert tracker(section(tensorboard=True), tmp_path, "run", {}).mirrors == []
    assert len(caught) == 1


FULL_DISK = """
import errno, sys, threading, warnings
from pathlib import Path
from types import SimpleNamespace
from tensorboard.summary.writer.record_writer import RecordWriter
from thriftlab.train.records.tracking import tracker

plain, left = RecordWriter.write, int(sys.argv[2])

def write(self, data):
    global left
    left -= 1
    if left < 0:
        raise OSError(errno.ENOSPC, "No space left on device")
    plain(self, data)

RecordWriter.write = write
mirrors = tracker(SimpleNamespace(tensorboard=True, wandb="disabled"), Path(sys.argv[1]), "run", {})
for tokens in range(200):
    mirrors.log({"loss": 1.0}, tokens)
mirrors.finish()
threading.Thread(target=lambda: 1 / 0).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize("writes", [0, 1, 9])
def test_a_full_disk_costs_tensorboard_and_one_warning(tmp_path, writes):
    """TensorBoard writes in a thread of its own, which would leave a trace; those of other threads are shown."""
    words = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(writes)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("No space left on device") == 1
    assert done.stderr.count("RuntimeWarning: TensorBoard ") == 1 and "training goes on" in done.stderr
    assert done.stderr.count("Traceback") == 1 and "ZeroDivisionError" in done.stderr


def test_tensorboard_has_the_scalars_against_tokens(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mirror = tracker(section(tensorboard=True), tmp_path, "run", {})
    for step in (1, 2):
        mirror.log({"step": step, "loss": step / 2, "eval": {"loss": 1}, "text": "x", "none": None}, 100 * step)
    mirror.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["step", "loss", "eval/loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(100, 0.5), (200, 1.0)]


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"thriftlab\[tensorboard\]"):
        tracker(section(tensorboard=True), tmp_path, "run", {})


# ---------------------------------------------------------------------------------------------------------- tracker


def test_other_ranks_mirror_nothing(tmp_path):
    assert tracker(section("online", tensorboard=True), tmp_path, "run", {}, enabled=False).mirrors == []
    assert list(tmp_path.iterdir()) == []


class Broken:
    def log(self, values, tokens):
        raise ConnectionError("gone")

    def finish(self):
        raise AssertionError("it was dropped")


class Kept(list):
    def log(self, values, tokens):
        self.append((values, tokens))

    def finish(self):
        self.append("finished")


def test_a_mirror_that_breaks_is_dropped_with_one_warning():
    kept = Kept()
    mirrors = Tracker([Broken(), kept])
    with pytest.warns(RuntimeWarning, match="Broken stopped mirroring .gone.; training goes on") as caught:
        mirrors.log({"loss": 1}, 10)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mirrors.log({"loss": 2}, 20)
        mirrors.finish()
    assert kept == [({"loss": 1}, 10), ({"loss": 2}, 20), "finished"]


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None, "f": {}}, ".") == {"a.b": 1, "a.c.d": [2], "e": None}
