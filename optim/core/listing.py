"""What a split method leaves to AdamW, in words."""

import torch

from thriftlab.optim.core.groups import by_reason
from thriftlab.optim.core.method import Method
from thriftlab.optim.core.tables import RULES, table_rule, tables_line
from thriftlab.optim.state.subspaces import subspace_of


def left_to_adamw(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Name -> reason, for every parameter of a split method that full AdamW trains; empty for other optimizers."""
    if "split" not in optimizer.defaults:
        return {}
    found = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            if table_rule(group) is RULES["ember"] or optimizer.takes(tuple(p.shape), group):  # type: ignore
                continue
            if p.ndim != 2:
                found[name] = f"{p.ndim}-D"
            elif not group["split"]:
                found[name] = "not chosen by name"
            else:
                rank = group.get("rank") or subspace_of(group).size(p.shape)  # type: ignore[union-attr]
                found[name] = f"rank {rank} >= smaller side {min(p.shape)}"
    return found


def listing(optimizer: Method) -> str:
    """What is left to AdamW, by reason, in one line, who steps the tables, and `remarks`, a line each; or nothing."""
    return "\n".join(line for line in (left_line(optimizer), tables_line(optimizer), *optimizer.remarks()) if line)


def left_line(optimizer: torch.optim.Optimizer) -> str:
    left = left_to_adamw(optimizer)
    if not left:
        return ""
    groups = optimizer.param_groups
    sizes = {name: p.numel() for g in groups for name, p in zip(g["names"], g["params"], strict=True)}
    share = sum(sizes[name] for name in left) / max(sum(sizes.values()), 1)
    return f"full AdamW for {len(left)} of {len(sizes)} tensors ({share:.0%} of the parameters): {by_reason(left)}"
