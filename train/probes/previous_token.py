"""Previous-token heads (Olsson et al. 2022, 2209.11895), on which an induction head builds."""

from typing import Any

import torch

from thriftlab.train.probes.base import probe
from thriftlab.train.probes.material import Material
from thriftlab.train.probes.prefix_matching import by_head, sequences
from thriftlab.train.probes.subject import Subject


@probe("previous_token")
def previous_token(subject: Subject, material: Material) -> dict[str, Any]:
    """Of each head the attention from position i to i - 1, mean over all i but the first, on the sequences of
    `prefix_matching`. `heads` [layers, heads], their `mean` and `max`."""
    rows = sequences(material)
    queries = rows.shape[1] - 1
    return {"previous_token": by_head(subject.attention(rows), torch.ones(queries).double().diag(-1) / queries)}
