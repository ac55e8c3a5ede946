"""The table of docs/scale-out.md: every method at every stage beside one process, at 2, 3 and 4 ranks, 50 steps.

python tests/prove_zero.py [WORLD ...]
"""

import sys

import gang
import zero_cases

from thriftlab.train.backend import make_backend

STEPS = 50
VARIANTS = {  # beside every method x stage in fp32: (options, methods)
    "clip": ({"max_norm": 0.3}, ("adamw", "fira", "muon")),
    "two micro-batches": ({"accumulate": 2}, ("adamw", "galore", "frugal columns")),
    "bf16": ({"precision": "bf16"}, ("adamw", "galore")),
    "activation checkpointing": ({"checkpointing": True}, ("galore",)),
    "overlap_comm": ({"settings": {"zero_optimization": {"overlap_comm": True}}}, ("galore",)),
    "a step that is not finite": ({"spoil": (3,)}, ("adamw", "apollo")),
}


def compare(cases):
    backend = make_backend("deepspeed")
    found = zero_cases.compare(backend, cases, STEPS)
    backend.close()
    return found


def table(world):
    cases = [(method, stage, {}) for method in zero_cases.METHODS for stage in range(4)]
    cases += [
        (method, stage, options) for options, methods in VARIANTS.values() for method in methods for stage in range(4)
    ]
    found = gang.ranks(world, compare, cases)
    worst = [max(rank[i][0] for rank in found) for i in range(len(cases))]
    labels = [*zero_cases.METHODS, *(f"{name}: {method}" for name, (_, some) in VARIANTS.items() for method in some)]
    print(
        f"\n| {world} ranks | stage 0 | 1 | 2 | 3 | sent at 1 | at 3 | state of a rank at 1 | at 3 | of one process |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row, label in enumerate(labels):
        at = slice(4 * row, 4 * row + 4)
        sent, state = (
            [max(rank[i][1][key] for rank in found) for i in (4 * row + 1, 4 * row + 3)]
            for key in ("planned", "state_bytes")
        )
        cells = [*(f"{x:.1e}" if x else "0" for x in worst[at]), *(f"{x:.0f}" for x in (*sent, *state))]
        print(f"| {label} | {' | '.join(cells)} | {found[0][4 * row][1]['total_bytes']} |", flush=True)
    for rank in found:
        for case, (_, measured) in zip(cases, rank, strict=True):
            applied = sum(applied for *_, applied in measured["steps"][0])
            assert measured["sent"] == measured["planned"] * applied, case


if __name__ == "__main__":
    for world in map(int, sys.argv[1:] or (2, 3, 4)):
        table(world)
