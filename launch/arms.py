"""What a study compares: arms. An arm is a name and what it sets of a run, how often it runs and how it is tuned.

`thriftlab compare` makes one of each METHOD, whose parts are joined by "+": a layer and an update rule, say. One
surprise: nothing here knows what parts there are; the registries of the configuration do.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from thriftlab.train import surface
from thriftlab.train.config import SEAMS
from thriftlab.train.errors import ConfigError
from thriftlab.train.settings import COMMAND_LINE


@dataclass(frozen=True)
class Arm:
    """`tree` holds keys of RunConfig; an empty `lr_grid` means no trials."""

    name: str
    tree: dict[str, Any] = field(default_factory=dict)
    seeds: int = 3
    lr_grid: tuple[float, ...] = ()

    @property
    def lr(self) -> float | None:
        """The learning rate that was set by hand."""
        return self.tree.get("optim", {}).get("lr")


@dataclass(frozen=True)
class Contrast:
    """A question asked beforehand: the loss of the first arm minus that of the second, paired by seed."""

    name: str
    arms: tuple[str, str]


@dataclass(frozen=True)
class Request:
    """A study: arms, the baseline first, what all of them share, and what is asked of them."""

    arms: list[Arm]
    base: dict[str, Any]
    budget: dict[str, float]
    out: str
    jobs: int | None = None
    trial_fraction: float = 0.25
    question: str = ""
    contrasts: list[Contrast] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Request":
        arms = [Arm(**{**arm, "lr_grid": tuple(arm["lr_grid"])}) for arm in tree["arms"]]
        contrasts = [Contrast(c["name"], tuple(c["arms"])) for c in tree["contrasts"]]
        return cls(**{**tree, "arms": arms, "contrasts": contrasts})


def parts_of(method: str) -> dict[str, str]:
    """Section -> the name that a METHOD chooses there. ConfigError for a part that is unknown, or two of one kind."""
    parts: dict[str, str] = {}
    for part in method.split("+"):
        section = next((section for section, registry in SEAMS.items() if part in list(registry.entries)), None)
        if section is None:
            known = [name for registry in SEAMS.values() for name in registry.entries]
            near = surface.nearest(part, known)
            raise ConfigError(f"{COMMAND_LINE}: method {part!r} is unknown; there are {', '.join(known)}{near}")
        if section in parts:
            raise ConfigError(f"{COMMAND_LINE}: {method} names two of {section}: {parts[section]} and {part}")
        parts[section] = part
    return {section: parts.get(section, registry.default) for section, registry in SEAMS.items()}


def is_method(word: str) -> bool:
    """Whether all parts of a word are known."""
    return all(any(part in list(r.entries) for r in SEAMS.values()) for part in word.split("+"))


def refuse_unequal_tuning(arms: Iterable[Arm]) -> None:
    """ConfigError where two arms that are tuned have different numbers of trials."""
    tuned = [arm for arm in arms if arm.lr_grid and arm.lr is None]
    for arm in tuned:
        if len(arm.lr_grid) != len(tuned[0].lr_grid):
            raise ConfigError(
                f"{tuned[0].name} has {len(tuned[0].lr_grid)} trials of its learning rate and {arm.name} "
                f"{len(arm.lr_grid)}; give each arm the same number"
            )
