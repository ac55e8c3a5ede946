"""From the losses of tokens to the one scalar that is differentiated.

Every micro-batch on every rank back-propagates a plain *sum* over its tokens, under a signal a weighted one. The one
division, by a denominator summed over the whole global batch, comes later, as the scale of the backend's step. So the
gradient is the same for every split of a batch into ranks and micro-batches; a mean of means is not, as soon as two
parts predict different numbers of tokens, and a softmax of losses is not even then.

What a signal knows of the losses of the batch, its statistics, are

    exact    of this very batch. With several micro-batches that takes a forward pass ahead of them.
    lagged   of the batch before; in the first step all tokens count alike.
    parity   of a micro-batch over all ranks, as published code has it; then the objective depends on the split.
    rank     of a micro-batch on its own rank; likewise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thriftlab.data.loader import Batch
from thriftlab.optim.state.keys import keyed_generator
from thriftlab.train.backends.base import Backend
from thriftlab.train.signals.base import Signal, asks_for_statistics, by_domain
from thriftlab.train.watch import watch

EVERY = slice(None)

LOSS, TOKENS, WEIGHTED, WEIGHT = range(4)  # what is summed over the batch
LAST = "last/"  # before the names of lagged statistics in a checkpoint


def split_windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Windows [rows, seq + 1] -> inputs and targets, each [rows, seq]."""
    return tokens[:, :-1], tokens[:, 1:]


def count_targets(targets: Tensor) -> Tensor:
    """Number of predicted tokens, a float64 scalar: the denominator of the mean loss."""
    return (targets >= 0).sum().double()


def total_loss(token_loss: Tensor) -> Tensor:
    """Sum of the losses [rows, seq] of one micro-batch; what is not predicted has loss zero."""
    return token_loss.sum()


def document_ids(inputs: Tensor, delimiter: int | None) -> Tensor | None:
    """Number of document starts up to each token, [rows, seq]; None without a delimiter."""
    return None if delimiter is None else (inputs == delimiter).cumsum(1)


class Objective:
    """The signal of one run, and what it remembers.

    Args:
        domains: names of the sources.
        statistics: "exact", "lagged", "parity" or "rank".
        shuffle: the control: each window of the batch gets the weights of another.
        seed: of the shuffling.
        delimiter: the token that opens a document; None where documents are nothing to the signal.
        reference: the reference losses of a batch, [rows, seq] on the CPU.
    """

    def __init__(
        self,
        signal: Signal,
        domains: Sequence[str] = ("all",),
        statistics: str = "exact",
        shuffle: bool = False,
        seed: int = 0,
        delimiter: int | None = None,
        reference: Callable[[Batch], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.signal, self.domains, self.mode, self.shuffle = signal, domains, statistics, shuffle
        self.seed, self.delimiter, self.reference = seed, delimiter, reference
        self.device = device
        self.load(signal.state(domains))
        self.step, self.progress, self.watched = 0, 0.0, False

    def at(self, step: int, progress: float, watched: bool = False) -> None:
        """What comes is step `step`; `watched`: its weights are to be recorded."""
        self.step, self.progress, self.watched = step, progress, watched

    @property
    def idle(self) -> bool:
        """Whether in this step all tokens count alike."""
        return self.signal.idle(self.progress)

    @property
    def waits(self) -> bool:
        """Whether in this step the losses of all rows have to be known before the first is back-propagated."""
        exact = self.mode == "exact" and asks_for_statistics(type(self.signal))
        return not self.idle and (exact or self.shuffle)

    def validated(self, losses: Tensor) -> None:
        """Takes the held-out loss of each source, float64 [domains] on the CPU. One that is not finite says nothing: it
        would stay in the state for ever."""
        if not losses.isfinite().all():
            return
        losses = losses.to(self.device)
        self.signal.validated(losses=losses, state=self.state, step=self.step, progress=self.progress)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {**self.state, **{LAST + key: value for key, value in self.last.items()}}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.state: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}  # lagged statistics
        for key, value in tensors.items():
            place = self.last if key.startswith(LAST) else self.state
            place[key.removeprefix(LAST)] = value.to(self.device, copy=True)

    def report(self) -> dict[str, Tensor]:
        """What the signal has come to; each tensor has one entry for every source."""
        return self.signal.report(self.state)

    def of(self, backend: Backend, batch: Batch, inputs: Tensor, targets: Tensor) -> "Goal":
        """What is to be minimised in this step."""
        return Goal(self, backend, batch, inputs, targets)


class Goal:
    """The objective of one step on one rank: micro-batch by micro-batch its weighted sums, and what they are over."""

    def __init__(self, objective: Objective, backend: Backend, batch: Batch, inputs: Tensor, targets: Tensor):
        self.objective, self.backend, self.mask = objective, backend, targets >= 0
        self.signal, self.plain = objective.signal, objective.idle
        self.mode = objective.mode if asks_for_statistics(type(self.signal)) else "none"
        self.split_matters = self.mode in ("parity", "rank")
        self.totals = torch.zeros(4, dtype=torch.float64, device=backend.device)
        self.totals[TOKENS] = count_targets(targets)
        self.settled: Tensor | None = None  # the weights of all rows, where they are known before one is used
        self.scores: list[tuple[Tensor, Tensor]] = []
        self.used: list[Tensor] = []
        if not self.plain:
            self.take_up(batch, inputs)

    def take_up(self, batch: Batch, inputs: Tensor) -> None:
        """What is known of the rows before their losses are."""
        objective, device = self.objective, self.backend.device
        self.statistics = objective.last if self.mode == "lagged" else {}
        self.domain, self.sample = (t.long().to(device, non_blocking=True) for t in (batch.source, batch.sample))
        self.documents = document_ids(inputs, objective.delimiter) if self.signal.unit == "document" else None
        self.reference = objective.reference and objective.reference(batch).to(device, non_blocking=True)
        self.known: dict[str, Any] = dict(step=objective.step, progress=objective.progress, state=objective.state)
        if self.signal.unit == "domain":
            self.known |= self.domain_counts()

    def domain_counts(self) -> dict[str, Tensor]:
        """Predicted tokens of each domain in the global batch, and rows that have any."""
        tokens = self.mask.sum(1).double()
        here = [by_domain(count, self.domain, len(self.objective.domains)) for count in (tokens, tokens.sign())]
        tokens, samples = self.backend.sum(torch.stack(here)).clamp(min=1)  # 1 over it is no infinity, times 0
        return {"domain_tokens": tokens, "domain_samples": samples}

    @property
    def denominator(self) -> Tensor:
        """This rank's part of what the sums are divided by; whole when the last micro-batch is."""
        by_weight = not self.plain and not self.split_matters and self.signal.denominator == "weights"
        return self.totals[WEIGHT if by_weight else TOKENS]

    # ----------------------------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def look(self, token_loss: Tensor) -> None:
        """Settles the weights of all rows of this rank by their losses, [rows, seq]."""
        score, count = self.pooled(token_loss, EVERY)
        self.scores.append((score, count))
        if self.mode == "exact":
            self.take_statistics()
        weights = self.weigh(score, EVERY)
        self.settled = self.shuffled(weights) if self.objective.shuffle else weights

    @torch.no_grad()
    def weights(self, token_loss: Tensor, rows: slice) -> Tensor:
        """Of one micro-batch, [rows, seq] or [rows, 1]."""
        if self.settled is None and len(token_loss) == len(self.mask) and not self.split_matters:
            self.look(token_loss)
        if self.settled is not None:
            return self.settled[rows]
        score, count = self.pooled(token_loss, rows)
        if not self.split_matters:
            self.scores.append((score, count))
            return self.weigh(score, rows)
        self.statistics = self.reduced(score, count, self.domain[rows])
        weights = self.weigh(score, rows)
        return weights * self.inverse_mean(weights, rows) if self.signal.denominator == "weights" else weights

    def pooled(self, token_loss: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The mean score of each unit [rows, units of a row], and of how many predicted tokens, where it is finite."""
        reference = None if self.reference is None else self.reference[rows]
        score, mask = self.signal.score(token_loss=token_loss, reference_loss=reference), self.mask[rows]
        if self.signal.unit == "token":
            return score, (mask & score.isfinite()).to(score)
        score = torch.where(mask, score, 0)
        if self.documents is None:
            total, count = score.sum(1, keepdim=True), mask.sum(1, keepdim=True).to(score)
        else:
            total, count = (by_document(values, self.documents[rows]) for values in (score, mask.to(score)))
        return total / count.clamp(min=1), torch.where(total.isfinite(), count, 0)

    def weigh(self, score: Tensor, rows: slice) -> Tensor:
        if self.mode == "lagged" and not self.statistics:
            return torch.ones_like(score[:, :1])
        weights = self.signal.weights(
            token_loss=score if self.documents is None else score.gather(1, self.documents[rows]),
            mask=self.mask[rows],
            domain_id=self.domain[rows],
            sample_id=self.sample[rows],
            reference_loss=None if self.reference is None else self.reference[rows],
            statistics=self.statistics,
            **self.known,
        )
        return (weights if weights.ndim == 2 else weights[:, None]).to(score.dtype)

    def shuffled(self, weights: Tensor) -> Tensor:
        """Each row of the global batch gets the weights of the one before it in a random cycle."""
        weights = self.backend.gather(weights)
        draw = keyed_generator(self.objective.seed, "shuffle", self.objective.step)
        order = torch.randperm(len(weights), generator=draw).to(weights.device, non_blocking=True)
        moved = torch.empty_like(weights)
        moved[order] = weights[order.roll(1)]
        return moved[self.backend.rank :: self.backend.world]

    def inverse_mean(self, weights: Tensor, rows: slice) -> Tensor:
        """One over the mean weight of a micro-batch, by which it counts as much as it has tokens."""
        mask = self.mask[rows]
        sums = torch.stack([mask.sum(dtype=torch.float64), (weights * mask).sum(dtype=torch.float64)])
        tokens, weight = self.backend.sum(sums) if self.mode == "parity" else sums
        return torch.where(tokens > 0, tokens / weight, 1).to(weights.dtype)

    # -------------------------------------------------------------------------------------------------- statistics

    def take_statistics(self) -> None:
        """Of all rows of all ranks; then the state follows."""
        score, count = (torch.cat(parts) for parts in zip(*self.scores, strict=True))
        self.statistics = self.reduced(score, count, self.domain)
        self.signal.update(statistics=self.statistics, **self.known)

    def reduced(self, score: Tensor, count: Tensor, domain: Tensor) -> dict[str, Tensor]:
        """The statistics of some rows here and of as many on every other rank; with mode "rank" of those here."""
        packed = torch.cat([torch.where(count > 0, score, 0), count, domain[:, None].to(score)], 1)
        packed = packed if self.mode == "rank" else self.backend.gather(packed)
        score, count, domain = packed.split([score.shape[1], score.shape[1], 1], 1)
        return self.signal.statistics(losses=score, mask=count, domain_id=domain[:, 0].long(), **self.known)

    # ------------------------------------------------------------------------------------------------------- sums

    def total(self, token_loss: Tensor, rows: slice) -> Tensor:
        """The sum that one micro-batch back-propagates; token_loss is [rows, seq]."""
        if self.plain:
            total = total_loss(token_loss)
            self.totals[LOSS] += total.detach()
            return total
        weights = self.weights(token_loss.detach(), rows)
        total = total_loss(weights * token_loss)
        self.totals[LOSS] += total_loss(token_loss.detach())
        self.totals[WEIGHTED] += total.detach()
        self.totals[WEIGHT] += (weights * self.mask[rows]).sum(dtype=torch.float64)
        if self.objective.watched:
            self.used.append(weights.expand_as(token_loss))
        return total

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Over all ranks: the sum of all losses, the predicted tokens, and what the gradient is divided by."""
        if not self.plain and self.mode == "lagged":
            self.take_statistics()
            self.objective.last = self.statistics
        self.backend.sum(self.totals)
        return self.totals[LOSS], self.totals[TOKENS], self.denominator

    @torch.no_grad()
    def record(self) -> dict[str, Tensor] | None:
        """After `finish`: what there is to say about the weights, on the device; None where all tokens count alike."""
        if self.plain or not self.used:
            return None
        tokens, weight = self.totals[TOKENS], self.totals[WEIGHT]
        relative = torch.cat(self.used) * (tokens / weight)
        said = watch(self.backend, relative, self.mask, self.domain, len(self.objective.domains))
        return {"loss": self.totals[WEIGHTED] / self.denominator, **said, **self.objective.report()}


def by_document(values: Tensor, documents: Tensor) -> Tensor:
    """Sums over the documents of each row, [rows, seq + 1]."""
    rows, seq = values.shape
    return values.new_zeros(rows, seq + 1).scatter_add(1, documents, values)
