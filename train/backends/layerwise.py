"""Layer-wise updates (LOMO, 2306.09782): a gradient is used and freed as soon as it is complete, inside of backward.

So the gradients never exist together and their memory, as much as the weights take, is saved: all of it where a step is
one micro-batch, for sums over several have to wait for the last.
A step cannot be taken back: when the norm is known at last, most weights have moved already; so there is
nothing to clip, and a norm that is not finite ends the run, on a GPU one step later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from thriftlab.data.errors import UserError
from thriftlab.optim import Method
from thriftlab.train.backends.norms import norms_of


class Layerwise:
    """Steps each tensor of a model by itself, in a backward pass within `armed`; bitwise the normal update."""

    def __init__(self, model: nn.Module, optimizer: Method):
        self.model, self.optimizer = model, optimizer
        self.is_armed = False
        self.scale = torch.tensor(torch.nan)  # set before each backward
        self.norms: dict[Tensor, Tensor] = {}  # of the summed gradients
        self.hooks = {
            p: partial(self.use, index, name)
            for index, group in enumerate(optimizer.param_groups)
            for name, p in zip(group["names"], group["params"], strict=True)
            if p.requires_grad
        }
        for p, hook in self.hooks.items():
            p.register_post_accumulate_grad_hook(hook)

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Within it a gradient is complete when it comes, and counts `scale` times."""
        self.is_armed = True
        try:
            yield
        finally:
            self.is_armed = False

    @torch.no_grad()
    def use(self, index: int, name: str, p: Tensor) -> None:
        """Steps parameter `name` of group `index` with its gradient, and frees that."""
        if not self.is_armed:
            return
        assert p.grad is not None
        self.norms[p] = norms_of([p.grad])[0]
        self.optimizer.step_only([name], [p], self.optimizer.param_groups[index], scale=self.scale)
        p.grad = None

    def finish(self, scale: Tensor) -> Tensor:
        """The norm of the scaled gradient, a 0-dim tensor."""
        self.scale = scale
        with self.armed():
            for p, hook in self.hooks.items():
                if p.grad is not None:  # the last micro-batch had no use for it
                    hook(p)
        norms = [self.norms.pop(p) for p in self.model.parameters() if p in self.norms]
        return torch.linalg.vector_norm(torch.stack(norms)).to(scale) * scale

    def check(self, finite: bool) -> None:
        """UserError if the norm of a step was not finite."""
        if not finite:
            raise UserError(
                "loss or gradient was not finite, and train.layerwise=true has already moved weights by it; they are "
                "not saved. Go on from the last checkpoint with train.layerwise=false train.max_skipped_steps=10, "
                "which leaves such a step out, or start anew with a lower optim.lr"
            )
