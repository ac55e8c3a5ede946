"""Layer methods: what stands in the place of a Linear. Adding one is adding a file.

A layer method is a module made from the shape of a Linear and filled from its weight; its constructor's signature is
its only declaration of hyper-parameters, as with update rules. `convert` puts it wherever a name asks for it and it
saves something, and says what it left and why.

One surprise: the modules are built from shapes alone and filled afterwards. So a converted model can be built on the
meta device, loaded from a state dict, and sharded before it exists.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thriftlab.optim.base import keyed_generator
from thriftlab.optim.split import near

LAYERS: dict[str, type[nn.Module]] = {}


class Layer(nn.Module):
    """A module in the place of a Linear; `class X(Layer, name="x")` registers it in `LAYERS`.

    Its constructor takes `in_features, out_features`, then hyper-parameters, then `bias, device, dtype`.
    """

    in_features: int
    out_features: int

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if name in LAYERS:
            raise ValueError(f"there is already a layer method {name!r}: {LAYERS[name].__qualname__}")
        if name is not None:
            LAYERS[name] = cls

    def load_dense(self, weight: Tensor, generator: torch.Generator, bias: Tensor | None = None) -> None:
        """Fill every tensor from the weight [out, in] of the Linear whose place this takes."""
        raise NotImplementedError

    def flops_per_token(self) -> int:
        """Of one forward and backward."""
        raise NotImplementedError


class Dense(Layer, name="dense"):
    """The Linear itself: no conversion."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the names of the layers that it replaced, and of those that it left, with the reason."""

    converted: list[str]
    left: dict[str, str]


def convert(
    model: nn.Module,
    make: Callable[..., Layer],
    include: Sequence[str] = ("",),
    exclude: Sequence[str] = ("embed", "lm_head", "router"),
    seed: int = 0,
) -> Conversion:
    """Puts `make(in_features, out_features, bias, device, dtype)` in the place of Linears, in place.

    Args:
        make: the layer method with its hyper-parameters bound; `make.keywords` are what they are.
        include: regular expressions; a Linear is meant if one is found in the name of its weight.
        exclude: and none of these.
        seed: of the layers that draw.

    Weights on the meta device stay there and are to be filled later. ValueError for a pattern of `include` that is
    found in no Linear.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for pattern in include:
        if not any(re.search(pattern, f"{name}.weight") for name in linears):
            raise ValueError(f"pattern {pattern!r} matches no Linear; near: {', '.join(near(pattern, [*linears]))}")
    tied = tied_tensors(model)
    done = Conversion([], {})
    for name, linear in linears.items():
        found = [any(re.search(p, f"{name}.weight") for p in patterns) for patterns in (include, exclude)]
        if found != [True, False]:
            continue
        reason = "its weight is tied" if id(linear.weight) in tied else ""
        if not reason:
            layer = make(
                linear.in_features, linear.out_features, bias=linear.bias is not None,
                device=linear.weight.device, dtype=linear.weight.dtype,
            )  # fmt: skip
            size, dense = trained(layer), trained(linear)
            reason = "" if size < dense else f"{size:,} parameters are not fewer than {dense:,}"
        if reason:
            done.left[name] = reason
            continue
        if not linear.weight.is_meta:
            layer.load_dense(linear.weight.detach(), keyed_generator(seed, f"{name}.weight", 1), linear.bias)
        layer.train(linear.training)
        model.set_submodule(name, layer)
        done.converted.append(name)
    return done


def tied_tensors(model: nn.Module) -> set[int]:
    """The ids of parameters that stand in two places."""
    every = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    return {key for key in every if every.count(key) > 1}


def trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def size_of(rank: int | float, in_features: int, out_features: int) -> int:
    """A rank as a number: below 1 it is a share of the smaller side."""
    smaller = min(in_features, out_features)
    size = max(1, round(rank * smaller)) if rank < 1 else int(rank)
    if size != rank and rank >= 1 or size < 1:
        raise ValueError(f"rank = {rank}: give a whole number, or a share of the smaller side between 0 and 1")
    return min(size, smaller)
