"""Who steps embedding and head, the tables: more than half of a small model, and for every method the same choice.

    tables="adamw"    AdamW, as the method has it for what it does not split
    tables="8bit"     the same, with moments in 8 bits
    tables="ember"    Ember (2607.01455): a mean square for each row and each column, no first moment
    tables="own"      the method itself, as it steps matrices

A table is what is in a group whose `role` is input or output. What a method does with a group (`VERBS`) is asked of the
group's rule first, so a method need not know of tables, and one that does not exist yet has this choice, too.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from thriftlab.optim.core.groups import shortened
from thriftlab.optim.state.counters import begin_counting, count_step
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.lists import kept_unless
from thriftlab.optim.state.rules import ADAMW, adamw_spec, add_scaled, decay, row_chunks
from thriftlab.optim.state.storage import by_entry, key_rounding, wide
from thriftlab.optim.state.torch_adamw import piece_of

Tables = Literal["adamw", "ember", "own", "8bit"]
ROLES = ("input", "output")
OPTIONS = ("tables", "row_floor")  # of every method
VERBS = ("update", "spec", "elementwise", "in_pieces", "check_kind", "takes", "kernel_step")
TINY = 1e-30


class TableRule:
    """What stands in the place of a method's verbs for a group of tables: the method's own AdamW.

    Args:
        changes: what else the group says then.
    """

    def __init__(self, **changes: Any):
        self.changes = {"plain": "adamw", **changes}

    def update(
        self, method: Any, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State],
        group: dict[str, Any],
    ) -> None:  # fmt: skip
        group = {**group, **self.changes}
        key_rounding(names, states, group)
        method.update_plain(weights, grads, states, group)

    def kernel_step(self, method: Any, shape: tuple[int, ...], state: State, group: dict[str, Any]) -> Any:
        return method.plain_step({**group, **self.changes})

    def spec(self, method: Any, shape: tuple[int, ...], dtype: torch.dtype, *name: str, **overrides: Any) -> Spec:
        return adamw_spec(shape, dtype, **{**method.defaults, **overrides, **self.changes})

    def elementwise(self, method: Any, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return by_entry({**group, **self.changes})

    def in_pieces(self, method: Any, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return True

    def check_kind(self, method: Any, name: str, weight: Tensor, state: State, group: dict[str, Any]) -> None:
        """The spec says all there is to say."""

    def takes(self, method: Any, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return False


class Ember(TableRule):
    """Means of the squares over rows, r, and over columns, c, stand for the squares of all entries, as in Adafactor:

        r <- b2 r + (1 - b2) mean of G^2 over a row,    c likewise,    a = the mean of r
        W <- (1 - lr wd) W - lr G / (sqrt(r c^T / (a (1 - b2^t))) + eps)

    lr, b2 and eps are those of the method's AdamW, to which it leaves what is no matrix. A row that is rarely seen has
    a small r, and no first moment that would damp its step: with `row_floor` r counts as no less than that share of a.
    """

    def update(
        self, method: Any, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State],
        group: dict[str, Any],
    ) -> None:  # fmt: skip
        for name, weight, grad, state in zip(names, weights, grads, states, strict=True):
            if weight.ndim == 2:
                factored_step(weight, grad, state, {**ADAMW, **group})
            else:
                super().update(method, [name], [weight], [grad], [state], group)

    def kernel_step(self, method: Any, shape: tuple[int, ...], state: State, group: dict[str, Any]) -> Any:
        return None if len(shape) == 2 else super().kernel_step(method, shape, state, group)

    def spec(self, method: Any, shape: tuple[int, ...], dtype: torch.dtype, *name: str, **overrides: Any) -> Spec:
        return factored_spec(shape, dtype) if len(shape) == 2 else super().spec(method, shape, dtype, **overrides)

    def elementwise(self, method: Any, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return len(shape) != 2 and super().elementwise(method, shape, group)

    def in_pieces(self, method: Any, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return len(shape) != 2


def factored_spec(shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
    """In fp32 at least: they are small, and stand in denominators."""
    factors = {"row_sq": ((shape[0],), wide(dtype)), "column_sq": ((shape[1],), wide(dtype))}
    return {"step": ((), torch.int64), **factors}


def factored_step(weight: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
    """Ember's step of one matrix, in place; creates the state of a new one."""
    begin_counting(("step",), weight, state, group)
    for key, (shape, dtype) in factored_spec(tuple(weight.shape), weight.dtype).items():
        if key not in state:
            state[key] = torch.zeros(shape, dtype=dtype, device=weight.device)
    rows, columns = state["row_sq"], state["column_sq"]
    with kept_unless(group.get("applied"), [weight, rows, columns]):
        count_step([weight], [state], group)
        for squares, means in zip((rows, columns), mean_squares(grad, rows.dtype), strict=True):
            squares.mul_(group["betas"][1]).add_(means, alpha=1 - group["betas"][1])  # lerp makes NaN of infinity
        descend(weight, grad, state, {**group, "applied": None})


def descend(weight: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
    """A quotient of each entry, some rows at a time."""
    rows, columns, eps = state["row_sq"], state["column_sq"], group.get("adam_eps", group["eps"])
    mean = rows.mean() if len(rows) else rows.sum()
    correction = (1 - group["betas"][1] ** state["step"].double()).to(mean)
    shares = rows.clamp(min=group.get("row_floor", 0.0) * mean) / (mean.clamp(min=TINY) * correction)
    shares.masked_fill_(mean.isinf(), torch.inf)  # squares that have overflowed: no step, as of AdamW
    across = columns.clamp(min=TINY).sqrt_()  # [n]; roots before products, for those of squares would underflow
    decay([weight], group)
    lr = group["lr"] * group.get("plain_lr_scale", 1.0)
    for w, g, r in row_chunks(weight, grad, shares.sqrt_()[:, None].expand(weight.shape), most=piece_of(weight)):
        roots = (r * across).add_(eps)
        add_scaled([w], [torch.div(g.to(roots.dtype), roots, out=roots).to(w.dtype)], -lr)


def mean_squares(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means of G^2 over each row, and over each column, some rows at a time  # [m], [n]"""
    rows, columns = [], torch.zeros(grad.shape[1], dtype=dtype, device=grad.device)
    for (some,) in row_chunks(grad, most=piece_of(grad)):
        squares = some.to(dtype).square()
        rows.append(squares.sum(1))
        columns += squares.sum(0)
    return torch.cat(rows) / max(grad.shape[1], 1), columns / max(grad.shape[0], 1)


RULES = {"adamw": TableRule(), "8bit": TableRule(state_dtype="8bit"), "ember": Ember()}


def table_rule(group: dict[str, Any]) -> TableRule | None:
    """Who steps the tensors of a group in place of the method; None: the method."""
    return RULES.get(group.get("tables", "own")) if group.get("role") in ROLES else None


def ask_tables_first(cls: type) -> None:
    """Puts the rule of a group of tables before the verbs that a class of methods has. The group is their last
    argument, or their words."""

    def asking(verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(method: Any, *given: Any, **named: Any) -> Any:
            rule = table_rule({**method.defaults, **named} if verb == "spec" else named.get("group") or given[-1])
            return function(method, *given, **named) if rule is None else getattr(rule, verb)(method, *given, **named)

        return call

    for verb in VERBS:
        if verb in vars(cls):
            setattr(cls, verb, asking(verb, vars(cls)[verb]))


def with_tables(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that also takes `tables` and `row_floor`, where it does not have them itself; `Method.__init__`
    finds them under "tables"."""
    own = inspect.signature(init).parameters

    @functools.wraps(init)
    def call(self: Any, *args: Any, **values: Any) -> None:
        found = {key: values.pop(key) for key in OPTIONS if key in values and key not in own}
        vars(self).setdefault("tables", {}).update({key: value for key, value in found.items() if value is not None})
        init(self, *args, **values)

    return call


def settled(method: Any, group: dict[str, Any]) -> dict[str, Any]:
    """What of a group follows from its `tables`: whether it is split. ValueError where that cannot be."""
    tables, floor = group.get("tables"), group.get("row_floor", 0.0)
    if tables is not None and tables not in get_args(Tables):
        raise ValueError(f"tables={tables!r}: embedding and head have one of {', '.join(get_args(Tables))}")
    if not 0 <= floor <= 1 or (floor and tables != "ember"):
        raise ValueError(f"row_floor={floor:g}: a number from 0 to 1, and of tables='ember' alone")
    if tables is None or group.get("role") not in ROLES:
        return {}
    return {"split": tables == "own"} if "split" in method.defaults and not method.roles else {}


def tables_line(optimizer: torch.optim.Optimizer) -> str:
    """Who steps the tables, in words, where that was chosen and follows from nothing else that is said."""
    groups, splits = optimizer.param_groups, "split" in optimizer.defaults
    asked = {group["tables"] for group in groups if group.get("tables")} - ({"adamw"} if splits else set())
    if not asked:
        return ""
    here = [name for group in groups if group.get("role") in ROLES for name in group["names"]]
    if not here and not getattr(optimizer, "roles", False):
        return (
            f"tables={', '.join(sorted(asked))} has no effect: no group says whether it is input or output; make "
            "groups with split_groups(..., roles=True)"
        )
    if "own" in asked:
        return ""
    sizes = {name: p.numel() for g in groups for name, p in zip(g["names"], g["params"], strict=True)}
    share = sum(sizes[name] for name in here) / max(sum(sizes.values()), 1)
    return f"tables={', '.join(sorted(asked))}: {shortened(here)} ({share:.0%} of the parameters)"
