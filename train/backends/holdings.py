"""What one rank holds of a run: weights, gradients and the optimizer's state, as pieces under the parameters' names.

Replicas of what other ranks hold are included, all of it in the precision that is stepped. Checkpoints and the witness
ask no more of a backend.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thriftlab.optim import Method
from thriftlab.optim.core.bill import predicted_state_parts
from thriftlab.optim.state.storage import prune
from thriftlab.optim.state.weights import drop_low_bits
from thriftlab.train.backends.optim_state import pack_optimizer, unpack_optimizer
from thriftlab.train.backends.pieces import Piece, Pieces, TensorReader, whole
from thriftlab.train.backends.ranks import Ranks


class Holdings(Ranks):
    """Of a rank that holds everything."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def weights(self) -> Pieces:
        """Of the parameters, by name."""
        return {name: whole(p) for name, p in self.model.named_parameters()}

    def states(self) -> Pieces:
        """Of the optimizer's state, by "parameter/key". A scalar is held by every rank that has some of its tensor."""
        return {key: whole(tensor) for key, tensor in pack_optimizer(self.optimizer)[0].items()}

    def gradients(self) -> Pieces:
        """Between the last `backward` and `step`: of the gradients, summed over ranks and tokens and not yet scaled."""
        return {name: whole(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}

    def saves(self, key: str) -> bool:
        """Whether this rank is the one that saves its piece `key`; over all ranks every entry exactly once.

        Of a parameter, of a state ("parameter/key") or of something of a group.
        """
        return self.rank == 0

    def options(self) -> dict[str, Any]:
        """What a checkpoint needs beside the states: JSON. The first rank's serves all."""
        return pack_optimizer(self.optimizer)[1]

    def load(self, weights: TensorReader, states: TensorReader, options: dict[str, Any]) -> None:
        """Take what this rank holds from a checkpoint of any backend, stage and world size."""
        self.put_weights(lambda name, piece: weights.read(name, piece.start, piece.stop))
        self.load_states(states, options)

    def load_states(self, states: TensorReader, options: dict[str, Any]) -> None:
        unpack_optimizer(self.optimizer, states, options)

    def put_weights(self, value: Callable[[str, Piece], Tensor]) -> None:
        """Overwrite what this rank holds of the parameters; `value(name, piece)` is flat, as the piece is. Low bits of
        what was there are dropped."""
        for name, piece in self.weights().items():
            piece.tensor.copy_(value(name, piece))
        for state in self.optimizer.state.values():
            drop_low_bits(state)

    def forget(self, shares: Mapping[str, float]) -> None:
        """Between two steps, by parameter: all of its state (1), or a share of its moments' entries, the smallest."""
        for group in self.optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                if shares.get(name) == 1:
                    self.optimizer.state.pop(p, None)
                elif name in shares:
                    drop_low_bits(self.optimizer.state.get(p, {}))
                    prune(self.optimizer.state.get(p, {}), shares[name])

    def predicted_state_parts(self) -> dict[str, int]:
        """Bytes of state that this rank keeps, by part, by the method's `spec`."""
        assert isinstance(self.optimizer, Method)
        return predicted_state_parts(self.optimizer)

    def predicted_state_bytes(self) -> int:
        return sum(self.predicted_state_parts().values())

    def entries(self, name: str, p: Tensor) -> int:
        """Of a parameter, how many this rank holds."""
        return p.numel()

    def summed_entries(self, name: str, p: Tensor) -> int:
        """Of its gradient, after backward."""
        return self.entries(name, p)


@contextmanager
def rehearsal(held: Holdings) -> Iterator[None]:
    """Steps inside start from the present weights and an empty state, and are undone: every bit is as it was."""
    optimizer = held.optimizer
    weights = {name: piece.tensor.to("cpu", copy=True) for name, piece in held.weights().items()}
    groups = [dict(group) for group in optimizer.param_groups]
    states, optimizer.state = optimizer.state, type(optimizer.state)(dict)
    try:
        yield
    finally:
        for group, old in zip(optimizer.param_groups, groups, strict=True):
            group.update(old)
        held.put_weights(lambda name, piece: weights[name])
        optimizer.state = states
