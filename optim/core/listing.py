"""What a method leaves as it was, and why: a memory bill that is not as expected is explained here.

The surprise: most of a small model is on this list: embedding and head of a 60M model are over half of it.
"""

from typing import Any

import torch

from thriftlab.optim.core.split import SplitOptimizer, is_split, subspace_of
from thriftlab.optim.frugal import blocks
from thriftlab.optim.layers.base import Conversion


def left_to_adamw(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Name -> reason, for every parameter of a split method that full AdamW trains; empty for other optimizers."""
    if not isinstance(optimizer, SplitOptimizer):
        return {}
    found = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            if p.ndim != 2:
                found[name] = f"{p.ndim}-D"
            elif not group["split"]:
                found[name] = "not chosen by name"
            elif not is_split(p, group):
                rank = group.get("rank") or subspace_of(group).size(p.shape)  # type: ignore[union-attr]
                found[name] = f"rank {rank} >= smaller side {min(p.shape)}"
    return found


def remarks(optimizer: torch.optim.Optimizer) -> list[str]:
    """Where a split method is not what its name promises: it splits nothing, or no block ever has a state."""
    if not isinstance(optimizer, SplitOptimizer):
        return []
    groups, left = optimizer.param_groups, left_to_adamw(optimizer)
    found = []
    if all(name in left for group in groups for name in group["names"]):
        why = sorted({reason for reason in left.values() if reason.startswith("rank")}) or ["none was chosen by name"]
        found.append(f"no matrix is split, this is full AdamW alone ({'; '.join(why)})")
    for group in groups:
        matrices = [p for p in group["params"] if is_split(p, group)]
        if matrices and group.get("subspace") == "blocks" and group["density"] > 0 and never_active(group):
            found.append(
                f"density {group['density']:g} of the blocks of {len(matrices)} matrices (unit={group['unit']!r}) "
                f"rounds to none, as in the published code: no matrix has a state"
                + (", and none is trained" if group["free"] == "none" else f", all take free={group['free']!r}")
            )
    return found


def never_active(group: dict[str, Any]) -> bool:
    """Whether a fixed number of blocks is active, and that number is 0."""
    return group["balance"] == "count" and not callable(group["order"]) and not blocks(group, count=0)


def listing(optimizer: torch.optim.Optimizer) -> str:
    """The same by reason, in one line, and `remarks`, a line each; empty where there is nothing to say."""
    return "\n".join(line for line in (left_line(optimizer), *remarks(optimizer)) if line)


def left_line(optimizer: torch.optim.Optimizer) -> str:
    left = left_to_adamw(optimizer)
    if not left:
        return ""
    groups = optimizer.param_groups
    sizes = {name: p.numel() for g in groups for name, p in zip(g["names"], g["params"], strict=True)}
    share = sum(sizes[name] for name in left) / max(sum(sizes.values()), 1)
    return f"full AdamW for {len(left)} of {len(sizes)} tensors ({share:.0%} of the parameters): {by_reason(left)}"


def replaced(layer: str, conversion: Conversion) -> str:
    """How many Linears a layer method stands for, and which it was to and does not; empty where none was meant."""
    done, left = conversion.converted, conversion.left
    if not done and not left:
        return ""
    rest = f"; left as they are: {by_reason(left)}" if left else ""
    return f"{layer} in the place of {len(done)} of {len(done) + len(left)} Linears{rest}"


def by_reason(left: dict[str, str]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in left.items():
        reasons.setdefault(reason, []).append(name)
    return "; ".join(f"{reason}: {shortened(names)}" for reason, names in reasons.items())


def shortened(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
