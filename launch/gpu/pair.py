"""What only a pair of ranks can show: how one ends when the other is killed, and how much of Owned's sums is hidden.

On two GPUs that is NCCL, in a rehearsal gloo. The ranks are started without torchrun, which would end the second one by
itself.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from thriftlab.launch.gpu.runs import POLL, small_run, written
from thriftlab.launch.gpu.setting import Finding, Setting

TIMEOUT, GRACE = 8, 12  # seconds: what a rank waits for another; what it has to say so, roll call and watchdog included
LAST_WORDS = re.compile("^error: |Watchdog caught collective operation timeout", re.MULTILINE)  # ours, and NCCL's
OVERLAP = "thriftlab.launch.gpu.overlap"
start = subprocess.Popen


def started_pairs(setting: Setting) -> list[Callable[[], Finding]]:
    """Starts both pairs, most of whose time is that of starting; the functions wait for what they find."""
    return [bereaved(setting), hidden(setting)]


def pair(words: list[str], logs: Path) -> list[subprocess.Popen]:
    """Two ranks of `python -m WORDS`; what they say lies in LOGS-0 and LOGS-1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = []
    for rank in ("0", "1"):
        with open(log_of(logs, rank), "wb") as log:
            env = {**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(start([sys.executable, "-m", *words], stdout=log, stderr=subprocess.STDOUT, env=env))
    return ranks


def log_of(logs: Path, rank: str) -> Path:
    return logs.with_name(f"{logs.name}-{rank}.log")


def bereaved(setting: Setting) -> Callable[[], Finding]:
    """A run of two ranks of which the second is killed: the first has to end, and to say why in one line."""
    backend = {"name": "owned", "timeout": TIMEOUT, "witness": False}
    config = small_run(setting, "bereaved", budget={"tokens": 10**10}, checkpoint={"every": 0}, backend=backend)
    logs = Path(config.out)
    ranks = pair(["thriftlab.launch", "train", "--config", str(written(config))], logs)

    def end() -> Finding:
        try:
            while not stepped(logs) and all(rank.poll() is None for rank in ranks):
                time.sleep(POLL)
            ranks[1].kill()
            begin = time.monotonic()
            while ranks[0].poll() is None and time.monotonic() < begin + TIMEOUT + GRACE:
                time.sleep(POLL)
            return last_words(log_of(logs, "0").read_text(errors="replace"), ranks[0].poll(), time.monotonic() - begin)
        finally:
            for rank in ranks:
                rank.kill()

    return end


def stepped(out: Path) -> bool:
    """Whether the run has taken a step."""
    metrics = out / "metrics.jsonl"
    return metrics.exists() and '"loss"' in metrics.read_text(errors="replace")


def last_words(log: str, code: int | None, seconds: float) -> Finding:
    """What became of the rank that was left."""
    lines = [line.strip() for line in log.splitlines() if LAST_WORDS.search(line)]
    wrong = []
    if code is None:
        wrong.append(f"a rank whose peer was killed still waits after {seconds:.0f} s, backend.timeout is {TIMEOUT} s")
    elif code == 0 or not lines:
        wrong.append(f"a rank whose peer was killed ended with code {code} and no line that says why")
    numbers = {"killed_peer": {"code": code, "seconds": seconds, "lines": lines[:3]}}
    return Finding("" if wrong else f"a rank ends {seconds:.1f} s after its peer", numbers, wrong)


def hidden(setting: Setting) -> Callable[[], Finding]:
    """How long backward takes with and without Owned's sums (overlap.py)."""
    rows, length = setting.size((8, 512), (2, 16))
    sizes = {
        "model": setting.model({"preset": "llama-130m"}),
        "data": {"path": str(setting.text), "sequence_length": length},
        "train": {"batch_size": 2 * rows, "micro_batch_size": rows, "precision": setting.size("bf16", "fp32")},
    }
    config = small_run(setting, "overlap", **sizes, backend={"name": "owned"})
    logs, found = Path(config.out), Path(config.out).with_suffix(".found")
    ranks = pair([OVERLAP, str(written(config)), str(found)], logs)

    def end() -> Finding:
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            said = log_of(logs, "0").read_text(errors="replace").strip().splitlines()
            return Finding("", {}, [f"overlap: exit codes {codes}: {' | '.join(said[-2:])}"])
        return told(json.loads(found.read_text()))

    return end


def told(seconds: dict[str, float]) -> Finding:
    """Of the seconds of backward alone, of sums during it and of sums after it."""
    sums = seconds["after"] - seconds["alone"]
    share = (seconds["after"] - seconds["during"]) / sums if sums > 0 else 0.0
    wrong = [] if seconds["during"] < 1.1 * seconds["after"] else ["sums during backward take longer than after it"]
    says = f"sums of {1e3 * sums:.1f} ms, {max(share, 0):.0%} of them hidden by backward"
    return Finding(says, {"overlap": {**seconds, "hidden": share}}, wrong)
