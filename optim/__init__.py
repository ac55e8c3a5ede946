"""Update rules and layers, usable in anyone's loop: ordinary `torch.optim.Optimizer`s and `nn.Module`s.

Adding a method is adding a file.
"""

import importlib
import pkgutil

from thriftlab.optim.core.listing import left_to_adamw
from thriftlab.optim.core.method import METHODS, Method, predicted_state_bytes, state_bytes
from thriftlab.optim.core.split import SplitOptimizer, split_groups
from thriftlab.optim.layers.base import LAYERS, Conversion, Layer, convert
from thriftlab.optim.layers.lost import convert_lost
from thriftlab.optim.state.coordinates import Subspace

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

_every: tuple[type[Method] | type[Layer], ...] = (*METHODS.values(), *LAYERS.values())
_classes = {cls.__name__: cls for cls in _every}  # AdamW, Frugal, LostLinear ...


def __getattr__(name: str) -> type[Method | Layer]:
    if name in _classes:
        return _classes[name]
    raise AttributeError(f"thriftlab.optim has no {name!r}; its methods are {sorted(_classes)}")


__all__ = [  # noqa: PLE0604
    "LAYERS", "METHODS", "Conversion", "Layer", "Method", "SplitOptimizer", "Subspace", "convert", "convert_lost",
    "left_to_adamw", "predicted_state_bytes", "split_groups", "state_bytes", *_classes
]  # fmt: skip
