"""First weights of a layer that is on a GPU, from a weight that is on the CPU: no device is mixed with another."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from thriftlab.optim import LAYERS
from thriftlab.optim.state.keys import keyed_generator

ACROSS = {torch.Tensor.copy_, torch.Tensor.to}  # what may have one operand here and one there


class Elsewhere(torch.Tensor):
    """A tensor that plays one of another device: it computes with its like and with scalars alone."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            places = {type(leaf) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.ndim}
        if function not in ACROSS and len(places) > 1:
            raise RuntimeError(f"tensors of two devices in {function}")
        found = super().__torch_function__(function, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) if function is torch.Tensor.to else found


def move(layer):
    """The layer, elsewhere."""
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        delattr(layer, name)
        setattr(layer, name, tensor.detach().as_subclass(Elsewhere))
    return layer


@pytest.mark.parametrize("name, more", [("lost", {"density": 0.25}), ("cola", {}), ("lowrank", {})])
def test_a_measured_gain_is_the_same_number_wherever_the_layer_is(name, more):
    weight, made = torch.randn(8, 12, generator=keyed_generator(0, "w", 0)), []
    for place in (lambda layer: layer, move):
        layer = place(LAYERS[name](12, 8, rank=4, init_gain="dense", **more))
        layer.load_dense(weight, keyed_generator(0, name, 0))
        made.append({key: getattr(layer, key).detach().as_subclass(torch.Tensor) for key in ("lr_in", "lr_out")})
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
