"""Stands in for `thriftlab train` in tests of the study: no torch, a loss by formula, a step every few milliseconds.

Behaves as the trainer does: metrics.jsonl, a sealed record.json, one file as checkpoint; a signal ends it after the
step, and the same command goes on. What it does is noted in the run's events.txt, what it is told is in orders.txt.
"""

import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

config = json.loads(Path(sys.argv[1]).read_text())
out, optim, seed = Path(config["out"]), config["optim"], config["seed"]
steps = config["budget"]["tokens"] // 256
fingerprint = json.dumps([optim, seed, config["budget"]])
stop = []


def note(text):
    with open(out / "events.txt", "a") as file:
        file.write(f"{text}\n")


def loss_at(step):
    """Lowest at lr = 3e-3; the methods differ by the length of their names."""
    return 2 + 0.1 * math.log10(optim["lr"] / 3e-3) ** 2 + 0.01 * len(optim["name"]) + 0.001 * seed % 7 + 1 / step


def orders():
    """Lines in OUT/../../orders.txt: `METHOD SEED WORD`, and the learning rate where one alone is meant."""
    path = out.parents[1] / "orders.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    mine = [line.split()[2:] for line in lines if line.split()[:2] == [optim["name"], str(seed)]]
    return [word for word, *lr in mine if not lr or float(lr[0]) == optim["lr"]]


signal.signal(signal.SIGTERM, lambda number, frame: (note("signal"), stop.append(number)))
locks = [file for fd in Path("/proc/self/fd").iterdir() if (file := os.path.realpath(fd)).endswith(".lock")]
note(f"start {os.getpid()} {os.getpgid(0)} {os.environ['OMP_NUM_THREADS']} {time.time()} {locks}")
if "fail" in orders():
    sys.exit("error: this run was told to fail")
saved = out / "step.txt"
first = int(saved.read_text()) if saved.exists() else 0
with open(out / "metrics.jsonl", "a") as metrics:
    for step in range(first + 1, steps + 1):
        while "hang" in orders():
            time.sleep(0.01)
        time.sleep(0.2 if "slow" in orders() else 0.0)
        line = {"step": step, "tokens": 256 * step, "seconds": 0.01 * step}
        metrics.write(json.dumps({**line, "loss": loss_at(step), "lr": optim["lr"]}) + "\n")
        metrics.flush()
        if stop:
            saved.write_text(str(step))
            sys.exit(f"error: stopped after step {step}")
    metrics.write(json.dumps({**line, "eval": {"loss": loss_at(steps), "bits_per_byte": 1.0}}) + "\n")
diverged = "diverge" in orders()
record = {
    "status": "done", "fingerprint": fingerprint, "method": optim["name"], "seed": seed, "config": config,
    "commit": None, "diff_sha256": None, "versions": {}, "data": {"fingerprint": "feed", "tokenizer": "bytes"},
    "machine": {"cpu": "a CPU", "cores": 2, "system": "Linux", "threads": 1, "gpus": []},
    "model": {"parameters": 1, "flops_per_token": 6}, "budget": line,
    "results": {"loss": None if diverged else loss_at(steps), "bits_per_byte": 1.0, "sources": {}},
    "memory": {"state_bytes": 8, "predicted_state_bytes": 8}, "speed": {"tokens_per_second": 1000.0},
    "skipped_steps": 0, "started": 0.0, "finished": 1.0, "files": {},
}  # fmt: skip
digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()  # as data/files.py seals; its import takes longer
(out / "record.json").write_text(json.dumps({**record, "sha256": digest}, indent=2) + "\n")
note("done")
