"""The section `data`: what is read, how it is cut into windows, mixed and repeated."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from thriftlab.data.paths import FilePath
from thriftlab.optim.core.hyper import Count
from thriftlab.train.budget import TargetTokens, Whole
from thriftlab.train.config.choice import Plumbing, Section, without_off


def expression(where: str) -> str:
    from thriftlab.data.where import parse

    parse(where)
    return where


class SourceConfig(Section):
    """How much of one source is seen, and which of its documents."""

    weight: float | None = Field(None, gt=0, description="share of the batch, relative to the other weights")
    epochs: float | None = Field(None, gt=0, description="passes over the source within the budget")
    where: Annotated[str, AfterValidator(expression)] | None = Field(
        None, description="train on the documents whose scores fit, as score>0.7; held-out documents all count"
    )

    @model_validator(mode="after")
    def exactly_one(self) -> "SourceConfig":
        missing = [self.weight, self.epochs].count(None)
        if missing == 0 or missing == 2 and self.where is None:
            raise ValueError("a source takes exactly one of weight and epochs")
        return self

    @model_serializer(mode="wrap")
    def without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_off(self, dump, "where")


class RepetitionConfig(Section):
    """A part of the windows is a small pool, seen again and again (2205.10487). Off without a fraction."""

    fraction: float | None = Field(None, gt=0, le=1, description="of the run that is repeats of the pool; null: off")
    repeats: Count | None = Field(None, description="exposures of each item of the pool; or pool_size, pool_tokens")
    pool_size: Count | None = Field(None, description="items of the pool")
    pool_tokens: Annotated[Whole, Field(ge=1)] | None = Field(None, description="tokens of the pool")
    unit: Literal["sequence", "document"] = Field(
        "sequence", description="an item is a window, or a document whose copies are packed into windows"
    )
    control: Literal["fresh", "unique_only"] | None = Field(
        None,
        description="the run to compare with. fresh: the repeats are other text. unique_only: they are left out, and "
        "the run is shorter by them",
    )
    spacing: Literal["random", "even", "clustered"] = Field(
        "random", description="of the exposures of one item among all repeats. clustered: one after the other"
    )
    pool_seed: int | None = Field(None, ge=0, lt=2**63, description="of the choice of the pool; null: seed")
    max_same_per_step: Count | None = Field(
        None, description="most exposures of one item in one step; null: as it falls"
    )

    @model_validator(mode="after")
    def goes_together(self) -> "RepetitionConfig":
        ways = {"repeats": self.repeats, "pool_size": self.pool_size, "pool_tokens": self.pool_tokens}
        given = [way for way, value in ways.items() if value is not None]
        if self.fraction is None and self.model_dump(exclude_defaults=True):
            raise ValueError("has no effect without data.repetition.fraction, the part that is repeated; set it")
        if self.max_same_per_step is not None and (self.spacing == "clustered" or self.fraction == 1):
            raise ValueError("max_same_per_step goes neither with spacing=clustered nor with fraction=1; leave it out")
        if self.fraction is not None and len(given) != 1:
            raise ValueError(f"takes one of {', '.join(ways)}; there is {' and '.join(given) or 'none'}")
        return self


class DataConfig(Section):
    """What is read, and how it is cut into windows."""

    path: Plumbing[FilePath] = Field("prepared/embedded", description="folder that `thriftlab prepare` made")
    sequence_length: Count = Field(256, description="tokens of one window")
    sources: dict[str, SourceConfig] = Field(
        {},
        description="mixture, data.sources.NAME.weight or .epochs; without either: all sources in proportion to their "
        "size",
    )
    proxy_of: TargetTokens | None = Field(
        None,
        ge=1,
        description="budget of a larger run, short --proxy-of tokens=1e11: train on so much of each source that it is "
        "repeated as often as there; null: on all",
    )
    reshuffle: Literal["windows", "documents"] = Field(
        "windows",
        description="what gets another order in each epoch: the windows, always the same ones, or the documents, from "
        "which windows are then cut anew",
    )
    repetition: RepetitionConfig = RepetitionConfig()
    document_mask: bool = Field(False, description="tokens attend within their own document only")
    verify: Plumbing[bool] = Field(True, description="check the sha256 of every shard before training")

    @model_validator(mode="after")
    def goes_together(self) -> "DataConfig":
        if self.repetition.fraction is not None and self.reshuffle == "documents":
            raise ValueError("reshuffle=documents has no effect with repetition, which has its own order; omit it")
        if self.proxy_of is not None and self.repetition.fraction is not None:
            raise ValueError("data.repetition says how often what is repeated, and so does data.proxy_of; omit one")
        if self.proxy_of is not None and self.reshuffle == "documents":
            raise ValueError("data.proxy_of keeps windows, and data.reshuffle=documents cuts them anew; omit one")
        return self

    @model_serializer(mode="wrap")
    def without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_off(self, dump, "proxy_of", "reshuffle", "repetition")
