"""What a study compares: arms. An arm is a name and what it sets of a run, how often it runs and how it is tuned.

`thriftlab compare` makes one of each METHOD, whose parts are joined by "+": a layer and an update rule, for instance.
Which parts there are is known to the registries of the configuration (SEAMS) alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from thriftlab.data.errors import ConfigError
from thriftlab.train.config.help import nearest, own
from thriftlab.train.config.parse import COMMAND_LINE
from thriftlab.train.config.schema import SEAMS


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

    @property
    def tuned(self) -> bool:
        return bool(self.lr_grid) and self.lr is None


@dataclass(frozen=True)
class Contrast:
    """A question asked beforehand: the loss of the first arm minus that of the second, paired by seed."""

    name: str
    arms: tuple[str, str]


@dataclass(frozen=True)
class StudyRequest:
    """A study: arms, the baseline first, what all of them share, and what is asked of them.

    Its arms and its base have no `seed`, `out` and `budget` of their own. A trial has `trial_fraction` of the budget
    of a run and is made under `trial_seeds` seeds. ConfigError where arms are tuned unequally.
    """

    arms: list[Arm]
    base: dict[str, Any]
    budget: dict[str, float]
    out: str
    jobs: int | None = None
    trial_fraction: float = 0.25
    trial_seeds: int = 1
    question: str = ""
    contrasts: list[Contrast] = field(default_factory=list)
    published: dict[str, Any] | None = None  # what others found, as PublishedConfig of written.py has it

    def __post_init__(self) -> None:
        refuse_unequal_tuning([arm for arm in self.arms if arm.tuned])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "StudyRequest":
        arms = [Arm(**{**arm, "lr_grid": tuple(arm["lr_grid"])}) for arm in tree["arms"]]
        contrasts = [Contrast(c["name"], tuple(c["arms"])) for c in tree["contrasts"]]
        return cls(**{**tree, "arms": arms, "contrasts": contrasts})


def refuse_unequal_tuning(arms: Sequence[Arm]) -> None:
    """ConfigError where two arms have different numbers of trials, or one alone."""
    for arm in arms:
        if len(arm.lr_grid) == 1:
            only = f"{arm.lr_grid[0]:g}"
            raise ConfigError(f"{arm.name}: lr_grid has one value, {only}; give two or more, or set optim.lr={only}")
        if len(arm.lr_grid) != len(arms[0].lr_grid):
            raise ConfigError(
                f"{arms[0].name} has {len(arms[0].lr_grid)} trials of its learning rate and {arm.name} "
                f"{len(arm.lr_grid)}; give each arm the same number"
            )


# ---------------------------------------------------------------------------------------------------------- methods


def known_methods(words: Sequence[str]) -> dict[str, dict[str, str]]:
    """METHOD -> section -> name. ConfigError for what is no method, and for one that is named twice."""
    if not words:
        known = "; ".join(f"{section}: {', '.join(registry.entries)}" for section, registry in SEAMS.items())
        raise ConfigError(f"{COMMAND_LINE}: name the methods to compare, the baseline first: {known}")
    if len(set(words)) < len(words):
        raise ConfigError(f"{COMMAND_LINE}: a method is named twice: {' '.join(words)}")
    methods = {word: parts_of(word) for word in words}
    for word, parts in methods.items():
        if same := [other for other in methods if other != word and methods[other] == parts]:
            raise ConfigError(f"{COMMAND_LINE}: {word} and {same[0]} are the same method; name it once")
    return methods


def parts_of(method: str) -> dict[str, str]:
    """Section -> the name that a METHOD chooses there. ConfigError for a part that is unknown, or two of one kind."""
    parts: dict[str, str] = {}
    for part in method.split("+"):
        section = section_of(part)
        if section is None:
            known = [name for registry in SEAMS.values() for name in registry.entries]
            near = nearest(part, known)
            raise ConfigError(f"{COMMAND_LINE}: method {part!r} is unknown; there are {', '.join(known)}{near}")
        if section in parts:
            raise ConfigError(f"{COMMAND_LINE}: {method} names two of {section}: {parts[section]} and {part}")
        parts[section] = part
    return {section: parts.get(section, registry.default) for section, registry in SEAMS.items()}


def section_of(part: str) -> str | None:
    return next((section for section, registry in SEAMS.items() if part in list(registry.entries)), None)


def is_method(word: str) -> bool:
    """Whether all parts of a word are known."""
    return all(map(section_of, word.split("+")))


def present(parts: dict[str, str]) -> list[str]:
    """The sections in which a method has something to set: all but those whose default takes no keys of its own."""
    return [s for s, name in parts.items() if name != SEAMS[s].default or own(SEAMS[s], name)]
