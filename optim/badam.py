"""BAdam (2404.02827): block coordinate descent with Adam. One block of the model trains, the others wait.

Every `gap` steps the next block gets its turn, with moments that start from zero:

    W <- (1 - lr wd) W - lr N(G)      for the matrices of the active block; N: Adam
    W <- W                            for the others, which have no state

It is FRUGAL over blocks without a state-free part. Embeddings, head and norms are trained by AdamW all the time.

One surprise: the gradients of the waiting blocks are computed all the same by an ordinary backward pass; what is saved
is state, and only a loop that knows about the blocks would save more.
"""

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Betas, Search, arguments
from thriftlab.optim.core.kinds import NOTHING, Kind
from thriftlab.optim.core.split import has_moments
from thriftlab.optim.frugal import Frugal
from thriftlab.optim.state.blocks import Balance, BlockOrder, BlockUnit
from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.lists import pick
from thriftlab.optim.state.storage import StateDtype


class BAdam(Frugal, name="badam"):
    """BAdam: Adam on one block of the matrices at a time.

    Args:
        lr: the learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the denominator, after bias correction.
        weight_decay: decoupled decay per step, times lr; of what is active.
        density: the fraction that is active; one of D layers, as in the paper, is 1/D.
        gap: steps between turns.
        order: which blocks come next.
        unit: a block is all matrices of a layer, or one matrix.
        balance: what the density is a fraction of: the number of blocks, or the bytes of their state.
        state_dtype: how the moments are kept, whatever the dtype of the parameters.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-4, 1e-2)] = 1e-3,
        betas: Annotated[Betas, Search(choices=[(0.9, 0.999), (0.9, 0.95)])] = (0.9, 0.999),
        eps: Annotated[float, Field(ge=0)] = 1e-8,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.0,
        density: Annotated[float, Field(ge=0, le=1), Search(choices=[0.125, 0.25, 0.5])] = 0.25,
        gap: Annotated[int, Field(ge=1), Search(choices=[50, 100, 200])] = 100,
        order: Annotated[BlockOrder, Search(choices=["random", "ascending", "descending"])] = "descending",
        unit: Annotated[BlockUnit, Field()] = "layer",
        balance: Annotated[Balance, Field()] = "count",
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()), subspace="blocks", free="none", on_refresh="reset")

    def matrix_kind(self, state: State, group: dict[str, Any]) -> Kind | None:
        kind = super().matrix_kind(state, group)
        return kind and kind._replace(still=kind.where == NOTHING)

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        active = [i for i, state in enumerate(states) if has_moments(state, group)]
        if active:
            lists: tuple[list[Any], ...] = (weights, grads, states)
            w, g, kept = ([values[i] for i in active] for values in lists)
            super().descend_all(w, g, kept, group, pick(age, active))
