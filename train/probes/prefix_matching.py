"""Prefix matching (Olsson et al. 2022, 2209.11895): does a head look at what followed the same token before?

The paper's text says "preceded"; its erratum, and all programs that work, take the token that follows.
"""

from typing import Any

import torch
from torch import Tensor

from thriftlab.train.probes.base import probe
from thriftlab.train.probes.material import Material
from thriftlab.train.probes.subject import Subject

TOKENS, COPIES, ROWS = 25, 4, 16


@probe("prefix_matching")
def prefix_matching(subject: Subject, material: Material) -> dict[str, Any]:
    """Of each head the attention on the followers of all earlier occurrences of the query's token: mean over the
    queries in copies 2 to 4 of 25 random tokens, no two alike, and over 16 such sequences. `heads` [layers, heads],
    their `mean` and `max`. A head that looks at all positions alike has about (copies before) / (position)."""
    rows = sequences(material)
    return {"prefix_matching": by_head(subject.attention(rows), followers((rows.shape[1] - 1) // COPIES))}


def sequences(material: Material) -> Tensor:
    """The token that opens a document, and behind it few enough tokens that their copies fit into a window: [ROWS, 1 +
    COPIES * tokens]."""
    tokens = min(TOKENS, (material.length - 1) // COPIES)
    return material.opened(material.distinct(ROWS, tokens).repeat(1, COPIES))


def followers(tokens: int) -> Tensor:
    """What each weight counts: 1 / queries where `key` follows an earlier occurrence of the token of `query`."""
    counts = torch.zeros(1 + COPIES * tokens, 1 + COPIES * tokens, dtype=torch.float64)  # [query, key]
    for query in range(1 + tokens, 1 + COPIES * tokens):
        for earlier in range(query - tokens, 0, -tokens):
            counts[query, earlier + 1] = 1
    return counts / ((COPIES - 1) * tokens)


def by_head(attention: Tensor, counts: Tensor) -> dict[str, Any]:
    """The counted weights of each head, and their mean and maximum over heads."""
    heads = (attention * counts).sum((-2, -1))  # [layers, heads]
    return {"mean": heads.mean().item(), "max": heads.max().item(), "heads": heads.tolist()}
