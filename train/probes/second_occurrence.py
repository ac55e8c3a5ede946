"""The loss on a passage x that comes again: [x; x], of T/2 tokens, behind the token that opens a document."""

from typing import Any

from thriftlab.train.probes.base import probe
from thriftlab.train.probes.material import Material
from thriftlab.train.probes.subject import Subject


@probe("second_occurrence_loss")
def second_occurrence(subject: Subject, material: Material) -> dict[str, Any]:
    """Nats per token of the second x, without its first token: nothing says that the passage begins again. Passages of
    held-out text and of random tokens."""
    size = material.length // 2
    kinds = {"held_out": material.passages(size), "random": material.random(size)}
    losses = {kind: subject.losses(material.opened(passages.repeat(1, 2))) for kind, passages in kinds.items()}
    return {"second_occurrence_loss": {kind: found[:, size + 1 :].mean().item() for kind, found in losses.items()}}
