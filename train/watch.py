"""What the record shows of the weights of one step.

All of it is counted in predicted tokens and not in windows, so that signals that weigh tokens, windows and sources are
told in the same numbers. Where all windows have as many tokens, it is the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thriftlab.train.backends.base import Backend

# Of weights over the mean weight: none, then half octaves from 2^-6 to 2^6, and what lies beyond on either side.
EDGES = [1e-30, *(2 ** (k / 2) for k in range(-12, 13))]


def watch(
    backend: Backend, weights: Tensor, mask: Tensor, domain: Tensor, domains: int, edges: Tensor
) -> dict[str, Tensor]:
    """Statistics of the weights of the global batch.

    Args:
        weights: of this rank's rows, [rows, seq], over the mean weight of the global batch.
        mask: bool [rows, seq], which tokens are predicted.
        domain: [rows], the number of each row's source.
        edges: EDGES in float64, on the device.

    Returns:
        "ess": (sum w)^2 / (tokens * sum w^2), the effective part of the batch, 0 to 1. "largest": the largest weight.
        "share": [domains], of the sum of the weights. "histogram": [len(EDGES) + 1], parts of the predicted tokens.
    """
    weights = torch.where(mask, weights, 0).double()
    bins = torch.bucketize(weights, edges, right=True)
    histogram = weights.new_zeros(len(EDGES) + 1).index_add(0, bins.flatten(), mask.flatten().to(weights))
    share = weights.new_zeros(domains).index_add(0, domain, weights.sum(1))
    sums = backend.sum(torch.cat([weights.square().sum()[None], share, histogram]))
    square, share, histogram = sums.split([1, domains, len(histogram)])
    tokens = histogram.sum()
    return {
        "ess": tokens / square[0],
        "largest": backend.gather(weights.amax()[None]).amax(),
        "share": share / tokens,
        "histogram": histogram / tokens,
    }


def tell(weights: dict[str, Tensor], sources: Sequence[str]) -> dict[str, Any]:
    """The same for a file: scalars, the histogram as a list, and the others by the name of the source."""
    told: dict[str, Any] = {}
    for key, tensor in weights.items():
        values = tensor.tolist()
        told[key] = dict(zip(sources, values, strict=True)) if tensor.ndim and key != "histogram" else values
    return told
