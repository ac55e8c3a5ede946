"""Dynamic loss-based sample reweighting (arXiv 2502.06733): LinUpper, Quadratic and Extremes.

    h_i = 2 delta (l_i - middle) / range                                in [-delta, delta], by minimum and maximum
    f_i = min(h_i + delta, delta)  |  1 - h_i^2 / delta^2  |  |h_i|
    w_i = exp(f_i / r) / sum_j exp(f_j / r)

The surprise is in the formula: the weights do not change when all losses are stretched, so the tilt is the same whether
the batch spreads over 2 nats or over 0.01. `min_range` bounds that, and `norm`, `w_max` what one outlier can do, which
under minimum and maximum takes up to e^(1/r) times the weight of the others.

What the published code gets wrong and this does not: on several nodes it uses the rows of the local rank for those of
the global one; it computes losses, minimum, maximum and softmax in bf16; one row without targets turns all weights into
NaN; weights are those of a micro-batch and not of the batch. (Its h cancels where the range is small against the loss:
here h is made of two differences that are exact.)
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Search
from thriftlab.train.budget import BelowOne
from thriftlab.train.signals.base import Signal

FLOOR = 1e-6  # nats; the smallest range
FLAT = 100.0  # a temperature at which weights are as good as uniform; the ramp begins there
MADS = 3 * 1.4826  # three standard deviations of a normal distribution, in median absolute deviations

Temperature = Annotated[float, Field(ge=0.02)]


def height(strategy: str, h: Tensor, delta: float = 1.0) -> Tensor:
    """f of h: at most delta, with "quadratic" at most 1."""
    if strategy == "linupper":
        return (h + delta).clamp(max=delta)
    if strategy == "quadratic":
        return 1 - (h / delta) ** 2
    if strategy == "extremes":
        return h.abs()
    if strategy == "uniform":
        return torch.zeros_like(h)
    raise ValueError(f"strategy {strategy!r} is unknown; there are linupper, quadratic, extremes and uniform")


def normalised(losses: Tensor, low: Tensor, high: Tensor, delta: float = 1.0, floor: float = FLOOR) -> Tensor:
    """h: losses from low to high become -delta to delta; what is beyond is clamped, and what is no number becomes 0."""
    middle_out = (losses - low) - (high - losses)
    h = delta * middle_out / (high - low).clamp(min=floor)
    return h.nan_to_num(0.0).clamp(-delta, delta)


def loss_weights(losses: Tensor, strategy: str, r: float, delta: float = 1.0) -> Tensor:
    """The bare formula, for the losses of one batch.

    Args:
        losses: mean loss of each sample, [samples]; computed in fp64. One that is not finite is a sample
            without targets: it has no part in minimum and maximum, and weight 0.
        strategy: "linupper", "quadratic", "extremes" or "uniform".
        r: temperature, above 0; the larger, the more alike the weights.
        delta: half the span of h; of "quadratic" nothing depends on it.

    Returns:
        Weights [samples], of sum 1, fp32 or fp64; all 0 where no loss is finite. ValueError for anything else.
    """
    if not (r > 0 and delta > 0):
        raise ValueError(f"r and delta are above 0, not {r} and {delta}")
    losses = torch.as_tensor(losses).detach()
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"losses of shape {[*losses.shape]}; one mean loss for each sample is [samples]")
    dtype, losses = torch.promote_types(losses.dtype, torch.float32), losses.double()
    there = losses.isfinite()
    low = torch.where(there, losses, torch.inf).amin()
    high = torch.where(there, losses, -torch.inf).amax()
    f = height(strategy, normalised(losses, low, high, delta), delta)
    return torch.where(there, f / r, -torch.inf).softmax(0).nan_to_num(0.0).to(dtype)


class Reweight(Signal):
    """What the three have in common: bounds of the batch's losses, a temperature, a cap.

    Args:
        r: temperature; the largest weight is at most e^(1/r) times the smallest
        r_final: temperature at the end of the run, approached geometrically; null: r
        warmup: fraction of the budget in which all weights are alike
        ramp: fraction of the budget after that in which the temperature falls from 100 to r
        norm: what becomes the ends of h; minmax: the smallest and largest loss, as published; quantile: the `tail` and
            1 - `tail` quantiles; mad: the median and three robust standard deviations to either side
        tail: of norm=quantile, the part of the losses that is clamped at each end
        min_range: nats; a batch whose losses lie closer together is tilted less
        w_max: no weight is more than this many times the mean weight; null: as many as come. With lagged statistics the
            bound is that of the batch before, and an outlier may pass it
        unit: what has one loss and one weight: a window, or the part of a document that lies in it
    """

    strategy: str

    def __init__(
        self,
        r: Annotated[Temperature, Search(0.1, 10.0)] = 0.4,
        r_final: Annotated[Temperature | None, Field()] = None,
        warmup: BelowOne = 0.05,
        ramp: BelowOne = 0.0,
        norm: Annotated[Literal["minmax", "quantile", "mad"], Search(choices=["minmax", "quantile", "mad"])] = "minmax",
        tail: Annotated[float, Field(ge=0, lt=0.5)] = 0.02,
        min_range: Annotated[float, Field(ge=FLOOR)] = FLOOR,
        w_max: Annotated[float | None, Field(ge=1)] = None,
        unit: Annotated[Literal["sample", "document"], Field()] = "sample",
    ):
        self.r, self.r_final, self.warmup, self.ramp = r, r_final or r, warmup, ramp
        self.norm, self.tail, self.min_range, self.w_max, self.unit = norm, tail, min_range, w_max, unit
        if warmup + ramp >= 1:
            raise ValueError(f"warmup {warmup} and ramp {ramp} leave nothing of the run; lower one of them")

    def idle(self, progress: float) -> bool:
        return progress < self.warmup

    def temperature(self, progress: float) -> float:
        after = progress - self.warmup
        if after < self.ramp:
            return FLAT * (self.r / FLAT) ** (after / self.ramp)
        rest = (after - self.ramp) / (1 - self.warmup - self.ramp)
        return self.r * (self.r_final / self.r) ** rest

    def exponent(self, losses: Tensor, low: Tensor, high: Tensor, progress: float) -> Tensor:
        return height(self.strategy, normalised(losses, low, high, floor=self.min_range)) / self.temperature(progress)

    def statistics(self, losses: Tensor, mask: Tensor, progress: float = 0.0, **_: Any) -> dict[str, Tensor]:
        """The ends of h; `level`, the log of the mean weight, which keeps sums of gradients at their usual size; and
        `cap`, the largest weight over the mean. Neither has to be exact, for the normaliser is taken out at the end."""
        low, high = bounds(self.norm, torch.where(mask > 0, losses, torch.nan), self.tail)
        exponent = self.exponent(losses, low, high, progress)
        level = ((exponent + mask.log()).flatten().logsumexp(0) - mask.sum().log()).nan_to_num(0.0)
        weights = torch.where(mask > 0, (exponent - level).exp(), 0)
        cap = torch.full_like(level, torch.inf) if self.w_max is None else water_level(weights, mask, self.w_max)
        return {"low": low, "high": high, "level": level, "cap": cap}

    def weights(self, token_loss: Tensor, statistics: dict[str, Tensor], progress: float = 0.0, **_: Any) -> Tensor:  # type: ignore[override]
        exponent = self.exponent(token_loss, statistics["low"], statistics["high"], progress)
        return (exponent - statistics["level"]).exp().clamp(max=statistics["cap"])


def bounds(norm: str, losses: Tensor, tail: float = 0.0) -> tuple[Tensor, Tensor]:
    """What becomes -1 and 1; NaN is not counted."""
    if norm == "minmax":
        return losses.nan_to_num(torch.inf).amin(), losses.nan_to_num(-torch.inf).amax()
    losses = losses.flatten()
    if norm == "quantile":
        return losses.nanquantile(tail), losses.nanquantile(1 - tail)
    median = losses.nanquantile(0.5)
    spread = MADS * (losses - median).abs().nanquantile(0.5)
    return median - spread, median + spread


def water_level(weights: Tensor, mask: Tensor, w_max: float) -> Tensor:
    """The cap that leaves the largest weight w_max times the mean of the capped weights.

    The cap c is the largest with c <= w_max (j c + rest) / n for each j, the number of the largest weights that are cut
    to c: with fewer or other weights cut the mean is only larger. So it is the smallest w_max rest / (n - w_max j).
    """
    order = weights.flatten().argsort(descending=True)
    weight, count = weights.flatten()[order].double(), mask.flatten()[order].double()
    capped = running_sum(count) - count  # tokens before each
    rest = running_sum((weight * count).flip(0)).flip(0)
    room = count.sum() - w_max * capped
    return torch.where(room > 0, w_max * rest / room, torch.inf).amin().to(weights.dtype)


def running_sum(values: Tensor) -> Tensor:
    """`cumsum`; on a GPU where torch is to be deterministic, and so refuses it, log2(n) additions of whole vectors."""
    if values.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return values.cumsum(0)
    return doubled_sum(values)


def doubled_sum(values: Tensor) -> Tensor:
    """Running sums of [n]: after k additions each entry has the sum of the last 2^k."""
    reach = 1
    while reach < len(values):
        values = values + torch.nn.functional.pad(values[:-reach], (reach, 0))
        reach *= 2
    return values


class LinUpper(Reweight, name="linupper"):
    """LinUpper (2502.06733): weight grows with the loss up to the middle of the range and no further."""

    strategy = "linupper"


class Quadratic(Reweight, name="quadratic"):
    """Quadratic (2502.06733): samples of medium loss count most."""

    strategy = "quadratic"


class Extremes(Reweight, name="extremes"):
    """Extremes (2502.06733): samples of low and of high loss count most."""

    strategy = "extremes"
