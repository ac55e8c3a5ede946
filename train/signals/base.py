"""What every signal is: a rule that says how much the loss of each token counts, registered in `SIGNALS`.

In each step the trainer asks it, in this order, and only for what it declares:

    score(token_loss, reference_loss)         what it looks at, of each token; the loss itself unless it says otherwise
    statistics(losses, mask, ...)             tensors that are a function of the scores of the whole batch
    update(statistics, state, ...)            its state, once a step
    weights(token_loss, statistics, ...)      how much each token counts, up to a common factor

A signal never sees ranks, micro-batches or the normaliser. Scores are gathered from all of them before `statistics`,
and the sum of the weights is divided out at the end of the step. So what it says is a function of the global batch, as
long as `weights`, which is handed some rows at a time, takes each row by itself.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from thriftlab.optim.state.keys import State

SIGNALS: dict[str, type["Signal"]] = {}


class Signal:
    """`class X(Signal, name="x")` registers it. Its constructor's signature declares the hyper-parameters (hyper.py);
    it raises ValueError where they do not go together.

    The methods are called with keywords: take what you need, and `**_` for the rest. Beside what their signatures show,
    all of them get `step` (optimizer steps so far), `progress` (spent fraction of the budget, 0 to 1) and `state`.
    All tensors are detached and on the device of the model.

    unit: what one score is of. "token", "sample" (a window), "document" (the part of a document in one window), or
        "domain" (a source; scores are of windows). Scores of tokens are averaged over it.
    denominator: the weighted losses are divided by the sum of the weights ("weights"), or by the number of predicted
        tokens ("mask"); in either case over the global batch.
    reference: a folder of reference losses (reference.py); a signal that sets it is handed `reference_loss`.
    validate_every: steps between calls of `validated`; 0: never.
    validate_tokens: held-out tokens of each source that are measured for it; None: as eval.tokens.
    """

    unit: Literal["token", "sample", "document", "domain"] = "sample"
    denominator: Literal["weights", "mask"] = "weights"
    reference: str | None = None
    validate_every: int = 0
    validate_tokens: int | None = None

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if name in SIGNALS:
            raise ValueError(f"there is already a signal {name!r}: {SIGNALS[name].__qualname__}")
        if name is not None:
            SIGNALS[name] = cls

    def state(self, domains: Sequence[str]) -> State:
        """What it remembers from step to step: tensors, the same on all ranks, kept in checkpoints. `domains` are the
        names of the sources. ValueError where it has no use for these."""
        return {}

    def idle(self, progress: float) -> bool:
        """Whether at this point of the run every token counts alike; then nothing else is asked."""
        return False

    def score(self, token_loss: Tensor, reference_loss: Tensor | None) -> Tensor:
        """What is looked at, [rows, seq]."""
        return token_loss

    def statistics(self, losses: Tensor, mask: Tensor, **known: Any) -> dict[str, Tensor]:
        """What `weights` has to know of the whole batch.

        Args:
            losses: [rows, units of a row], scores of all rows of the batch.
            mask: alike, how many predicted tokens each is the mean of; 0 where there are none, or it is not finite.
            domain_id: [rows], number of the source.
        """
        return {}

    def update(self, statistics: dict[str, Tensor], state: State, **known: Any) -> None:
        """Writes to `state`, before `weights` is asked, or with lagged statistics after."""

    def validated(self, losses: Tensor, state: State, **known: Any) -> None:
        """Writes to `state` what follows from held-out losses, float64 [domains], measured before this step."""

    def weights(self, token_loss: Tensor, **known: Any) -> Tensor:
        """How much each token counts: not negative, [rows, seq], [rows, 1] or [rows].

        Args:
            token_loss: the score of the unit in which each token lies, [rows, seq]; [rows, 1] where it is the row's.
            mask: bool [rows, seq], which tokens are predicted.
            domain_id, sample_id: int64 [rows].
            reference_loss: [rows, seq] or None.
            statistics: what `statistics` returned, for this step or the last (lagged).
            domain_tokens, domain_samples: with unit "domain", float64 [domains]: predicted tokens of each domain in
                this batch, and rows that have any.
        """
        raise NotImplementedError

    def report(self, state: State) -> dict[str, Tensor]:
        """What the record shows of the state: each tensor has one entry for every domain."""
        return {}


def asks_for_statistics(signal: type[Signal]) -> bool:
    return signal.statistics is not Signal.statistics


def has_state(signal: type[Signal]) -> bool:
    return signal.state is not Signal.state


def domain_means(losses: Tensor, mask: Tensor, domain_id: Tensor, otherwise: Tensor) -> Tensor:
    """Of what `statistics` gets the mean over the tokens of each domain, float64; `otherwise` where it has none."""
    total, tokens = (by_domain(values.sum(1).double(), domain_id, len(otherwise)) for values in (losses * mask, mask))
    return torch.where(tokens > 0, total / tokens, otherwise)


def by_domain(values: Tensor, domain_id: Tensor, domains: int) -> Tensor:
    """Sums of `values` [rows] over the rows of each domain, [domains]."""
    return values.new_zeros(domains).index_add(0, domain_id, values)


def by_document(values: Tensor, documents: Tensor) -> Tensor:
    """Sums of `values` [rows, seq] over the documents of each row, [rows, seq + 1]; `documents` numbers the tokens'."""
    rows, seq = values.shape
    return values.new_zeros(rows, seq + 1).scatter_add(1, documents, values)


class Uniform(Signal, name="uniform"):
    """Every token counts alike: the mean loss, and the baseline of all others."""

    def idle(self, progress: float) -> bool:
        return True
