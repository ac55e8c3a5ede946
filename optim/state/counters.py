"""Counters of steps: read as numbers on a CPU; on a device added to, and read only where a refresh may be due.

What follows from a counter is computed where it lies. The host keeps the most that a counter of a device can be: a step
adds one, and one that is refused (`applied`, a 0-dim tensor on the device, is 0) adds nothing. So nothing is due before
this bound is. A counter that a CUDA graph counts on is unknown to the host from then on.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from thriftlab.optim.state.keys import State

Age = int | Tensor  # steps since the moments were zero: of one matrix, or of several, float64 [matrices]


class Bound(NamedTuple):
    """What the host knows of a counter on a device."""

    version: int  # of the tensor, which says whether somebody else has written it
    most: int
    exact: bool


class Ticks:
    """Steps that a kernel counts, of all counters that follow: what the host knows of them moves with one number."""

    def __init__(self) -> None:
        self.steps, self.exact = 0, True

    def count(self, exact: bool) -> None:
        """One step; `exact`: it cannot have been refused."""
        self.steps, self.exact = self.steps + 1, self.exact and exact


class Following(NamedTuple):
    """What the host knew of a counter, and what counts it since."""

    known: Bound
    ticks: Ticks


BOUNDS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by counter; None: a CUDA graph counts it on


def counts_on_host(weight: Tensor, group: dict[str, Any]) -> bool:
    return weight.device.type in ("cpu", "meta") and group.get("applied") is None


def begin_counting(names: tuple[str, ...], weight: Tensor, state: State, group: dict[str, Any]) -> None:
    """Gives a state the counters that it lacks, and takes those that it has to where they are counted."""
    for name in names:
        if counts_on_host(weight, group):
            state.setdefault(name, torch.tensor(0, device="cpu"))
        elif name not in state:
            state[name] = torch.zeros((), dtype=torch.int64, device=weight.device)
            know(state[name], 0)
        elif state[name].device != weight.device:
            count = int(state[name])
            state[name] = state[name].to(weight.device)
            know(state[name], count)


def count_on(counters: list[Tensor], applied: Tensor | None) -> None:
    """One step more, if it is applied; for counters on a device."""
    bounds, told = [bound(counter) for counter in counters], Bound(0, 1, True) if applied is None else bound(applied)
    if counters:
        count_together(counters, applied)
    for counter, known in zip(counters, bounds, strict=True):
        if capturing():
            BOUNDS[counter] = None
        elif known:
            know(counter, known.most + (told.most if told else 1), known.exact and told is not None)


def count_step(weights: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    """One step more of some tensors, wherever it is counted."""
    counters = [state["step"] for state in states]
    if counts_on_host(weights[0], group):
        torch._foreach_add_(counters, 1)
    else:
        count_on(counters, group.get("applied"))


def count_together(counters: list[Tensor], applied: Tensor | None) -> None:
    """The same of any counters of one dtype on a device."""
    if applied is None:
        torch._foreach_add_(counters, 1)
    else:
        torch._foreach_add_(counters, [applied.to(counters[0].dtype)] * len(counters))


@torch.compiler.disable
def bound(counter: Tensor) -> Bound | None:
    known = BOUNDS.get(counter)
    if isinstance(known, Following):
        (version, at_most, exact), ticks = known
        known = Bound(version, at_most + ticks.steps, exact and ticks.exact)
    return known if known and known.version == counter._version else None


@torch.compiler.disable
def know(counter: Tensor, most: int, exact: bool = True) -> None:
    if BOUNDS.get(counter, True):
        BOUNDS[counter] = Bound(counter._version, most, exact)


def follow(counter: Tensor, ticks: Ticks) -> None:
    """A kernel counts it from now on; one that nothing is known of is on the host, and is read."""
    if known := bound(counter):
        BOUNDS[counter] = Following(known, ticks)


def capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def most(counter: Any) -> int:
    """The count, or the most that it can be; a tensor is read if nothing is known of it."""
    known = bound(counter) if isinstance(counter, Tensor) else None
    return known.most if known else int(counter)


@torch.compiler.disable
def learn(numbers: list[Tensor]) -> list[int] | None:
    """The integers in 0-dim tensors of one device: by one read, if the host does not know them, and with it of all that
    it does not know there; so the next group of an optimizer need not ask again. None of fake ones."""
    if any(not known or not known.exact for known in map(bound, numbers)):
        place = where(numbers[0])
        unknown = [n for n in BOUNDS if (known := bound(n)) and not known.exact and where(n) == place]
        asked = [*{id(number): number for number in (*numbers, *unknown)}.values()]
        if (told := read(asked)) is None:
            return None
        for number, value in zip(asked, told, strict=True):
            know(number, value)
        return told[: len(numbers)]
    return [most(number) for number in numbers]


def where(number: Tensor) -> tuple[torch.device, Any]:
    return number.device, number.fake_mode if isinstance(number, FakeTensor) else None


def read(tensors: list[Tensor]) -> list[int] | None:
    """The integers in 0-dim tensors, by one read of the device; None of fake ones."""
    try:
        return torch.stack([tensor.long() for tensor in tensors]).cpu().tolist()
    except DataDependentOutputException:
        return None
