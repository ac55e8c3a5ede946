"""How well the repeated text is learned by heart, by its loss."""

from typing import Any

from thriftlab.train.probes.base import probe
from thriftlab.train.probes.material import Material
from thriftlab.train.probes.subject import Subject


@probe("pool_loss")
def pool_loss(subject: Subject, material: Material) -> dict[str, Any]:
    """Nats per token over up to 64 windows of the pool: the loss of the source `repeated` in evaluations. None in a run
    without a pool."""
    rows = material.pool_rows()
    return {"pool_loss": subject.losses(rows).mean().item() if len(rows) else None}
