"""Which matrices of a group are state-full between two refreshes: FRUGAL's and BAdam's blocks.

A block is a matrix (`unit="tensor"`, what FRUGAL's code does) or all matrices of a layer (`unit="layer"`, what the
papers say). Blocks lie on a circle in the order in which they take turns, each as long as it counts: 1
(`balance="count"`) or its entries (`balance="bytes"`: bytes of state are in proportion). Refresh `count` makes the
blocks active whose middle is in the `count`-th arc, of `density` times the circle: so every block comes as often as any
other, and where to go on is a function of the count.

The surprise: by count, as in the papers, the state's size changes from refresh to refresh, for matrices differ.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from thriftlab.optim.state.keys import Spec, keyed_seed

BlockOrder = Literal["random", "ascending", "descending", "mirror"] | Callable[[list[str], int], list[str]]
BlockUnit = Literal["tensor", "layer"]
Balance = Literal["count", "bytes"]


class Blocks:
    """The subspace that is a whole matrix, or nothing of it: by turns, over the matrices of a group."""

    name = "blocks"
    uses_gradient = False

    def active(self, group: dict[str, Any], count: int) -> set[str]:
        """The state-full matrices of a group after refresh `count`."""
        named = zip(group["names"], group["params"], strict=True)
        sizes = {name: p.numel() for name, p in named if group["split"] and p.ndim == 2}
        if not sizes:  # and nothing to ask an `order` of one's own about
            return set()
        return active_blocks(
            list(sizes), group["density"], group["order"], group["seed"], count,
            group["unit"], group["balance"], list(sizes.values()),
        )  # fmt: skip

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], Spec]:
        """Shape of the coordinates of a matrix that is active, and its basis, of which there is no need."""
        return shape, {}


def active_blocks(
    names: list[str],
    density: float,
    order: BlockOrder,
    seed: int,
    count: int,
    unit: BlockUnit = "tensor",
    balance: Balance = "count",
    sizes: Sequence[int] = (),
) -> set[str]:
    """The names of the active matrices. `sizes` are the entries of each, for `balance="bytes"`.

    `random` is a function of the set of names, not of their order. The others walk through `names`: from the front,
    from the back, or from both ends towards the middle in pairs, on from where the last refresh stopped.
    """
    if callable(order):
        chosen = set(order(names, count))
        if not chosen <= set(names):
            raise ValueError(
                f"order chose {sorted(chosen - set(names))[:3]}, which are not names of the group; "
                "choose among those that it is given"
            )
        return chosen
    blocks = [[name] for name in names] if unit == "tensor" else layers(names)
    entries = dict(zip(names, sizes, strict=True)) if balance == "bytes" else {}
    length = {id(block): sum(entries[name] for name in block) if entries else 1 for block in blocks}
    whole = sum(length.values())
    arc = density * whole if entries else round(density * whole)  # half to even, as the reference
    if order == "mirror" and not entries and arc % 2:
        raise ValueError(f"order='mirror' takes blocks in pairs; density={density} of {whole} blocks is {arc}")

    circle = [(block, length[id(block)]) for block in blocks]
    if order == "random":
        circle.sort(key=lambda item: keyed_seed(seed, min(item[0]), count))
    elif order == "descending":
        circle.reverse()
    elif order == "mirror":
        pairs = zip(circle[: len(circle) // 2], reversed(circle), strict=False)
        circle = [(front + back, a + b) for (front, a), (back, b) in pairs]
    return on_arc(circle, start=0 if order == "random" else count * arc, arc=arc)


def on_arc(circle: list[tuple[list[str], int]], start: float, arc: float) -> set[str]:
    """The names in the blocks (names, length) whose middle lies in [start, start + arc) of the circle."""
    whole, position, chosen = sum(length for _, length in circle), 0, set()
    for block, length in circle:
        if length and (position + length / 2 - start) % whole < arc:
            chosen.update(block)
        position += length
    return chosen


def layers(names: list[str]) -> list[list[str]]:
    """The names of each layer: alike up to the first number ("layers.3."); a name without one stands alone."""
    found: dict[str, list[str]] = {}
    for name in names:
        numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
        found.setdefault(numbered[0] if numbered else name, []).append(name)
    return list(found.values())
