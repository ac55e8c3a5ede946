"""`thriftlab study NAME`: an experiment that is written down, launch/studies/NAME.yaml or a file of one's own.

    question: what is asked
    base: {budget: {tokens: 320_000}, ...}      keys of `thriftlab train` that all arms share
    seeds: 3
    lr_grid: [1e-3, 2e-3, 4e-3]                 as many trials for every arm; an arm may bring its own grid
    trial_fraction: 0.5                         of the budget
    arms:                                       the baseline first; keys of `thriftlab train`, `seeds` and `lr_grid`
      adamw: {}
      lost: {layer: {name: lost, rank: 64}, seeds: 8}
    contrasts:                                  loss of the first arm minus that of the second, paired by seed
      - {name: what LOST costs, arms: [lost, adamw]}

One surprise: the questions are part of the file and not of the report. What is asked after the runs were seen needs
runs of its own.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from thriftlab.launch.arguments import Grid
from thriftlab.launch.arms import Arm, Contrast, Request, refuse_unequal_tuning
from thriftlab.train.choice import Plugins, Section
from thriftlab.train.config import RunConfig
from thriftlab.train.errors import ConfigError
from thriftlab.train.settings import COMMAND_LINE, Settings, build, read, read_file

Seeds = Annotated[int, Field(ge=1)]


class ArmConfig(Section, extra="allow"):
    """One arm; its other keys are those of a run."""

    seeds: Seeds | None = Field(None, description="runs of this arm; null: as many as of the others")
    lr_grid: Grid | None = Field(None, description="learning rates of its trials; null: those of the others")


class ContrastConfig(Section):
    name: str = Field(description="what is asked")
    arms: tuple[str, str] = Field(description="loss of the first minus loss of the second")


class StudyConfig(Section):
    """A study as it is written down."""

    question: str = Field(min_length=1, description="what is asked")
    base: dict[str, Any] = Field(description="keys of a run that all arms share; with a budget")
    arms: dict[str, ArmConfig] = Field(min_length=1, description="name -> what differs; the baseline first")
    seeds: Seeds = Field(3, description="runs of each arm")
    lr_grid: Grid | None = Field(None, description="learning rates of the trials; null: none")
    trial_fraction: float = Field(0.25, gt=0, le=1, description="budget of a trial, as a share of a run's")
    contrasts: tuple[ContrastConfig, ...] = Field((), description="pairs of arms")

    @model_validator(mode="after")
    def contrasts_are_of_arms(self) -> "StudyConfig":
        for contrast in self.contrasts:
            if unknown := [arm for arm in contrast.arms if arm not in self.arms]:
                raise ValueError(f"contrast {contrast.name!r} is of {unknown[0]!r}; arms: {', '.join(self.arms)}")
        return self


class StudyOptions(Section):
    """How a study is run."""

    seeds: Seeds | None = Field(None, description="runs of every arm; null: as the study has it")
    jobs: int | None = Field(None, ge=1, description="runs at the same time; null: what the machine bears")
    out: str | None = Field(None, min_length=1, description="folder of the study; null: runs/NAME")


def studies() -> dict[str, Path]:
    """Name -> file of the studies that come with the package."""
    folder = Path(str(resources.files("thriftlab.launch").joinpath("studies")))
    found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {name: path for name, path in found.items() if "arms" in read_file(str(path))}


def listing() -> str:
    """Name and question of each study that comes with the package."""
    return "\n".join(f"  {name:14}{read_file(str(path))['question']}" for name, path in studies().items())


def request(argv: Sequence[str]) -> Request:
    """The study that the command line names, with what it changes. ConfigError for what does not fit."""
    settings = read(argv)
    if len(settings.words) != 1:
        raise ConfigError(f"{COMMAND_LINE}: name one study, or a file:\n{listing()}")
    name = settings.words.pop()
    file = str(name) if Path(name).suffix else str(studies().get(name, ""))
    if not file:
        raise ConfigError(f"{COMMAND_LINE}: there is no study {name!r}; there are {', '.join(studies())}")
    written = Settings()
    written.put((), read_file(file), file)
    study = build(StudyConfig, written)
    options = build(StudyOptions, settings.pick([*StudyOptions.model_fields]))
    shared = Settings()
    shared.put((), study.base, file)
    for key, value in settings.drop([*StudyOptions.model_fields]).tree.items():
        if key == "budget":
            shared.tree.pop("budget", None)
        shared.put((key,), value, COMMAND_LINE)
    build(Plugins, shared.pick(["plugins"]))
    base = build(RunConfig, shared)
    arms = [make_arm(arm, entry, study, options.seeds) for arm, entry in study.arms.items()]
    refuse_unequal_tuning(arms)
    budget = base.budget.model_dump(mode="json")
    contrasts = [Contrast(c.name, c.arms) for c in study.contrasts]
    return Request(
        arms, shared.tree, budget, options.out or f"runs/{Path(name).stem}", options.jobs, study.trial_fraction,
        study.question, contrasts,
    )  # fmt: skip


def make_arm(name: str, entry: ArmConfig, study: StudyConfig, seeds: int | None) -> Arm:
    grid = sorted(set(entry.lr_grid or study.lr_grid or ()))
    return Arm(name, dict(entry.model_extra or {}), seeds or entry.seeds or study.seeds, tuple(grid))
