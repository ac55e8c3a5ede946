"""Small things that ranks say to each other: a list of what every rank said, in their order.

What fails on one rank fails on all, because a rank that went on alone would wait for the others for ever.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


class Channel(NamedTuple):
    """`share(value)` is collective and returns the values of all ranks."""

    rank: int
    share: Callable[[Any], list[Any]]

    def together(self, action: Callable[[], Value]) -> list[Value]:
        """What `action` returned on every rank. Its error on one rank is an OSError on the others."""
        answer, failure = None, None
        try:
            answer = action()
        except Exception as error:
            failure = error
        said = self.share((answer, failure and f"rank {self.rank}: {type(failure).__name__}: {failure}"))
        if failure:
            raise failure
        for _, wrong in said:
            if wrong:
                raise OSError(wrong)
        return [value for value, _ in said]

    def first(self, action: Callable[[], Value]) -> Value:
        """What `action` returned on the first rank, the only one that does it."""
        return self.together(lambda: action() if self.rank == 0 else None)[0]  # type: ignore[return-value]


ALONE = Channel(0, lambda value: [value])


def share(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Picklable values of all ranks of a process group."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values
