"""Copying (Hernandez et al. 2022, 2205.10487): the loss on a passage that comes eleven times in a row.

The paper tiles the first paragraph of one book. Here there are 64 passages of held-out text and 64 of random tokens, of
floor(T / 11) tokens, with T the length of a training window, behind the token that opens a document.
"""

from typing import Any

from torch import Tensor

from thriftlab.train.probes.base import probe
from thriftlab.train.probes.material import Material
from thriftlab.train.probes.subject import Subject

COPIES = 11


@probe("copy_loss", "copy_ratio")
def copying(subject: Subject, material: Material) -> dict[str, Any]:
    """copy_loss: nats per token over all eleven copies, the first included, and `curve`, the mean of each copy, c_1 to
    c_11. copy_ratio: mean(c_2, ..., c_11) / c_1; 1 for a model that does not copy."""
    size = material.length // COPIES
    kinds = {"held_out": material.passages(size), "random": material.random(size)}
    curves = {kind: curve(subject, material, passages) for kind, passages in kinds.items()}
    return {
        "copy_loss": {kind: c.mean().item() for kind, c in curves.items()}
        | {"curve": {kind: c.tolist() for kind, c in curves.items()}},
        "copy_ratio": {kind: (c[1:].mean() / c[0]).item() for kind, c in curves.items()},
    }


def curve(subject: Subject, material: Material, passages: Tensor) -> Tensor:
    """Nats per token in each copy, [COPIES]."""
    losses = subject.losses(material.opened(passages.repeat(1, COPIES)))  # [passages, COPIES * size]
    return losses.unflatten(1, (COPIES, -1)).mean((0, 2))
