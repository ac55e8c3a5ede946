"""`thriftlab study NAME`: an experiment that is written down, launch/studies/NAME.yaml or a file of your own.

    question: what is asked
    base: {budget: {tokens: 320_000}, ...}  # keys of `thriftlab train` that all arms share
    seeds: 3                                # runs of an arm, paired by seed
    lr_grid: [1e-3, 2e-3, 4e-3]             # of the trials: as many for every arm; null: none
    trial_fraction: 0.5                     # of the budget of a run
    trial_seeds: 1                          # runs of one trial; their mean counts
    arms:                                   # the baseline first; each sets keys of `thriftlab train`
      adamw: {}
      lost: {layer: {name: lost, rank: 64}, seeds: 8, lr_grid: [2e-3, 4e-3, 8e-3]}
    contrasts:                              # loss of the first arm minus that of the second
      - {name: what LOST costs, arms: [lost, adamw]}
    published: {source: a paper, perplexity: {adamw: 25.1}}  # what the report puts beside

The questions are part of the file, so that they are asked before the runs: what is asked after the runs were seen needs
runs of its own.
"""

import functools
import re
import textwrap
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from thriftlab.data.errors import ConfigError
from thriftlab.data.paths import FilePath
from thriftlab.launch.studies import papers
from thriftlab.launch.studies.arms import Arm, Contrast, StudyRequest
from thriftlab.launch.studies.compare import Grid
from thriftlab.train.config.choice import Plugins, Section
from thriftlab.train.config.files import read_file
from thriftlab.train.config.help import describe, nearest
from thriftlab.train.config.parse import COMMAND_LINE, Settings, validate
from thriftlab.train.config.schema import RunConfig

Seeds = Annotated[int, Field(ge=1)]
OF_THE_STUDY = ("seed", "out", "budget")  # keys of a run that no arm has of its own
FOLDERS = ("trials", "jobs")
LR = ("optim", "lr")


def folder_name(name: str) -> str:
    """The runs of an arm lie in a folder of its name, beside those of the study."""
    if not re.fullmatch(r"\w[\w.+-]*", name) or name in FOLDERS:
        raise ValueError(f"{name!r} cannot be the name of an arm; take letters, digits and . + - _")
    return name


class ArmConfig(Section, extra="allow"):
    """One arm; its other keys are those of a run."""

    seeds: Seeds | None = Field(None, description="runs of this arm; null: as many as of the others")
    lr_grid: Grid | None = Field(None, description="learning rates of its trials; null: those of the others")


class ContrastConfig(Section):
    name: str = Field(description="what is asked")
    arms: tuple[str, str] = Field(description="loss of the first minus loss of the second")


class PublishedConfig(Section):
    """What others found, which the report puts beside the runs."""

    source: str = Field(description="where it was read")
    perplexity: dict[str, float] = Field(description="arm, or a name of its own -> validation perplexity")
    batches: int | None = Field(
        None, ge=1, description="of their evaluation, if it divides the sum of losses by one more than their number"
    )
    uncertain: tuple[str, ...] = Field((), description="what is not known for certain")


class StudyConfig(Section):
    """A study as it is written down."""

    question: str = Field(min_length=1, description="what is asked")
    base: dict[str, Any] = Field(description="keys of a run that all arms share; with a budget")
    arms: dict[Annotated[str, AfterValidator(folder_name)], ArmConfig] = Field(
        min_length=1, description="name -> what differs; the baseline first"
    )
    seeds: Seeds = Field(3, description="runs of each arm")
    lr_grid: Grid | None = Field(None, description="learning rates of the trials; null: none")
    trial_fraction: float = Field(0.25, gt=0, le=1, description="budget of a trial, as a share of a run's")
    trial_seeds: Seeds = Field(1, description="runs of one trial, whose mean counts")
    contrasts: tuple[ContrastConfig, ...] = Field((), description="pairs of arms")
    published: PublishedConfig | None = Field(None, description="what others found")

    @model_validator(mode="after")
    def contrasts_are_of_arms(self) -> "StudyConfig":
        for contrast in self.contrasts:
            if unknown := [arm for arm in contrast.arms if arm not in self.arms]:
                raise ValueError(f"contrast {contrast.name!r} is of {unknown[0]!r}; arms: {', '.join(self.arms)}")
        return self


class StudyOptions(Section):
    """How a study is run."""

    seeds: Seeds | None = Field(None, description="runs of every arm; null: as the study has it")
    jobs: int | None = Field(None, ge=1, description="runs at the same time; null: one a GPU, or what the cores allow")
    out: FilePath | None = Field(None, min_length=1, description="folder of the study; null: runs/NAME")
    mini: bool = Field(False, description="--mini makes a paper's study small enough for two cores")


def describe_keys() -> str:
    """The keys of `thriftlab study`, the studies that there are, and how one is written."""
    return (
        f"{describe(StudyOptions)}\n\nThe keys of `thriftlab train` change the base of the study.\n\n"
        f"The studies:\n{listing()}\n\nA file of your own looks like this:\n\n{example()}"
    )


def studies() -> dict[str, Path]:
    """Name -> file of the studies that come with the package."""
    folder = Path(str(resources.files("thriftlab.launch").joinpath("studies")))
    found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {name: path for name, path in found.items() if "arms" in read_file(str(path))}


def papers_in_words() -> str:
    """The studies of papers, a line for each paper."""
    lines = [
        f"  {papers.PREFIX}{paper}-SIZE, SIZE of {', '.join(row['sizes'])}" for paper, row in papers.table().items()
    ]
    return "\n".join(lines)


def example() -> str:
    """How a study is written down."""
    return textwrap.dedent((__doc__ or "").split("\n\n")[1])


def listing() -> str:
    """Name and question of each study that comes with the package, and the names of those of papers."""
    lines = [f"  {name:14}{read_file(str(path))['question']}" for name, path in studies().items()]
    return "\n".join([*lines, papers_in_words()])


def make_request(settings: Settings) -> StudyRequest:
    """The study that the command line names, with what it changes. ConfigError for what does not fit."""
    options = validate(StudyOptions, settings.pick([*StudyOptions.model_fields]))
    name, file, tree = find_study(settings.words, options.mini)
    study = validate(StudyConfig, given(tree, file))
    base = changed(study.base, file, settings.drop([*StudyOptions.model_fields]))
    validate(Plugins, base.pick(["plugins"]))
    budget = validate(RunConfig, base).budget.model_dump(mode="json")
    arms = [make_arm(arm, entry, study, options.seeds, base, file) for arm, entry in study.arms.items()]
    contrasts = [Contrast(c.name, c.arms) for c in study.contrasts]
    return StudyRequest(
        arms, base.tree, budget, options.out or f"runs/{name}", options.jobs, study.trial_fraction, study.trial_seeds,
        study.question, contrasts, study.published.model_dump(mode="json") if study.published else None,
    )  # fmt: skip


def find_study(words: Sequence[str], mini: bool = False) -> tuple[str, str, dict[str, Any]]:
    """Name, file and content of the study that the words of the command line name."""
    if len(words) != 1:
        raise ConfigError(f"{COMMAND_LINE}: name one study, or a file:\n{listing()}")
    (word,), known = words, studies()
    if word in papers.names():
        return f"{word}-mini" if mini else word, word, papers.study(word, mini)
    if mini:
        raise ConfigError(f"{COMMAND_LINE}: mini is for the studies of papers, as {papers.names()[0]}")
    if Path(word).suffix:
        return Path(word).stem, word, read_file(word)
    if word not in known:
        near = nearest(word, [*known, *papers.names()])
        raise ConfigError(
            f"{COMMAND_LINE}: there is no study {word!r}; there are {', '.join(known)}, and those of papers, as "
            f"{papers.names()[0]}{near}"
        )
    return word, str(known[word]), read_file(str(known[word]))


def changed(base: dict[str, Any], file: str, changes: Settings) -> Settings:
    """The base as it is written, and what the command line changes in it; another budget takes the place of its own."""
    settings = given(base, file)
    if "budget" in changes.tree:
        settings = settings.drop(["budget"])
    settings = merged(settings, changes)
    refuse(settings, OF_THE_STUDY[:2])
    return settings


def make_arm(name: str, entry: ArmConfig, study: StudyConfig, seeds: int | None, base: Settings, file: str) -> Arm:
    """An arm, of which all keys are known to fit. A learning rate of the base is that of every arm without its own."""
    own = given(entry.model_extra or {}, f"{file}, arm {name}")
    refuse(own, OF_THE_STUDY)
    validate(RunConfig, merged(base, own))
    if LR in base.origin and LR not in own.origin:
        own.put(LR, base.tree["optim"]["lr"], base.origin[LR])
    grid = sorted(set(entry.lr_grid or study.lr_grid or ()))
    return Arm(name, own.tree, seeds or entry.seeds or study.seeds, tuple(grid))


def given(tree: dict[str, Any], source: str) -> Settings:
    settings = Settings()
    for key, value in tree.items():
        settings.put((str(key),), value, source)
    return settings


def merged(settings: Settings, over: Settings) -> Settings:
    """What either holds; where both do, the second."""
    both = Settings()
    for part in (settings, over):
        for path, source in part.origin.items():
            both.put(path, functools.reduce(dict.__getitem__, path, part.tree), source)
    return both


def refuse(settings: Settings, keys: Sequence[str]) -> None:
    """ConfigError for one of these top-level keys."""
    for path, source in settings.origin.items():
        if path[0] in keys:
            raise ConfigError(f"{source}: {'.'.join(path)} cannot be set here: the study sets it for each run")
