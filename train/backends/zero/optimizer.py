"""The optimizer that DeepSpeed is given: any method, stepping what lies in DeepSpeed's flat tensors.

From ZeRO an optimizer gets one flat tensor, cut through the middle of matrices. This one knows what lies in it
(layout.py) and calls the method's own `update` (sharding.py). The gradients are scaled and clipped, and a step is
refused, here: on sums over all ranks, before any rule sees them.

One surprise: after `attach` the method's groups hold meta tensors in place of parameters. Under ZeRO-3 parameters have
no shape between two steps, and a choice of blocks needs the shapes of all.
"""

from typing import Any

import torch
from torch import Tensor, nn

from thriftlab.data.errors import BackendError
from thriftlab.optim import Method
from thriftlab.train.backends.base import clip_factor
from thriftlab.train.backends.channel import share
from thriftlab.train.backends.zero.exchange import CHUNK
from thriftlab.train.backends.zero.layout import Layout, read_layout, refuse, verify
from thriftlab.train.backends.zero.sharding import Flat, Sharding


class ShardedMethod(Sharding, torch.optim.Optimizer):
    """A method for `deepspeed.initialize(model=model, optimizer=ShardedMethod(method, model), ...)`.

    Afterwards call `attach(engine)`, then train as usual. `scale` multiplies the gradients as they come from the
    engine, `max_norm` bounds their norm after that; of the last step `norm` is the norm before clipping, a tensor: only
    if it is finite the step was taken.
    """

    def __init__(self, method: Method, model: nn.Module, chunk: int = CHUNK):
        listed = {id(p) for group in method.param_groups for p in group["params"]}
        named = dict(model.named_parameters())
        for name, p in named.items():
            if not p.requires_grad or id(p) not in listed:
                raise BackendError(
                    f"with DeepSpeed a method must train every parameter, and this one does not train {name!r}; use "
                    "backend.name=ddp or backend.name=owned"
                )
        stand_ins = {name: torch.empty_like(p, device="meta").requires_grad_() for name, p in named.items()}
        Sharding.__init__(self, method, stand_ins, chunk)
        torch.optim.Optimizer.__init__(self, list(named.values()), {"lr": 0.0})  # one group: steps at once
        self.names = {id(p): name for name, p in named.items()}
        self.attached = False
        self.layout: Layout | None = None  # stage 0: every rank holds all
        self.scale: Tensor | float = 1.0
        self.max_norm: float | None = None
        self.norm = self.factor = torch.tensor(torch.nan)

    # ------------------------------------------------------------------------------------------------------ planning

    def attach(self, engine: Any) -> None:
        """Learn from the engine what this rank holds. BackendError for what cannot be sharded exactly."""
        refuse(engine)
        self.engine, self.attached = engine, True
        self.parameters = {self.names[id(p)]: p for p in engine.module.parameters()}
        for group in self.method.param_groups:
            group["params"] = [self.stand_ins[name] for name in group["names"]]
        if engine.optimizer is not self:
            self.layout = read_layout(engine.optimizer, self.names)
            self.assign_owners(verify(self.layout, self.shapes, self.whole_value, share), self.layout.flat)

    def whole_value(self, name: str) -> Tensor:
        """A parameter as the model sees it, flat; under ZeRO-3 gathered from all ranks."""
        import deepspeed

        p = self.parameters[name]
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            return p.detach().reshape(-1).clone()

    # ------------------------------------------------------------------------------------------------------ stepping

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Called by the engine. RuntimeError if there are gradients and nobody has called `attach`."""
        if not self.attached:
            if any(p.grad is not None and p.grad.any() for group in self.param_groups for p in group["params"]):
                raise RuntimeError("call ShardedMethod.attach(engine) after deepspeed.initialize")
            return
        weights, grads = self.held()
        total = self.total_norm(list(grads.values()))
        scale = torch.as_tensor(self.scale, dtype=torch.float64, device=total.device)
        norm = total.to(scale) * scale
        self.norm, self.factor = norm, clip_factor(norm, scale, self.max_norm)
        applied, asked = norm.isfinite(), not norm.is_cuda
        if not asked or applied:
            self.update(weights, grads, self.factor.float(), None if asked else applied.float())

    def held(self) -> tuple[Flat, Flat]:
        """Weights and gradients."""
        if self.layout is not None:
            assert self.layout.flat.grad is not None
            return self.layout.views(self.layout.flat), self.layout.views(self.layout.flat.grad)
        named = {name: p for name, p in self.parameters.items() if p.grad is not None}
        return {n: p.view(-1) for n, p in named.items()}, {n: p.grad.view(-1) for n, p in named.items()}  # type: ignore

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("engine.save_checkpoint would not save the method's state; use the run's own checkpoints")
