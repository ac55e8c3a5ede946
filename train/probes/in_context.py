"""In-context score (Olsson et al. 2022, 2209.11895): how much lower is the loss late in the context than early?"""

from typing import Any

from thriftlab.train.probes.base import probe
from thriftlab.train.probes.material import Material
from thriftlab.train.probes.subject import Subject


@probe("in_context")
def in_context(subject: Subject, material: Material) -> dict[str, Any]:
    """Nats of token 500 minus those of token 50, mean over held-out windows, the first token of a window being token 0.
    In windows of less than 512 tokens the mean of the T/10 tokens about 0.75 T minus that of those about 0.1 T."""
    losses = subject.losses(material.windows()).mean(0)  # [T], of token 1, 2, ...
    late, early = (losses[place.start - 1 : place.stop - 1].mean().item() for place in places(material.length))
    return {"in_context": late - early}


def places(length: int) -> tuple[range, range]:
    """Numbers of the late and of the early tokens."""
    if length >= 512:
        return range(500, 501), range(50, 51)
    width = length // 10
    late, early = (centre - width // 2 for centre in (length * 3 // 4, length // 10))
    return range(late, late + width), range(early, early + width)
