"""The optimizer that DeepSpeed is given: any method, stepping what lies in DeepSpeed's flat tensors.

From ZeRO an optimizer gets one flat tensor, cut through the middle of matrices. This one knows what lies in it
(layout.py) and calls the method's own `update`. What steps entry by entry is stepped where it lies. What needs
whole matrices gets them: those that are cut travel to an owner and back (exchange.py), the others are views. The
gradients are scaled and clipped, and a step is refused, here: on sums over all ranks, before any rule sees them.

One surprise: after `attach` the method's groups hold meta tensors in place of parameters. Under ZeRO-3 parameters have
no shape between two steps, and a choice of blocks needs the shapes of all.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thriftlab.data.errors import BackendError
from thriftlab.optim import Method
from thriftlab.optim.core.fragments import Fragment, is_moment
from thriftlab.optim.core.method import downhill
from thriftlab.train.backends.base import clip_factor
from thriftlab.train.backends.channel import share
from thriftlab.train.backends.zero.exchange import CHUNK, Exchange, is_aligned, make_ownership
from thriftlab.train.backends.zero.layout import Layout, read_layout, refuse, verify

ParamGroup = dict[str, Any]
Flat = dict[str, Tensor]  # by name: what this rank holds of a parameter, or of its gradient, flat


class ShardedMethod(torch.optim.Optimizer):
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
        super().__init__(list(named.values()), {"lr": 0.0})  # one group: DeepSpeed steps all in one call
        self.method, self.chunk = method, chunk
        self.names = {id(p): name for name, p in named.items()}
        self.shapes = {name: tuple(p.shape) for name, p in named.items()}
        self.stand_ins = {name: torch.empty_like(p, device="meta").requires_grad_() for name, p in named.items()}
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
            self.assign_owners(verify(self.layout, self.shapes, self.whole_value, share))

    def assign_owners(self, held: list[list[Fragment]]) -> None:
        """Agree, without a word, on who owns what is cut; `held` is what every rank holds."""
        groups = self.group_of()
        ownership = make_ownership(
            held,
            by_entry={name: self.method.elementwise(self.shapes[name], group) for name, group in groups.items()},
            costs={name: self.method.cost(name, self.stand_ins[name], group) for name, group in groups.items()},
            chunk=self.chunk,
        )
        self.exchange = Exchange(ownership, dist.get_rank(), dist.get_world_size())

    def whole_value(self, name: str) -> Tensor:
        """A parameter as the model sees it, flat; under ZeRO-3 gathered from all ranks."""
        import deepspeed

        p = self.parameters[name]
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            return p.detach().reshape(-1).clone()

    def group_of(self) -> dict[str, ParamGroup]:
        """By the parameters' names."""
        return {name: group for group in self.method.param_groups for name in group["names"]}

    def fragment(self, name: str) -> Fragment | None:
        """What this rank holds of a tensor that is cut, and stepped where it lies."""
        if self.layout is None or name not in self.layout.places or name in self.exchange.ownership.owner:
            return None
        fragment, _ = self.layout.places[name]
        return fragment if fragment.stop - fragment.start < torch.Size(fragment.shape).numel() else None

    def keeps(self, name: str) -> bool:
        """Whether this rank steps a tensor as a whole."""
        if self.layout is None:
            return True
        owner = self.exchange.ownership.owner.get(name)
        return owner == self.exchange.rank if owner is not None else name in self.layout.places

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
        if norm.isfinite():
            torch._foreach_mul_(list(grads.values()), self.factor.float())
            self.update(weights, grads)

    def held(self) -> tuple[Flat, Flat]:
        """Weights and gradients."""
        if self.layout is not None:
            assert self.layout.flat.grad is not None
            return self.layout.views(self.layout.flat), self.layout.views(self.layout.flat.grad)
        named = {name: p for name, p in self.parameters.items() if p.grad is not None}
        return {n: p.view(-1) for n, p in named.items()}, {n: p.grad.view(-1) for n, p in named.items()}  # type: ignore

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        """Of the gradients of all ranks."""
        if self.layout is None:
            return nn.utils.get_total_norm(grads)
        square = torch.zeros((), dtype=torch.float64, device=self.layout.flat.device)
        for norm in torch._foreach_norm(grads):
            square += norm.double().square()
        dist.all_reduce(square)
        return square.sqrt()

    def update(self, weights: Flat, grads: Flat) -> None:
        """The method's own step of everything that this rank holds or owns."""
        _, owner, chunks = ({}, {}, []) if self.layout is None else self.exchange.ownership
        for group in self.method.param_groups:
            here = [name for name in group["names"] if name in weights and name not in owner]
            cut = [name for name in here if self.fragment(name)]
            self.update_cut(group, cut, weights, grads)
            self.update_whole(group, [name for name in here if name not in cut], weights, grads)
        for names in chunks:
            self.update_chunk(names, weights, grads)

    def update_cut(self, group: ParamGroup, names: list[str], weights: Flat, grads: Flat) -> None:
        """Steps pieces where they lie."""
        if names:
            fragments = [fragment for name in names if (fragment := self.fragment(name))]
            slopes = [downhill(weights[name], grads[name], group["maximize"]) for name in names]
            states = [self.state_of(name) for name in names]
            self.method.update_fragments(fragments, [weights[name] for name in names], slopes, states, group)

    def update_whole(self, group: ParamGroup, names: list[str], weights: Flat, grads: Flat) -> None:
        """Steps whole tensors; those that do not lie at the beginning of a cache line in copies, one at a time."""
        moved = [name for name in names if not (is_aligned(weights[name]) and is_aligned(grads[name]))]
        self.run(group, [name for name in names if name not in moved], weights, grads)
        for name in moved:
            copy = weights[name].clone()
            self.run(group, [name], {name: copy}, {name: grads[name].clone()})
            weights[name].copy_(copy)

    def update_chunk(self, names: list[str], weights: Flat, grads: Flat) -> None:
        """Makes some cut tensors whole at their owners, steps them there and takes the pieces back."""
        assert self.layout is not None
        pieces = {name: (grads[name], weights[name]) for name in names if name in weights}
        whole_grads, whole_weights = self.exchange.to_owners(names, pieces, self.layout.flat)
        for group in self.method.param_groups:
            self.run(group, [name for name in group["names"] if name in whole_weights], whole_weights, whole_grads)
        self.exchange.to_holders(names, whole_weights, {name: weights[name] for name in pieces}, self.layout.flat)

    def run(self, group: ParamGroup, names: list[str], weights: Flat, grads: Flat) -> None:
        """`Method.update` of whole tensors."""
        if names:
            shaped = [weights[name].view(self.shapes[name]) for name in names]
            whole_grads = [grads[name].view(self.shapes[name]) for name in names]
            slopes = [downhill(w, g, group["maximize"]) for w, g in zip(shaped, whole_grads, strict=True)]
            self.method.update(names, shaped, slopes, [self.state_of(name) for name in names], group)

    def predicted_state_bytes(self) -> int:
        """Bytes of state on this rank, by the method's spec; of entries chosen within pieces the expected number."""
        total = 0.0
        for name, group in self.group_of().items():
            fragment, shape = self.fragment(name), self.shapes[name]
            here = (fragment.stop - fragment.start) / torch.Size(shape).numel() if fragment else self.keeps(name)
            for key, (size, dtype) in self.method.expected_spec(name, self.stand_ins[name], group).items():
                whole = torch.Size(size).numel() * dtype.itemsize if size else 0
                total += whole * (here if is_moment(key, size) else here > 0)
        return round(total)

    def state_of(self, name: str) -> dict[str, Tensor]:
        return self.method.state[self.stand_ins[name]]

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("engine.save_checkpoint would not save the method's state; use the run's own checkpoints")
