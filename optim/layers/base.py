"""Layer methods: what stands in the place of a Linear. Adding one is adding a file.

A layer method is a module made from the shape of a Linear and filled from its weight; its constructor's signature is
its only declaration of hyper-parameters, as with update rules. `convert` puts it wherever a name asks for it and it
saves something, and says what it left and why. `describe` and `rebuild` make the same modules again, to load into.

One surprise: the modules are built from shapes alone and filled afterwards. So a converted model can be built on the
meta device, loaded from a state dict, and sharded before it exists.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thriftlab.optim.core.groups import by_reason, near
from thriftlab.optim.core.hyper import hyperparameters
from thriftlab.optim.core.products import exact_products
from thriftlab.optim.state.keys import keyed_generator

LAYERS: dict[str, type["Layer"]] = {}
EXCLUDED = ("embed", "lm_head", "router")


class Layer(nn.Module):
    """A module in the place of a Linear; `class X(Layer, name="x")` registers it in `LAYERS`.

    Its constructor takes `in_features, out_features`, then hyper-parameters, each of which stays an attribute of its
    name, then `bias, device, dtype`. It leaves its tensors empty.
    """

    in_features: int
    out_features: int
    prune: float = 1.0  # of the state that `before_step` has forgotten: 1 all, else a share of the moments' entries

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

    def before_step(self, step: int, draw: Callable[[int], torch.Generator]) -> Sequence[str]:
        """What happens once `step` steps are done and another one is due: a function of the step and of whole weights.

        Args:
            draw: a generator for each count.

        Returns:
            the names of own parameters whose optimizer state is to be forgotten.
        """
        return ()

    def export(self) -> nn.Module:
        """A module of plain torch with the same output, that knows nothing of this package."""
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
    exclude: Sequence[str] = EXCLUDED,
    seed: int = 0,
    **options: Any,
) -> Conversion:
    """Puts `make(in_features, out_features, **options, bias, device, dtype)` in the place of Linears, in place.

    Args:
        make: the layer method, an entry of `LAYERS`.
        include: regular expressions; a Linear is meant if one is found in the name of its weight.
        exclude: and none of these.
        seed: of the layers that draw: what they draw is a function of (seed, name).
        options: hyper-parameters. One that differs between layers is a map, {regular expression: value}, of which the
            first that is found in the name counts, or a function of (name, Linear).

    A Linear is left where nothing would be saved, where its weight is tied, and where it is more than a Linear. Weights
    on the meta device stay there and are to be filled later. ValueError for a pattern that is found in no Linear.
    """
    known = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Layer)]
    for patterns in (include, *(value for value in options.values() if isinstance(value, dict))):
        check_patterns(patterns, known)
    tied = tied_weights(model)
    done = Conversion([], {})
    for name in known:
        linear: Any = model.get_submodule(name)
        if isinstance(linear, Layer) or not found(include, name) or found(exclude, name):
            continue
        layer = like(linear, make, {key: option(value, key, name, linear) for key, value in options.items()})
        if reason := "its weight is tied" if name in tied else obstacle(linear, layer):
            done.left[name] = reason
            continue
        if not linear.weight.is_meta:
            layer.load_dense(linear.weight.detach(), keyed_generator(seed, f"{name}.weight", 1), linear.bias)
        put(model, name, layer)
        done.converted.append(name)
    return done


@torch.no_grad()
def before_step(model: nn.Module, step: int, seed: int) -> dict[str, float]:
    """Lets every layer do what is due before a step; parameter -> how much of its optimizer state is then forgotten."""
    with exact_products():
        return {
            f"{name}.{own}": layer.prune
            for name, layer in changing(model).items()
            for own in layer.before_step(step, partial(keyed_generator, seed, f"{name}.before_step"))
        }


def changing(model: nn.Module) -> dict[str, Layer]:
    """The layers that may do something between two steps, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    return {name: layer for name, layer in layers.items() if type(layer).before_step is not Layer.before_step}


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of a replaced layer -> its method and hyper-parameters, fit for JSON; an object among them is left out."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    return {name: describe_layer(layer) for name, layer in layers.items()}


def describe_layer(layer: Layer) -> dict[str, Any]:
    method = next(name for name, cls in LAYERS.items() if cls is type(layer))
    values = {key: getattr(layer, key) for key in hyperparameters(type(layer))}
    plain = (type(None), bool, int, float, str)
    return {"layer": method} | {key: value for key, value in values.items() if isinstance(value, plain)}


def rebuild(model: nn.Module, description: dict[str, dict[str, Any]]) -> None:
    """Puts the layers that `describe` found in the place of this model's Linears, empty: to load a state dict into."""
    modules = dict(model.named_modules())
    for name, entry in description.items():
        options = {key: value for key, value in entry.items() if key != "layer"}
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name!r} is no Linear of this model; build the model that was described")
        if entry["layer"] not in LAYERS:
            raise ValueError(f"{name}: there is no layer method {entry['layer']!r}; there are {', '.join(LAYERS)}")
        put(model, name, like(linear, LAYERS[entry["layer"]], options))


def export(model: nn.Module) -> None:
    """Puts plain torch in the place of every layer, in place. What the model gives out stays."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    for name, layer in layers.items():
        model.set_submodule(name, layer.export().train(layer.training))


def like(linear: nn.Linear, make: Callable[..., Layer], options: dict[str, Any]) -> Layer:
    """An empty layer of the shape, dtype and device of a Linear."""
    return make(
        linear.in_features, linear.out_features, **options,
        bias=linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype,
    )  # fmt: skip


def put(model: nn.Module, name: str, layer: Layer) -> None:
    """Sets a layer in the place of a Linear, in its mode, and frozen where it is frozen."""
    linear: Any = model.get_submodule(name)
    layer.train(linear.training)
    if not linear.weight.requires_grad:
        layer.requires_grad_(False)
    model.set_submodule(name, layer)


def found(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, f"{name}.weight") for pattern in patterns)


def check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(found([pattern], name) for name in names):
            raise ValueError(f"pattern {pattern!r} matches no Linear; near: {', '.join(near(pattern, names))}")


def option(value: Any, key: str, name: str, linear: nn.Linear) -> Any:
    """What a hyper-parameter is for one Linear."""
    if callable(value):
        return value(name, linear)
    if not isinstance(value, dict):
        return value
    for pattern, choice in value.items():
        if found([pattern], name):
            return choice
    raise ValueError(f'{key}: none of its patterns is found in {name!r}; add a last one, "", for all others')


def obstacle(linear: nn.Linear, layer: Layer) -> str:
    """Why a Linear is not to be replaced by a layer, or nothing."""
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}"
    if any((linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)):
        return "it has hooks, which would be lost"
    size = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    dense = sum(p.numel() for p in linear.parameters())
    return "" if size < dense else f"{size:,} parameters are not fewer than {dense:,}"


def tied_weights(model: nn.Module) -> set[str]:
    """Names of the modules whose weight stands in two places."""
    weights = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False) if name.endswith("weight")]
    places = Counter(key for _, key in weights)
    return {name.removesuffix(".weight") for name, key in weights if places[key] > 1}


def size_of(rank: int | float, in_features: int, out_features: int) -> int:
    """A rank as a number: below 1 it is a share of the smaller side, and no rank is above that side."""
    smaller = min(in_features, out_features)
    size = max(1, round(rank * smaller)) if rank < 1 else int(rank)
    if rank <= 0 or (rank >= 1 and size != rank):
        raise ValueError(f"rank = {rank}: give a whole number, or a share of the smaller side between 0 and 1")
    return min(size, smaller)


def replaced(layer: str, conversion: Conversion) -> str:
    """How many Linears a layer method stands for, and which it was to and does not; empty where none was meant."""
    done, left = conversion.converted, conversion.left
    if not done and not left:
        return ""
    rest = f"; left as they are: {by_reason(left)}" if left else ""
    return f"{layer} in the place of {len(done)} of {len(done) + len(left)} Linears{rest}"
