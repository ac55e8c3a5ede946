"""What is measured while a run trains, and does not change it: held-out loss and probes."""

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from thriftlab.optim.core.hyper import Count
from thriftlab.train.budget import Whole
from thriftlab.train.config.choice import Plumbing, Section, Steps
from thriftlab.train.probes import PROBES


def probe_name(name: str) -> str:
    if name not in PROBES:
        raise ValueError(f"there is no probe {name!r}; choose from {', '.join(PROBES)}")
    return name


ProbeName = Annotated[str, AfterValidator(probe_name)]


class EvalConfig(Section):
    """Evaluation: held-out loss."""

    every: Steps = Field(0, description="steps between evaluations; 0: only at the end")
    batch_size: Plumbing[Count] = Field(32, description="windows of one forward; changes the speed and not the number")
    tokens: Whole | None = Field(None, ge=1, description="held-out tokens of each source; null: all")


class ProbesConfig(Section):
    """Probes: copying, attention by head, memorisation; they change nothing in the training."""

    every: Steps = Field(0, description="steps between measurements, made at the end as well; 0: none")
    names: tuple[ProbeName, ...] | None = Field(None, description=f"which: {', '.join(PROBES)}; null: all")

    @model_validator(mode="after")
    def goes_together(self) -> "ProbesConfig":
        if self.names is not None and not self.every:
            raise ValueError("names has no effect with every=0, which measures nothing; set every")
        return self
