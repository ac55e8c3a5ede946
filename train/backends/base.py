"""How gradients meet, are scaled and clipped, and who steps.

A backend is a rank (ranks.py) that holds weights, gradients and state (holdings.py) and steps them: it owns the module
that is called and the optimizer. The loop and the step do not know which one runs. Scaling and clipping are the
project's own and the same everywhere: gradients arrive as sums over tokens, and `step` multiplies them once, by
scale * min(1, max_norm / norm).

Whether a step counts is decided on a GPU by the GPU: the host queues the update, and the optimizer leaves every bit as
it was where `applied` is 0. A CPU, and an optimizer that is no `Method`, is asked before the update.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from thriftlab.data.errors import BackendError
from thriftlab.optim import Method
from thriftlab.optim.core.ways import scaled
from thriftlab.train.backends.holdings import Holdings
from thriftlab.train.backends.layerwise import Layerwise
from thriftlab.train.backends.norms import total_norm


class Backend(Holdings):
    """One process: the interface of a step, and what it means without company."""

    name = "single"
    layerwise: Layerwise | None = None
    whole_weights = True  # whether every rank has every weight, uncut
    can_layerwise = True  # whether a gradient is whole inside of backward, see `update_in_backward`
    one_dtype = False  # whether a gradient must have the dtype of its weight
    why_fp32: str | None = None  # what keeps weights and gradients from few bits
    has_bill = True  # whether all that it keeps is known, see bill.py
    gradient_bytes = 0  # of the summed gradients that this rank held together in the last step

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool = False, precision: str = "fp32"
    ) -> None:
        """Take the model and its optimizer; afterwards `module` is called, in autocast if `precision` is bf16."""
        self.model, self.optimizer, self.parameters = model, optimizer, list(model.parameters())
        warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
        self.module: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]

    def update_in_backward(self) -> None:
        """Use each gradient as soon as it is complete; what goes on between ranks does not allow it."""
        assert isinstance(self.optimizer, Method)
        self.layerwise = Layerwise(self.model, self.optimizer)

    def begin(self, denominator: Tensor) -> None:
        """A step begins, of sums that are divided by `denominator` on this rank, a 0-dim tensor that may grow in place
        until the last backward."""
        self.denominator = denominator

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of one micro-batch; gradients need to meet at the last one only."""
        if self.layerwise and last:  # of the micro-batches before it
            self.gradient_bytes = sum(grad.nbytes for grad in self.summed_gradients())
        return self.layerwise.armed() if self.layerwise and last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        if self.layerwise:
            self.layerwise.scale = 1 / self.denominator
        loss.backward()

    @torch.no_grad()
    def step(self, scale: Tensor, max_norm: float | None) -> tuple[Tensor, Tensor]:
        """Scale the summed gradients, clip, update, clear.

        Args:
            scale: scalar tensor, the inverse of the global denominator; NaN to refuse this step.
            max_norm: bound on the global norm of the scaled gradient.

        Returns:
            The norm before clipping, and whether the update was applied: a norm that is not finite leaves everything as
            it was, on all ranks. Both are 0-dim tensors on the device. `factor` is what gradients were multiplied by.
        """
        if self.layerwise:
            norm = self.layerwise.finish(scale)
            return norm, norm.isfinite()
        grads = self.summed_gradients()
        self.gradient_bytes = sum(grad.nbytes for grad in grads)
        norm = self.total_norm(grads).to(scale) * scale
        self.factor = clip_factor(norm, scale, max_norm)
        applied = norm.isfinite()
        asked = self.asks_first()
        if not asked or applied:
            self.update(None if asked else applied.float())
        self.optimizer.zero_grad(set_to_none=True)
        return norm, applied

    def asks_first(self) -> bool:
        """Whether the host waits to know if a step counts, before the update."""
        return self.device.type == "cpu" or not isinstance(self.optimizer, Method)

    def summed_gradients(self) -> list[Tensor]:
        """What this rank has of the summed gradients."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        """The norm over all ranks; `grads` are what this rank has of the summed gradients."""
        return total_norm(grads)

    def update(self, applied: Tensor | None = None) -> None:
        """Every rule runs once over all ranks, or alike on all, with `factor` times the summed gradients; afterwards
        every rank has the weights that it uses. `applied`: 0-dim on the device, 1, or 0 where nothing is to change;
        None: 1."""
        if isinstance(self.optimizer, Method):
            self.optimizer.step(applied=applied, scale=self.factor)
        else:
            grads = self.summed_gradients()
            for grad, product in zip(grads, scaled(grads, self.factor), strict=True):
                grad.copy_(product)
            self.optimizer.step()


def clip_factor(norm: Tensor, scale: Tensor, max_norm: float | None) -> Tensor:
    """What summed gradients are multiplied by; `norm` is that of the scaled gradient."""
    return scale if max_norm is None else scale * (max_norm / norm).clamp(max=1.0)


def as_method(optimizer: torch.optim.Optimizer, backend: str) -> Method:
    """The optimizer, if its parameters can be stepped on different ranks; else BackendError."""
    if not isinstance(optimizer, Method):
        raise BackendError(
            f"backend {backend} has each rank step a part of the model, and {type(optimizer).__name__} does not "
            "promise that its parameters can be stepped apart; make it a thriftlab.optim.Method, or use "
            "backend.name=ddp"
        )
    return optimizer
