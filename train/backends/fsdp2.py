"""FSDP2: torch's `fully_shard` (2304.11277), which cuts weights, gradients and state by rows, under any method.

    forward, backward   a block's weights are gathered just before it runs, and freed after it
    after backward      its gradients are summed, each rank keeps its rows of them
    step                rows are stepped where they are, or travel to an owner and back (zero/sharding.py)

So a rank has the embedding, the head and a block or two whole, with their gradients; of a step with several
micro-batches the gradients are summed over ranks in each of them.

Of a model in few bits the fp32 vectors are gathered by themselves, for what is gathered together has one dtype; bf16
gradients are summed in fp32 and rounded once.

One surprise: products in bf16 are an autocast of fp32 weights, as under every backend, and torch keeps the bf16 copies
of an autocast until it ends, which here would be those of the whole model; so it is told not to.
"""

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from thriftlab.data.errors import BackendError
from thriftlab.optim.core.sharded import fragment_here
from thriftlab.train.backends.base import as_method
from thriftlab.train.backends.pieces import Piece, Pieces
from thriftlab.train.backends.zero.holdings import Sharded
from thriftlab.train.backends.zero.sharding import Flat, Sharding


class FSDP2(Sharded):
    """Rows of every tensor on every rank."""

    name = "fsdp2"
    one_dtype = True  # of what is gathered and reduced together

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool = False, precision: str = "fp32"
    ) -> None:
        method = as_method(optimizer, self.name)
        begun = {name: method.state.pop(p, {}) for name, p in model.named_parameters()}  # low bits
        self.shard(model, compiled)
        super().prepare(model, optimizer, compiled)
        self.rows: dict[str, DTensor] = dict(model.named_parameters())  # type: ignore[arg-type]
        for group in method.param_groups:
            group["params"] = [self.rows[name] for name in group["names"]]
        self.sharded = Sharding(method, self.rows)  # type: ignore[arg-type]
        self.places = {name: fragment_here(name, p) for name, p in self.rows.items()}
        self.places = {name: place for name, place in self.places.items() if place.start < place.stop}
        trained = [place for name, place in self.places.items() if self.rows[name].requires_grad]
        self.sharded.assign_owners(self.share(trained), like=flat(next(iter(self.rows.values()))))
        self.sharded.take_low_bits(begun)

    def shard(self, model: nn.Module, compiled: bool) -> None:
        """Cuts each block, and then what is left; gradients are to be sums, and zero where there are none. A block is
        compiled by itself, between what gathers and frees its weights."""
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in blocks(model) if compiled else []:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        wholes, policy = [*blocks(model), model], MixedPrecisionPolicy()
        if any(p.dtype == torch.bfloat16 for p in model.parameters()):
            wholes = [module for whole in wholes for module in [*vectors_in(whole), whole]]
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for module in wholes:
            fully_shard(module, mesh=mesh, mp_policy=policy)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reduce_scatter_unused_params(True)
        torch.set_autocast_cache_enabled(False)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nobody writes into it

    def summed_gradients(self) -> list[Tensor]:
        return list(self.flat_gradients().values())

    def flat_gradients(self) -> Flat:
        return {n: flat(p.grad) for n in self.places if (p := self.rows[n]).grad is not None}  # type: ignore[arg-type]

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        return self.sharded.total_norm(grads)

    def update(self, applied: Tensor | None = None) -> None:
        grads = self.flat_gradients()
        self.sharded.update({name: flat(self.rows[name]) for name in grads}, grads, self.factor, applied)

    def entries(self, name: str, p: Tensor) -> int:
        return self.places[name].stop - self.places[name].start if name in self.places else 0

    def weights(self) -> Pieces:
        return self.placed({name: flat(self.rows[name]) for name in self.places})

    def gradients(self) -> Pieces:
        return self.placed(self.flat_gradients())

    def placed(self, tensors: Flat) -> Pieces:
        return {name: Piece(self.places[name].shape, self.places[name].start, t) for name, t in tensors.items()}

    def put_weights(self, value: Callable[[str, Piece], Tensor]) -> None:
        super().put_weights(value)
        self.model.reshard()  # type: ignore[operator]  # of what a forward pass has left gathered


def flat(tensor: DTensor) -> Tensor:
    """What is here of it, a view."""
    return tensor.to_local().detach().view(-1)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What is gathered by itself: the members of the model's lists of modules."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def vectors_in(module: nn.Module) -> Iterator[nn.Module]:
    """The modules within one, and in no block of it, whose own parameters are fp32 beside matrices in few bits.
    BackendError for a module that has both."""
    inner = {part for block in blocks(module) for part in block.modules()}
    for name, part in module.named_modules():
        own = {p.dtype for p in part.parameters(recurse=False)}
        if part in inner or part is module or not own:
            continue
        if len(own) > 1:
            raise BackendError(
                f"{name} has matrices in few bits and vectors in fp32, which backend 'fsdp2' cannot gather together; "
                "use backend.name=owned or backend.name=ddp"
            )
        if own == {torch.float32}:
            yield part
