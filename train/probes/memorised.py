"""How much of the repeated text is learned by heart, word for word (as Carlini et al. 2022, 2202.07646, ask for it)."""

from typing import Any

from thriftlab.train.probes.base import probe
from thriftlab.train.probes.material import Material
from thriftlab.train.probes.subject import Subject

TOKENS = 50


@probe("memorised")
def memorised(subject: Subject, material: Material) -> dict[str, Any]:
    """The part of up to 64 windows of the pool whose first k tokens the model continues greedily with the next k, every
    one right; k = min(50, T / 2). None in a run without a pool.

    A greedy continuation is right as far as the most probable token is the right one at each place of the true text, so
    one forward answers it and nothing is generated.
    """
    k, rows = min(TOKENS, material.length // 2), material.pool_rows()
    if not len(rows):
        return {"memorised": None}
    text = rows[:, : 2 * k]
    right = subject.choices(text)[:, -k:] == text[:, -k:]
    return {"memorised": right.all(1).double().mean().item()}
