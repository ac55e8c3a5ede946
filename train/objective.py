"""From the losses of tokens to the one scalar that is differentiated.

Every micro-batch on every rank back-propagates a plain *sum* over its tokens, under a signal a weighted one. The one
division, by a denominator summed over the whole global batch, comes later, as the scale of the backend's step. So the
gradient is the same for every split of a batch into ranks and micro-batches; a mean of means is not, as soon as two
parts predict different numbers of tokens, and a softmax of losses is not even then.

    Objective        of a run: the signal and what it remembers; `begin` gives that of one step
    StepObjective    of a step in which all tokens count alike: `total` of each micro-batch, then `finish`
    Weighted         of a step under a signal
    MODES            what a signal knows of the losses of the batch, its statistics: one subclass of Weighted each
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thriftlab.optim.state.keys import keyed_generator
from thriftlab.train.backends.base import Backend
from thriftlab.train.feed import Arrived, LookUp
from thriftlab.train.late import bring
from thriftlab.train.signals.base import Signal, asks_for_statistics, by_document, by_domain
from thriftlab.train.watch import EDGES, watch
from thriftlab.train.windows import count_targets, document_ids, total_loss

EVERY = slice(None)
LOSS, TOKENS, WEIGHTED, WEIGHT, ASKED = range(5)  # what is summed over the batch
LAST = "last/"  # before the names of lagged statistics in a checkpoint


class Objective:
    """The signal of one run, and what it remembers.

    Args:
        domains: names of the sources.
        statistics: "exact", "lagged", "parity" or "rank", see MODES; without effect on a signal that asks for none.
        shuffle: the control: each window of the batch gets the weights of another.
        seed: of the shuffling.
        delimiter: the token that opens a document, for signals of documents.
        reference: the reference losses of a batch, [rows, seq] on the CPU.

    Errors: ValueError where the signal has no use for these domains.
    """

    def __init__(
        self,
        signal: Signal,
        domains: Sequence[str] = ("all",),
        statistics: str = "exact",
        shuffle: bool = False,
        seed: int = 0,
        delimiter: int | None = None,
        reference: LookUp | None = None,
        device: torch.device | str = "cpu",
    ):
        self.signal, self.domains, self.shuffle = signal, domains, shuffle
        self.mode: type[Weighted] = MODES[statistics if asks_for_statistics(type(signal)) else "none"]
        self.seed, self.delimiter, self.reference, self.device = seed, delimiter, reference, device
        self.load(signal.state(domains))
        self.edges = torch.tensor(EDGES, dtype=torch.float64, device=device)
        self.at(0, 0.0)

    def at(self, step: int, progress: float, watched: bool = False, asked: Sequence[float] = ()) -> None:
        """What comes is step `step`; `watched`: its weights are to be recorded; `asked`: numbers of this rank that are
        summed over ranks with those of the step."""
        self.step, self.progress, self.watched, self.asked = step, progress, watched, asked

    @property
    def idle(self) -> bool:
        """Whether in this step all tokens count alike."""
        return self.signal.idle(self.progress)

    @property
    def waits(self) -> bool:
        """Whether in this step the losses of all rows have to be known before the first is back-propagated."""
        return not self.idle and (self.mode.waits or self.shuffle)

    def begin(
        self, backend: Backend, batch: Arrived, inputs: Tensor, targets: Tensor, ahead: Tensor | None = None
    ) -> "StepObjective":
        """What is minimised in this step. `ahead`: the losses of all rows, if it `waits` for several micro-batches."""
        if self.idle:
            return StepObjective(backend, targets, self.asked)
        step = self.mode(self, backend, batch, inputs, targets)
        if ahead is not None:
            step.settle(ahead)
        return step

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


class StepObjective:
    """The objective of one step on one rank, where all tokens count alike.

    `denominator` is this rank's part of what the sums are divided by, a 0-dim tensor that grows in place: whole when
    the last micro-batch is, and summed over ranks after `finish`.
    """

    def __init__(self, backend: Backend, targets: Tensor, asked: Sequence[float] = ()):
        self.backend = backend
        self.totals = torch.zeros(ASKED + len(asked), dtype=torch.float64, device=backend.device)
        for place, number in enumerate(asked, ASKED):
            self.totals[place].fill_(number)
        self.totals[TOKENS] = count_targets(targets)
        self.denominator = self.totals[TOKENS]

    def total(self, token_loss: Tensor, rows: slice) -> Tensor:
        """The sum that one micro-batch back-propagates; token_loss is [rows, seq]."""
        total = total_loss(token_loss)
        self.totals[LOSS] += total.detach()
        return total

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor] | None]:
        """Over all ranks and on the device: the sum of all losses, the predicted tokens, what the gradient is divided
        by, what was `asked`, and what there is to say about the weights; None where all tokens count alike."""
        self.close()
        self.backend.sum(self.totals)
        return self.totals[LOSS], self.totals[TOKENS], self.denominator, self.totals[ASKED:], self.record()

    def close(self) -> None:
        """When all losses are known, and before anything is summed over ranks."""

    def record(self) -> dict[str, Tensor] | None:
        return None


class Scores(NamedTuple):
    """What a signal looks at, of some rows of the batch."""

    rows: slice
    mean: Tensor  # [rows, units of a row], over the predicted tokens of each unit
    tokens: Tensor  # alike, how many these are; 0 where there are none, or the mean is not finite


class Weighted(StepObjective):
    """The objective of one step under a signal: losses -> scores -> weights. A mode says how the last is done; this
    one, of a signal that asks for no statistics, has none."""

    waits = False  # whether no row has a weight before the losses of all rows are known
    of_micro_batch = False  # whether the weights, and so the objective, depend on how the batch is split

    def __init__(self, objective: Objective, backend: Backend, batch: Arrived, inputs: Tensor, targets: Tensor):
        super().__init__(backend, targets, objective.asked)
        self.objective, self.signal, self.mask = objective, objective.signal, targets >= 0
        if self.signal.denominator == "weights" and not self.of_micro_batch:
            self.denominator = self.totals[WEIGHT]
        self.domain, self.sample, self.reference = batch.source, batch.sample, batch.reference
        self.documents = document_ids(inputs, objective.delimiter) if self.signal.unit == "document" else None
        self.known: dict[str, Any] = dict(step=objective.step, progress=objective.progress, state=objective.state)
        if self.signal.unit == "domain":
            self.known |= self.domain_counts()
        self.settled: Tensor | None = None  # the weights of all rows, where they are known before one is used
        self.used: list[Tensor] = []

    def domain_counts(self) -> dict[str, Tensor]:
        """Predicted tokens of each domain in the global batch, and rows that have any."""
        tokens = self.mask.sum(1).double()
        here = [by_domain(count, self.domain, len(self.objective.domains)) for count in (tokens, tokens.sign())]
        tokens, samples = self.backend.sum(torch.stack(here)).clamp(min=1)  # 1 over it is no infinity, times 0
        return {"domain_tokens": tokens, "domain_samples": samples}

    def total(self, token_loss: Tensor, rows: slice) -> Tensor:
        weights = self.weights(token_loss.detach(), rows)
        total = total_loss(weights * token_loss)
        self.totals[LOSS] += total_loss(token_loss.detach())
        self.totals[WEIGHTED] += total.detach()
        self.totals[WEIGHT] += (weights * self.mask[rows]).sum(dtype=torch.float64)
        if self.objective.watched:
            self.used.append(weights.expand_as(token_loss))
        return total

    @torch.no_grad()
    def weights(self, token_loss: Tensor, rows: slice) -> Tensor:
        """Of one micro-batch, [rows, seq] or [rows, 1]."""
        if self.settled is None and self.objective.waits:  # the batch is one micro-batch, and these are all losses
            self.settle(token_loss)
        return self.mode_weights(self.scores(token_loss, rows)) if self.settled is None else self.settled[rows]

    @torch.no_grad()
    def settle(self, token_loss: Tensor) -> None:
        """Settles the weights of all rows of this rank by their losses, [rows, seq]."""
        weights = self.mode_weights(self.scores(token_loss, EVERY))
        self.settled = self.shuffled(weights) if self.objective.shuffle else weights

    def scores(self, token_loss: Tensor, rows: slice) -> Scores:
        reference = None if self.reference is None else self.reference[rows]
        score, mask = self.signal.score(token_loss=token_loss, reference_loss=reference), self.mask[rows]
        if self.signal.unit == "token":
            return Scores(rows, score, (mask & score.isfinite()).to(score))
        score = torch.where(mask, score, 0)
        if self.documents is None:
            total, count = score.sum(1, keepdim=True), mask.sum(1, keepdim=True).to(score)
        else:
            total, count = (by_document(values, self.documents[rows]) for values in (score, mask.to(score)))
        return Scores(rows, total / count.clamp(min=1), torch.where(total.isfinite(), count, 0))

    def mode_weights(self, scores: Scores) -> Tensor:
        """Of the rows of these scores: what modes differ in."""
        return self.weigh(scores, {})

    def weigh(self, scores: Scores, statistics: dict[str, Tensor]) -> Tensor:
        """The weights that the signal gives them."""
        rows = scores.rows
        weights = self.signal.weights(
            token_loss=scores.mean if self.documents is None else scores.mean.gather(1, self.documents[rows]),
            mask=self.mask[rows],
            domain_id=self.domain[rows],
            sample_id=self.sample[rows],
            reference_loss=None if self.reference is None else self.reference[rows],
            statistics=statistics,
            **self.known,
        )
        return (weights if weights.ndim == 2 else weights[:, None]).to(scores.mean.dtype)

    def shuffled(self, weights: Tensor) -> Tensor:
        """Each row of the global batch gets the weights of the one before it in a random cycle."""
        weights = self.backend.gather(weights)
        draw = keyed_generator(self.objective.seed, "shuffle", self.objective.step)
        order = bring(torch.randperm(len(weights), generator=draw), weights.device)
        moved = torch.empty_like(weights)
        moved[order] = weights[order.roll(1)]
        return moved[self.backend.rank :: self.backend.world]

    def statistics(self, scores: Scores) -> dict[str, Tensor]:
        """Of some rows here and of as many on every other rank."""
        mean, tokens, domain = scores.mean, scores.tokens, self.domain[scores.rows]
        packed = self.gather(torch.cat([torch.where(tokens > 0, mean, 0), tokens, domain[:, None].to(mean)], 1))
        mean, tokens, domain = packed.split([mean.shape[1], mean.shape[1], 1], 1)
        return self.signal.statistics(losses=mean, mask=tokens, domain_id=domain[:, 0].long(), **self.known)

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all whose losses the statistics are of."""
        return self.backend.gather(tensor)

    def record(self) -> dict[str, Tensor] | None:
        if not self.used:
            return None
        tokens, weight = self.totals[TOKENS], self.totals[WEIGHT]
        relative = torch.cat(self.used) * (tokens / weight)
        said = watch(self.backend, relative, self.mask, self.domain, len(self.objective.domains), self.objective.edges)
        return {"loss": self.totals[WEIGHTED] / self.denominator, **said, **self.objective.report()}


# ------------------------------------------------------------------------------------------------------------- modes


class Exact(Weighted):
    """Statistics of this very batch. With several micro-batches that takes a forward pass ahead of them."""

    waits = True

    def mode_weights(self, scores: Scores) -> Tensor:
        statistics = self.statistics(scores)
        self.signal.update(statistics=statistics, **self.known)
        return self.weigh(scores, statistics)


class Lagged(Weighted):
    """Statistics of the batch before; in the first step all tokens count alike."""

    def __init__(self, objective: Objective, backend: Backend, batch: Arrived, inputs: Tensor, targets: Tensor):
        super().__init__(objective, backend, batch, inputs, targets)
        self.seen: list[Scores] = []

    def mode_weights(self, scores: Scores) -> Tensor:
        self.seen.append(scores)
        last = self.objective.last
        return self.weigh(scores, last) if last else torch.ones_like(scores.mean[:, :1])

    def close(self) -> None:
        _, means, tokens = zip(*self.seen, strict=True)
        last = self.statistics(Scores(EVERY, torch.cat(means), torch.cat(tokens)))
        self.signal.update(statistics=last, **self.known)
        self.objective.last = last


class Parity(Weighted):
    """Statistics of a micro-batch over all ranks, as published code has it, which then counts as much as it has tokens.
    So the objective depends on the split."""

    of_micro_batch = True

    def mode_weights(self, scores: Scores) -> Tensor:
        weights = self.weigh(scores, self.statistics(scores))
        if self.signal.denominator == "mask":
            return weights
        mask = self.mask[scores.rows]
        sums = torch.stack([mask.sum(dtype=torch.float64), (weights * mask).sum(dtype=torch.float64)])
        tokens, weight = self.sum(sums)
        return weights * torch.where(tokens > 0, tokens / weight, 1).to(weights.dtype)

    def sum(self, sums: Tensor) -> Tensor:
        return self.backend.sum(sums)


class PerRank(Parity):
    """Statistics of a micro-batch on its own rank; otherwise as Parity."""

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def sum(self, sums: Tensor) -> Tensor:
        return sums


MODES = {"none": Weighted, "exact": Exact, "lagged": Lagged, "parity": Parity, "rank": PerRank}
