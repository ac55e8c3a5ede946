"""Proxies: a small run that repeats each source as often as its target, a larger run, will (2606.07597).

That paper finds that the best mixture moves with repetition: a small run sees a small source once where the target sees
it ten times. With b of the target's B steps, a proxy reads of every source the share b / B of its windows, and passes
over them as often as the target passes over all. They are the first windows of the first pass over the source, so a
longer proxy of the same target and seed keeps those of a shorter one, whatever the mixture.
"""

from collections.abc import Sequence
from fractions import Fraction

from thriftlab.data.errors import DataError


def kept_windows(names: Sequence[str], windows: Sequence[int], share: Fraction) -> tuple[int, ...]:
    """How many windows of each source a proxy of `share` of its target keeps. DataError where that is less than one."""
    for name, n in zip(names, windows, strict=True):
        if n * share < 1:
            raise DataError(
                f"source {name!r} has {n} windows, and a proxy of {float(share):.2g} of its target keeps less than one "
                f"of them; raise the budget to {float(1 / (n * share)):.3g} times, or leave the source out"
            )
    return tuple(round(n * share) for n in windows)
