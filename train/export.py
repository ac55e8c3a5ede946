"""What a checkpoint holds for others: the weights that a run steps, whole and in fp32, whatever they are kept in."""

import torch
from torch import Tensor

from thriftlab.optim.state.weights import LOW, join
from thriftlab.train.checkpoints.reader import Checkpoint


def joined_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """By name, with their low bits, which the model does not see: of a run in fp32 the weights themselves."""
    model, optim = checkpoint.reader("model"), checkpoint.reader("optim")

    def joined(name: str) -> Tensor:
        low = f"{name}/{LOW}"
        return join(model[name], optim[low]) if low in optim else model[name].to(torch.float32)

    return {name: joined(name) for name in model}
