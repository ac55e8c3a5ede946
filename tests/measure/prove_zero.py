"""The table of docs/scale-out.md: every method at every stage beside one process, at 2, 3 and 4 ranks, 50 steps.

python -m tests.measure.prove_zero [WORLD ...]
"""

import argparse

from tests.tools import gang, zero_cases
from thriftlab.train.backends import make_backend

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


def noise(method, world):
    """Of one process against itself, when it walks through the batch in one piece."""
    (expected, *_), (other, *_) = (zero_cases.reference(method, STEPS, pieces) for pieces in (world, 1))
    return zero_cases.difference(expected, other)


def shown(difference):
    return f"{difference:.1e}" if difference else "0"


def table(world):
    variants = [(method, options) for options, methods in VARIANTS.values() for method in methods]
    rows = [*((method, {}) for method in zero_cases.METHODS), *variants]
    labels = [*zero_cases.METHODS, *(f"{name}: {method}" for name, (_, some) in VARIANTS.items() for method in some)]
    cases = [(method, stage, options) for method, options in rows for stage in range(4)]
    found = gang.ranks(world, compare, cases)
    print(f"\n| {world} ranks | stage 0 | 1 | 2 | 3 | noise | sent at 1 | at 3 | state at 1 | at 3 | of one process |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row, (label, (method, options)) in enumerate(zip(labels, rows, strict=True)):
        ranks = [[rank[4 * row + stage] for rank in found] for stage in range(4)]
        cells = [shown(max(difference for difference, _ in some)) for some in ranks]
        cells.append("" if options else shown(noise(method, world)))
        for key in ("planned", "state_bytes"):
            cells += [str(max(seen[key] for _, seen in ranks[stage])) for stage in (1, 3)]
        print(f"| {label} | {' | '.join(cells)} | {ranks[0][0][1]['total_bytes']} |", flush=True)
    for rank in found:
        for case, (_, seen) in zip(cases, rank, strict=True):
            assert seen["sent"] == seen["planned"] * sum(applied for *_, applied in seen["steps"][0]), case


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="*", metavar="WORLD", type=int, default=[2, 3, 4])
    for world in parser.parse_args().worlds:
        table(world)
