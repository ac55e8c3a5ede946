"""What a run may spend, and how the learning rate follows what is spent.

A schedule is a pure function of progress, the spent fraction of the budget, so the same schedule serves a budget of
tokens, of FLOPs and of seconds. The progress of a step is the middle of its share of the budget, so that neither the
first step nor the last is wasted on a factor of zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from thriftlab.data.errors import ConfigError
from thriftlab.optim import BelowOne


def exact_int(value: Any) -> Any:
    """`1e9`, `"1e9"` and `1_000_000` as the integers they mean; anything else is left for the type to refuse."""
    if not isinstance(value, str | float):
        return value
    try:
        number = Decimal(value)
        return int(number) if number == number.to_integral_value() and number.adjusted() < 30 else value
    except (InvalidOperation, OverflowError, ValueError):  # not a number, infinity, nan
        return value


Whole = Annotated[int, BeforeValidator(exact_int)]


def target_tokens(value: Any) -> Any:
    """`tokens=1e11` or {tokens: 1e11} as the number."""
    if isinstance(value, str) and "=" in value:
        value = dict([value.split("=", 1)])
    if isinstance(value, dict) and [*value] != ["tokens"]:
        raise ValueError("takes tokens=AMOUNT; FLOPs and seconds of the target depend on its model and its machines")
    return value["tokens"] if isinstance(value, dict) else value


TargetTokens = Annotated[Whole, BeforeValidator(target_tokens)]


@dataclass(frozen=True)
class Horizon:
    """Where a run ends: after `steps` optimizer steps, or where they are None after `seconds` of training."""

    steps: int | None = None
    seconds: float = math.inf

    def progress(self, step: int, elapsed: float) -> float:
        """Spent fraction of the budget in [0, 1] at step 0, 1, ..., `elapsed` seconds of training after the start."""
        spent = (step + 0.5) / self.steps if self.steps else elapsed / self.seconds
        return min(spent, 1.0)

    def over(self, step: int, elapsed: float) -> bool:
        """Whether nothing is left for step `step`."""
        return step >= self.steps if self.steps else elapsed >= self.seconds


class Budget(BaseModel):
    """What one run may spend: exactly one of tokens, FLOPs and seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens: Whole | None = Field(None, ge=1, description="training tokens")
    flops: float | None = Field(None, gt=0, description="floating point operations of training")
    seconds: float | None = Field(None, gt=0, description="seconds of training, without evaluation")

    @model_validator(mode="before")
    @classmethod
    def from_text(cls, value: Any) -> Any:
        """`budget=tokens=1e9` is the whole budget, whatever a file below it said."""
        return dict([value.split("=", 1)]) if isinstance(value, str) and "=" in value else value

    @model_validator(mode="after")
    def exactly_one(self) -> "Budget":
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            have = " and ".join(f"{kind}={amount:g}" for kind, amount in given.items()) or "none"
            raise ValueError(f"takes one of tokens, flops, seconds, there is {have}; budget=KIND=AMOUNT sets just one")
        return self

    def horizon(self, tokens_per_step: int, flops_per_token: int) -> Horizon:
        """The steps that fit into the budget, never more than it. ConfigError if not one does."""
        if self.seconds is not None:
            return Horizon(seconds=self.seconds)
        if self.tokens is not None:
            kind, amount, per_step = "tokens", self.tokens, tokens_per_step
        else:
            kind, amount, per_step = "flops", int(self.flops or 0), tokens_per_step * flops_per_token
        if amount < per_step:
            raise ConfigError(
                f"budget.{kind} = {amount:g} is less than the {per_step:g} {kind} of one step; "
                f"raise it or lower train.batch_size or data.sequence_length"
            )
        return Horizon(steps=amount // per_step)


SCHEDULES: dict[str, Callable[..., float]] = {}


def schedule(function: Callable[..., float]) -> Callable[..., float]:
    """Register f(progress, **parameters) -> factor of the learning rate under its own name."""
    SCHEDULES[function.__name__] = function
    return function


Fraction = Annotated[float, Field(ge=0, le=1)]
AboveZero = Annotated[float, Field(gt=0, le=1)]


def rise(progress: float, warmup: float) -> float:
    return min(1.0, progress / warmup) if warmup else 1.0


@schedule
def constant(progress: float, warmup: BelowOne = 0.1) -> float:
    """1 after the warm-up.

    Args:
        warmup: fraction of the budget in which the factor rises from 0 to 1
    """
    return rise(progress, warmup)


@schedule
def linear(progress: float, warmup: BelowOne = 0.1, final: Fraction = 0.0) -> float:
    """A straight line from 1, where the warm-up ends, to `final`.

    Args:
        warmup: fraction of the budget in which the factor rises from 0 to 1
        final: factor at the end of the budget
    """
    if progress < warmup:
        return rise(progress, warmup)
    fallen = (progress - warmup) / (1 - warmup)
    return 1 + (final - 1) * fallen


@schedule
def cosine(progress: float, warmup: BelowOne = 0.1, final: Fraction = 0.1) -> float:
    """Half a cosine from 1, where the warm-up ends, to `final` (1608.03983).

    Args:
        warmup: fraction of the budget in which the factor rises from 0 to 1
        final: factor at the end of the budget
    """
    if progress < warmup:
        return rise(progress, warmup)
    fallen = (progress - warmup) / (1 - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * fallen)) / 2


@schedule
def jagged(
    progress: float, warmup: BelowOne = 0.1, cycle: AboveZero = 0.25, rewarm: Fraction = 0.005, final: Fraction = 0.1
) -> float:
    """The cosine, but at the end of each cycle it starts from 0 and rises until it is met again (ReLoRA, 2307.05695).

    Args:
        warmup: fraction of the budget in which the factor rises from 0 to 1
        cycle: fraction of the budget from one start to the next; the layer's merge_every / steps
        rewarm: fraction of the budget in which the factor rises again
        final: factor at the end of the budget
    """
    if rewarm >= cycle:
        raise ValueError(f"rewarm {rewarm} fills the cycle of {cycle}; lower it")
    since = progress % cycle
    if progress < max(warmup, cycle) or since >= rewarm:
        return cosine(progress, warmup, final)
    return since / rewarm * cosine(min(progress - since + rewarm, 1.0), warmup, final)


@schedule
def cycles(
    progress: float, warmup: BelowOne = 0.1, cycles: Annotated[Whole, Field(ge=1)] = 1, final: Fraction = 0.1
) -> float:
    """The cosine, as often as there are cycles, each with a warm-up of its own (FRUGAL, 2411.07837).

    Args:
        warmup: fraction of a cycle in which the factor rises from 0 to 1
        cycles: how many, of one length, fill the budget
        final: factor at the end of each cycle
    """
    done = min(int(progress * cycles), cycles - 1)
    return cosine(progress * cycles - done, warmup, final)


@schedule
def wsd(progress: float, warmup: BelowOne = 0.1, decay: AboveZero = 0.2, final: Fraction = 0.0) -> float:
    """Warm-up, stable, decay (2404.06395): 1 in the middle, at the end a straight line to `final`.

    Args:
        warmup: fraction of the budget in which the factor rises from 0 to 1
        decay: last fraction of the budget, in which the factor falls to `final`
        final: factor at the end of the budget
    """
    if warmup + decay > 1:
        raise ValueError(f"warmup {warmup} and decay {decay} overlap; lower one until their sum is at most 1")
    if progress <= 1 - decay:
        return rise(progress, warmup)
    return final + (1 - final) * (1 - progress) / decay
