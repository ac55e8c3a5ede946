"""Folders of studies as runs and the comparison leave them, with made-up numbers."""

import json

import numpy as np

from thriftlab.data.files import seal
from thriftlab.train.records.record import write_record

STATE = {"adamw": 4_000_000, "frugal": 1_900_000, "signsgd": 0}


def make_record(method, seed, loss, speed=20_000.0):
    state = STATE.get(method, 4_000_000)
    return {
        "status": "done", "fingerprint": f"{method}-{seed}", "method": method, "seed": seed,
        "config": {"optim": {"name": method, "lr": 1e-3}, "budget": {"tokens": 1_000_000}},
        "commit": "0123456789abcdef", "diff_sha256": None, "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"system": "Linux", "cpu": "a CPU", "cores": 2, "threads": 1, "memory_bytes": 8, "gpus": []},
        "data": {"fingerprint": "feed", "plan": "beef", "tokenizer": "bytes"},
        "model": {"parameters": 812_345, "trained": 812_345, "flops_per_token": 5_000_000},
        "budget": {"steps": 100, "tokens": 1_000_000, "flops": 5e12, "seconds": 50.0},
        "results": {
            "loss": loss, "bits_per_byte": loss / 2, "perplexity": np.exp(loss), "train_loss": loss,
            "sources": {
                "prose": {"loss": loss - 0.1, "bits_per_byte": loss / 2},
                "code": {"loss": loss + 0.1, "bits_per_byte": loss / 3},
            },
        },
        "memory": {"parameter_bytes": 3_249_380, "state_bytes": state, "predicted_state_bytes": state,
                   "peak_bytes": 10**8},
        "speed": {"tokens_per_second": speed, "mfu": None},
        "skipped_steps": 0, "started": 1.7e9, "finished": 1.7e9 + 60,
    }  # fmt: skip


def write_run(folder, method, seed, loss, **changes):
    """A run's folder as the trainer leaves it: a curve that ends at `loss`, and the record."""
    out = folder / method / f"seed-{seed}"
    out.mkdir(parents=True)
    noise, lines = np.random.default_rng(seed), []
    for step in range(1, 101):
        line = {"step": step, "tokens": 10_000 * step, "seconds": 0.5 * step}
        height = loss + 3 * np.exp(-step / 15)
        lines.append({**line, "loss": height + noise.normal(0, 0.05), "lr": 1e-3})
        if step % 10 == 0:
            lines.append({**line, "eval": {"loss": loss if step == 100 else height, "bits_per_byte": height / 2}})
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_record(out, {**make_record(method, seed, loss), **changes})


def write_plan(folder, methods, seeds, **changes):
    plan = {
        "format": 2, "command": "thriftlab compare adamw frugal", "question": "", "contrasts": [],
        "base": {"model": {"preset": None, "dim": 64}},
        "arms": {method: {"tree": {"optim": {"name": method}}, "seeds": len(seeds)} for method in methods},
        "budget": {"tokens": 1_000_000}, "jobs": 2, "threads": 1,
        "lr": {method: {"how": "default", "lr": None, "edge": None, "trials": []} for method in methods},
        "failures": {}, **changes,
    }  # fmt: skip
    (folder / "study.json").write_bytes(seal(plan))
