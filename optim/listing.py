"""What a split method leaves to full AdamW, and why: a memory bill that is not as expected is explained here.

The surprise: most of a small model is on this list: embedding and head of a 60M model are over half of it.
"""

import torch

from thriftlab.optim.split import SplitOptimizer, is_split


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
                found[name] = f"rank {group.get('rank')} >= smaller side {min(p.shape)}"
    return found


def listing(optimizer: torch.optim.Optimizer) -> str:
    """The same in one line, by reason; empty where nothing is left."""
    left = left_to_adamw(optimizer)
    if not left:
        return ""
    groups = optimizer.param_groups
    sizes = {name: p.numel() for g in groups for name, p in zip(g["names"], g["params"], strict=True)}
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    share = sum(sizes[name] for name in left) / max(sum(sizes.values()), 1)
    parts = [f"{reason}: {shortened(names)}" for reason, names in by_reason.items()]
    return f"full AdamW for {len(left)} of {len(sizes)} tensors ({share:.0%} of the parameters): {'; '.join(parts)}"


def shortened(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
