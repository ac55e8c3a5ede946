"""Blocks of entries that follow one another in a tensor: heads, rows, all, or each; and a number for each block."""

import math
import re
from typing import Any

import torch
from torch import Tensor


def blocks_of(name: str, shape: tuple[int, ...], group: dict[str, Any]) -> int:
    """How many blocks a tensor has, each as many entries that follow one another; ValueError where heads do not fit."""
    if found(name, group["whole"]):
        return 1
    if "bias" in name:
        return math.prod(shape)
    if len(shape) != 2:
        return 1
    if not (group["head_dim"] and found(name, group["heads"])):
        return shape[0]
    if shape[0] % group["head_dim"]:
        raise ValueError(
            f"{name} {shape}: head_dim={group['head_dim']} does not divide its rows; heads=() has no heads"
        )
    return shape[0] // group["head_dim"]


def found(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def mean_squares(grads: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Of as many blocks of each tensor, [blocks] each; of an empty one zeros."""
    pairs = zip(grads, counts, strict=True)
    blocks = [grad.reshape(count, -1) if grad.numel() else grad.new_zeros(count, 1) for grad, count in pairs]
    found = [torch.linalg.vector_norm(block, dim=1) for block in blocks]
    torch._foreach_mul_(found, found)
    torch._foreach_div_(found, [float(block.shape[1]) for block in blocks])
    return found


def spread(factor: Tensor, weight: Tensor) -> Tensor:
    """The factor of each block where its entries are: [m, 1] of rows, [] of one block, like the weight of entries."""
    if len(factor) == weight.numel():
        return factor.view(weight.shape)
    if len(factor) == 1:
        return factor.view(())
    return factor.repeat_interleave(len(weight) // len(factor))[:, None]
