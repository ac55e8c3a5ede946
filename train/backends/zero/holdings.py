"""What a rank holds where tensors are cut: fragments of the state, or all of a tensor that it owns.

Shared by the backends that cut tensors, each in its way: DeepSpeed (engine.py) and FSDP2 (fsdp2.py).
"""

from typing import Any

from torch import Tensor

from thriftlab.optim.core import fragments
from thriftlab.train.backends.base import Backend
from thriftlab.train.backends.optim_state import state_trees, unpack_optimizer
from thriftlab.train.backends.pieces import Piece, Pieces, TensorReader, whole
from thriftlab.train.backends.ranks import Distributed
from thriftlab.train.backends.zero.sharding import Sharding


class Sharded(Distributed, Backend):
    """A backend that steps pieces, by a `Sharding`."""

    whole_weights = False
    sharded: Sharding

    def states(self) -> Pieces:
        found: Pieces = {}
        for name, group in self.sharded.group_of().items():
            state = self.optimizer.state.get(self.sharded.stand_ins[name], {})
            if fragment := self.sharded.fragment(name):
                for key, shape, start, tensor in fragments.saved_pieces(fragment, state, group):
                    found[f"{name}/{key}"] = Piece(shape, start, tensor)
            else:
                found |= {f"{name}/{key}": whole(tensor) for key, tensor in state.items()}
        return found

    def saves(self, key: str) -> bool:
        name, entry = (key, "") if key in self.sharded.shapes else key.rpartition("/")[::2]
        if self.sharded.fragments is None or name not in self.sharded.shapes:
            return self.rank == 0
        fragment = self.sharded.fragment(name)
        if fragment is None or fragment.start == 0 or not entry:
            return True
        return fragments.is_cut(entry, self.sharded.state_of(name)[entry].shape)  # else all fragments have the same

    def predicted_state_parts(self) -> dict[str, int]:
        return self.sharded.predicted_state_parts()

    def load_states(self, states: TensorReader, options: dict[str, Any]) -> None:
        unpack_optimizer(self.optimizer, states, options, owns=lambda name: False)  # the groups alone
        trees = state_trees(states, options["state"])
        for name, group in self.sharded.group_of().items():
            self.sharded.state_of(name).update(self.read_state(name, group, states, [*trees.get(name, {})]))

    def read_state(self, name: str, group: dict[str, Any], states: TensorReader, keys: list[str]) -> dict[str, Tensor]:
        """What this rank keeps of a tensor's state."""
        shapes = {key: states.shapes[f"{name}/{key}"] for key in keys}

        def read(key: str, start: int = 0, stop: int | None = None) -> Tensor:
            tensor = states.read(f"{name}/{key}", start, stop).clone()
            return tensor.to(self.device) if shapes[key] else tensor  # counters stay on the CPU

        if fragment := self.sharded.fragment(name):
            return fragments.take_up(fragment, group, shapes, read)
        return {key: read(key).view(shapes[key]) for key in keys} if self.sharded.keeps(name) else {}
