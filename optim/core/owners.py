"""Who steps what, where each tensor is stepped by one rank: a balance of work within a bound on the state.

Nobody is asked. What a tensor costs follows from its shape and the method's own `spec`, so every rank finds the same
owners by itself.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    """What owning one parameter means."""

    name: str
    work: int  # operations of its step, up to a constant
    state_bytes: int


def assign(costs: list[Cost], world: int) -> dict[str, int]:
    """The owner of every parameter: the heaviest first, each to the rank with the least work that has room.

    A rank has room while its state is at most the mean over ranks; one with the least state always has. So no rank has
    more than total / world + the largest of one tensor, and with that the work is balanced (Graham's LPT, 1969).
    """
    mean = sum(cost.state_bytes for cost in costs) / world
    owners, work, held = {}, [0] * world, [0] * world
    for cost in sorted(costs, key=lambda cost: (-cost.work, cost.name)):
        rank = min((r for r in range(world) if held[r] <= mean), key=lambda r: (work[r], held[r]))
        owners[cost.name] = rank
        work[rank] += cost.work
        held[rank] += cost.state_bytes
    return owners
