"""What a probe is: a function of a model and of data that it is not trained on, registered in `PROBES`.

It returns its findings by name, numbers and lists of numbers; None or NaN, in files null, where there is nothing to
measure. Everything that it draws is a function of the data alone, so runs of all seeds are asked the same. Every rank
computes all of it: a sharded model cannot be called by some ranks only, and what is found does not depend on their
number.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from thriftlab.train.probes.material import Material
from thriftlab.train.probes.subject import Subject

Probe = Callable[[Subject, Material], dict[str, Any]]

PROBES: dict[str, Probe] = {}  # by the names of what is found; one probe may find several things

SHORTEST = 22  # tokens of a training window; in a shorter one there is no place for eleven copies of two tokens


def probe(*names: str) -> Callable[[Probe], Probe]:
    """Registers a function that finds these."""

    def register(function: Probe) -> Probe:
        for name in names:
            if name in PROBES:
                raise ValueError(f"there is already a probe {name!r}: {PROBES[name].__qualname__}")
            PROBES[name] = function
        return function

    return register


@torch.no_grad()
def measured(subject: Subject, material: Material, names: Sequence[str]) -> dict[str, Any]:
    """What the probes of these names find, in evaluation mode, without dropout and without compiling anything."""
    found: dict[str, Any] = {}
    subject.backend.module.eval()
    with torch.compiler.set_stance("force_eager") if subject.compiled else nullcontext():
        for function in dict.fromkeys(PROBES[name] for name in names):
            found |= function(subject, material)
    subject.backend.module.train()
    return {name: found[name] for name in names}
