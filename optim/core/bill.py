"""Bytes of an optimizer's state by part: as its method declares them, and as they are allocated."""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from thriftlab.optim.core.method import Method
from thriftlab.optim.core.sharded import as_local
from thriftlab.optim.state.keys import spec_bytes
from thriftlab.optim.state.weights import LOW

PARTS = ("low_bits", "moments", "scales", "bases")
Everything = Callable[[str], bool]


def part_of(key: str) -> str:
    """Of the state, 0-dim counters apart; moments are all that a rule keeps and that is none of the others."""
    if key == LOW:
        return "low_bits"
    return "bases" if key.startswith("basis.") else "scales" if key.endswith(".scale") else "moments"


def parts(found: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Bytes by part, of (key, bytes)."""
    total = Counter(dict.fromkeys(PARTS, 0))
    for key, size in found:
        total[part_of(key)] += size
    return dict(total)


def state_parts(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes by part of the state that is allocated now, 0-dim counters apart."""
    kept = (item for state in optimizer.state.values() for item in as_local(state).items())
    return parts((key, t.nbytes) for key, t in kept if isinstance(t, Tensor) and t.ndim)


def predicted_state_parts(optimizer: Method, keeps: Everything = lambda name: True) -> dict[str, int]:
    """The same from the declared `spec`, before or after it is allocated, for the parameters that take gradients.

    Args:
        keeps: whether the state of a parameter is counted, by its name.
    """
    return parts(
        (key, spec_bytes({key: entry}))
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"], strict=True)
        if p.requires_grad and keeps(name)
        for key, entry in optimizer.declared(name, p, group).items()
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all parts."""
    return sum(state_parts(optimizer).values())


def predicted_state_bytes(optimizer: Method, keeps: Everything = lambda name: True) -> int:
    """Of all parts, as declared."""
    return sum(predicted_state_parts(optimizer, keeps).values())
