"""The table of docs/scale-out.md: saved by 1 to 4 ranks at stages 0 to 3, resumed by any of them: 256 times a method.

python -m tests.measure.prove_resume [METHOD ...]

Runs are saved after 9 steps, in the middle of a refresh period, and end at step 16, after the next refresh. Each is
held against one process that was never stopped.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from tests.tools import gang, zero_cases
from thriftlab.train.backends import make_backend

WORLDS, STAGES = (1, 2, 3, 4), (0, 1, 2, 3)
SAVED_AT, END = 9, 16


def save(method, folder):
    backend = make_backend("deepspeed")
    zero_cases.save_all(backend, [(method, stage) for stage in STAGES], SAVED_AT, folder)
    backend.close()


def resume(method, folder):
    """By (saved at stage, by ranks, resumed at stage): the weights."""
    backend = make_backend("deepspeed")
    cases = [(stage, world, now) for stage in STAGES for world in WORLDS for now in STAGES]
    named = [(method, f"{method}-{stage}-{world}", now) for stage, world, now in cases]
    found = zero_cases.resume_all(backend, named, SAVED_AT, END, folder)
    backend.close()
    return dict(zip(cases, found, strict=True))


def table(method):
    print(f"\n| {method}, saved by | " + " | ".join(f"resumed by {world}" for world in WORLDS) + " |")
    print("|---|" + "---|" * len(WORLDS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for world in WORLDS:
            gang.ranks(world, save, method, folder)
        expected, *_ = zero_cases.reference(method, END, 1)
        worst: dict[tuple[int, int], float] = {}
        for after in WORLDS:
            for (_, before, _), weights in gang.ranks(after, resume, method, folder)[0].items():
                got = {name: torch.from_numpy(w) for name, w in weights.items()}
                far = zero_cases.difference(expected, got)
                worst[before, after] = max(far, worst.get((before, after), 0.0))
    for before in WORLDS:
        print(f"| {before} ranks | " + " | ".join(f"{worst[before, after]:.1e}" for after in WORLDS) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=["galore", "frugal coordinates"])
    for method in parser.parse_args().methods:
        table(method)
