"""RunConfig: one run, completely. A frozen tree of pydantic models; unknown keys are errors.

A field is `Plumbing` (name and place of a run, and what is written on the way), `Speed` (how fast it is), or else the
result depends on it. The fingerprint is of the result, so a run on two ranks is the run on one.
"""

import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from thriftlab.data.errors import ConfigError
from thriftlab.data.paths import FilePath
from thriftlab.data.plugins import plugin_sha256
from thriftlab.kernels.linear_cross_entropy import KEEP_BYTES
from thriftlab.optim import LAYERS, METHODS
from thriftlab.optim.core.hyper import Count
from thriftlab.optim.state.weights import Rounding, WeightDtype
from thriftlab.train.backends import BACKENDS
from thriftlab.train.backends.device import Device
from thriftlab.train.budget import SCHEDULES, Budget
from thriftlab.train.config.choice import (
    Choice,
    Pattern,
    Plugin,
    Plumbing,
    Registry,
    Section,
    Speed,
    Steps,
    without_off,
)
from thriftlab.train.config.data import DataConfig
from thriftlab.train.config.help import is_model
from thriftlab.train.config.measured import EvalConfig, ProbesConfig
from thriftlab.train.config.optim import OptimConfig
from thriftlab.train.model import ModelConfig
from thriftlab.train.signals import SIGNALS
from thriftlab.train.signals.base import asks_for_statistics, has_state
from thriftlab.train.signals.reference import read_reference


class LayerConfig(Choice):
    """The layers that replace Linears, and which Linears they replace."""

    include: tuple[Pattern, ...] = Field(
        (r"\.(attn|mlp)\.",), description="regular expressions: Linears whose weight has a matching name are replaced"
    )
    exclude: tuple[Pattern, ...] = Field((), description="regular expressions: names that are never replaced")

    @model_validator(mode="after")
    def goes_together(self) -> "LayerConfig":
        for key, field in LayerConfig.model_fields.items():
            if self.name == LAYER.default and key != "name" and getattr(self, key) != field.default:
                raise ValueError(f"{key} has no effect with layer {self.name!r}, which replaces nothing; leave it out")
        return self


class SignalConfig(Choice):
    """How much the loss of each token counts."""

    statistics: Literal["exact", "lagged", "parity", "rank"] = Field(
        "exact",
        description="what a signal knows of the losses of a batch. exact: of this batch, over all ranks and "
        "micro-batches; if there are several on a rank, by a forward pass ahead of them. lagged: of the batch before; "
        "in the first step all tokens count alike. parity: of a micro-batch over all ranks, as published. rank: of a "
        "micro-batch on one rank. With these two the result depends on how the batch is split",
    )
    shuffle: bool = Field(False, description="control: every window of a batch gets the weights of another one")

    @model_validator(mode="after")
    def goes_together(self) -> "SignalConfig":
        signal = SIGNALS[self.name]
        if self.shuffle and self.name == SIGNAL.default:
            raise ValueError(f"shuffle=true has no effect with signal {self.name!r}, whose weights are all equal")
        if self.statistics != "exact" and not asks_for_statistics(signal):
            raise ValueError(f"statistics has no effect with signal {self.name!r}, which uses none; leave it out")
        if self.statistics in ("parity", "rank"):
            if self.shuffle:
                raise ValueError("shuffle=true is over the whole batch; use statistics=exact or lagged")
            if has_state(signal):
                raise ValueError(
                    f"signal {self.name!r} remembers something of each step, and statistics={self.statistics} has "
                    "other ones for each micro-batch; use exact or lagged"
                )
        return self


class ScheduleConfig(Choice):
    """The factor of the learning rate over the budget."""

    @model_validator(mode="after")
    def is_possible(self) -> "ScheduleConfig":
        SCHEDULES[self.name](1.0, **self.hyperparameters())
        return self


OPTIM = Registry(METHODS, OptimConfig, "adamw")
LAYER = Registry(LAYERS, LayerConfig, "dense")
SIGNAL = Registry(SIGNALS, SignalConfig, "uniform")
SCHEDULE = Registry(SCHEDULES, ScheduleConfig, "cosine")


class TrainConfig(Section):
    """One optimizer step."""

    batch_size: Count = Field(32, description="windows of one optimizer step, over all ranks")
    micro_batch_size: Speed[Count | None] = Field(
        None,
        description="windows of one forward on one rank; null: what a CPU's cache or the memory of a GPU holds, there "
        "chosen at the first start",
    )
    clip: float | None = Field(1.0, gt=0, description="largest global norm of the gradient; null: no clipping")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16: autocast of the matrix products; auto: bf16 on a GPU that has it, fp32 on a CPU"
    )
    matmul: Literal["fp32", "tf32"] = Field(
        "fp32",
        description="products of fp32 matrices in the model, on a GPU; tf32 is faster and keeps 10 bits of a factor. "
        "The optimizer's stay fp32, but for projections of a gradient to a low rank and back",
    )
    weights: WeightDtype = Field(
        "fp32",
        description="what is kept of a trained matrix: bf16, or bf16 and 8 or 16 low bits beside it, which the "
        "optimizer alone reads; needs precision=bf16",
    )
    rounding: Rounding = Field("random", description="of weights in bf16 and bf16+8, in every step")
    gradients: Literal["fp32", "bf16"] = Field(
        "fp32", description="of matrices, between backward and update; bf16 needs precision=bf16 and one micro-batch"
    )
    dropout: float = Field(
        0.0, ge=0, le=0.99, description="share of the outputs of embedding, attention and MLP that a step sets to zero"
    )
    activation_checkpointing: Speed[bool] = Field(False, description="recompute each block's activations in backward")
    loss_keep_bytes: Speed[int | None] = Field(
        KEEP_BYTES,
        ge=0,
        description="of log-probabilities that the loss of a micro-batch keeps for its backward; the rest is computed "
        "again, to the same bits; null: keep all",
    )
    compile: Speed[bool] = Field(False, description="torch.compile the model")
    max_skipped_steps: Plumbing[Count] = Field(
        10, description="stop after this many steps in a row whose loss or gradient is not finite"
    )
    layerwise: Speed[bool] = Field(
        False, description="update each tensor inside of backward and free its gradient; saves the memory of gradients"
    )
    threads: Speed[Count | None] = Field(None, description="torch threads of one process; null: torch's choice")
    deterministic: Speed[bool] = Field(False, description="deterministic kernels only, where torch has them")

    @model_serializer(mode="wrap")
    def without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_off(self, dump, "dropout", "matmul", "weights", "rounding", "gradients")

    @model_validator(mode="after")
    def rounds_something(self) -> "TrainConfig":
        if self.rounding != "random" and self.weights not in ("bf16", "bf16+8"):
            raise ValueError(f"rounding has no effect with weights={self.weights}, which keeps every bit; leave it out")
        return self

    @model_validator(mode="after")
    def layerwise_alone(self) -> "TrainConfig":
        needs = {"clip": None, "max_skipped_steps": 1, "compile": False}
        wrong = [f"train.{key}={json.dumps(value)}" for key, value in needs.items() if getattr(self, key) != value]
        if self.layerwise and wrong:
            raise ValueError(
                "layerwise=true uses each gradient before all are known, so it can neither clip their norm nor skip a "
                f"step, and a compiled backward gives them out all at once; set {' '.join(wrong)}"
            )
        return self

    def rows_per_rank(self, world: int) -> int:
        """Windows of one step on one of `world` ranks. ConfigError where they do not divide."""
        rows, rest = divmod(self.batch_size, world)
        if rest:
            raise ConfigError(f"train.batch_size = {self.batch_size} is not a multiple of the {world} ranks; change it")
        return rows


class BackendConfig(Section):
    """How several processes train together."""

    name: Literal["auto", *BACKENDS] = Field(  # type: ignore[valid-type]
        "auto", description="how ranks work together; auto: ddp under torchrun, else single"
    )
    device: Plumbing[Device] = Field("auto", description="auto, cpu, cuda or cuda:N; auto: a GPU where torch sees one")
    stage: int | None = Field(None, ge=0, le=3, description="deepspeed: stage of ZeRO; null: 1")
    settings: dict[str, Any] = Field({}, description="deepspeed: further keys of its JSON configuration")
    witness: Plumbing[bool] = Field(True, description="first compare several ranks with one process, in two test steps")
    timeout: Plumbing[float] = Field(
        600, gt=0, description="seconds that a rank waits for another before the run gives up"
    )

    def options(self) -> dict[str, Any]:
        """What the backend is told beside its name."""
        return {key: value for key in ("stage", "settings") if (value := getattr(self, key)) not in (None, {})}

    @model_validator(mode="after")
    def takes_its_options(self) -> "BackendConfig":
        for key in self.options():
            takers = [name for name, backend in BACKENDS.items() if key in inspect.signature(backend).parameters]
            if self.name not in takers:
                raise ValueError(f"{key} has no effect with backend {self.name!r}; it belongs to {', '.join(takers)}")
        return self


class CheckpointConfig(Section):
    """Checkpoints, from which a run resumes."""

    every: Steps = Field(200, description="steps between checkpoints; 0: only when the run stops or ends")
    keep: Count = Field(2, description="newest checkpoints that stay on disk")
    background: bool = Field(True, description="write while training goes on")


class LogConfig(Section):
    """Logging."""

    every: Count = Field(10, description="steps between lines in metrics.jsonl")
    wandb: Literal["disabled", "offline", "online"] = Field("disabled", description="mirror the metrics in wandb")
    project: str = Field("thriftlab", description="wandb project")
    group: str | None = Field(None, description="wandb group; null: none")
    tensorboard: bool = Field(False, description="mirror the metrics in OUT/tensorboard")
    progress: bool = Field(True, description="show a progress bar")


class RunConfig(Section):
    """One training run. Every value has a default: `RunConfig()` trains a small model on the embedded corpus."""

    seed: int = Field(0, ge=0, lt=2**63, description="of the initial weights, the order of the data and the methods")
    out: Plumbing[FilePath] = Field("runs/run", min_length=1, description="folder of the run")
    plugins: Plumbing[tuple[Plugin, ...]] = Field(
        (), description="Python files that are run first and may register methods, signals and schedules"
    )
    model: ModelConfig = ModelConfig()
    layer: Annotated[LayerConfig, LAYER] = Field({"name": LAYER.default}, validate_default=True)
    data: DataConfig = DataConfig()
    optim: Annotated[OptimConfig, OPTIM] = Field({"name": OPTIM.default}, validate_default=True)
    signal: Annotated[SignalConfig, SIGNAL] = Field({"name": SIGNAL.default}, validate_default=True)
    schedule: Annotated[ScheduleConfig, SCHEDULE] = Field({"name": SCHEDULE.default}, validate_default=True)
    budget: Budget = Budget(tokens=1_000_000)
    train: TrainConfig = TrainConfig()
    backend: Speed[BackendConfig] = BackendConfig()
    eval: EvalConfig = EvalConfig()
    probes: ProbesConfig = ProbesConfig()
    checkpoint: Plumbing[CheckpointConfig] = CheckpointConfig()
    log: Plumbing[LogConfig] = LogConfig()

    @model_serializer(mode="wrap")
    def without_what_is_off(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_off(self, dump, "probes")


# What a method is made of: a layer, an update rule, a signal, or several of them, as in "lost+frugal".
SEAMS: dict[str, Registry] = {"layer": LAYER, "optim": OPTIM, "signal": SIGNAL}


def method_name(config: RunConfig) -> str:
    """The method of a run: the names of all that is not the default, or the default update rule's."""
    chosen = {section: getattr(config, section).name for section in SEAMS}
    names = [name for section, name in chosen.items() if name != SEAMS[section].default]
    return "+".join(names) or chosen["optim"]


def settled(config: RunConfig, precision: str) -> RunConfig:
    """With `precision`, that of the device, where it was left to the device. Only then is a fingerprint that of what is
    computed; until then it is of a run on a CPU."""
    if config.train.precision != "auto":
        return config
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"train": train})


def marked(model: type[BaseModel], mark: str, prefix: str = "") -> Iterator[str]:
    """The dotted keys of the fields and sections that are declared as `mark`."""
    for name, field in model.model_fields.items():
        if mark in field.metadata:
            yield prefix + name
        elif is_model(field.annotation):
            yield from marked(field.annotation, mark, f"{prefix}{name}.")


PLUMBING, SPEED = tuple(marked(RunConfig, "plumbing")), tuple(marked(RunConfig, "speed"))


def counted(config: RunConfig) -> dict[str, Any]:
    """The values that determine the result of a run, or its speed where that counts."""
    tree = settled(config, "fp32").model_dump(mode="json")
    tree["model"] = config.model.sizes()  # whatever the preset is called
    for key in PLUMBING if config.budget.seconds else PLUMBING + SPEED:
        *sections, leaf = key.split(".")
        del functools.reduce(dict.__getitem__, sections, tree)[leaf]
    return tree


def fingerprint(config: RunConfig, data_fingerprint: str) -> str:
    """sha256 of everything that determines the result of a run, up to the order in which floating-point sums are taken.

    The data count by their own fingerprint and plugins by their content, not by where they lie. Under a budget of
    seconds the speed is part of the result, so what changes only the speed counts as well.
    """
    tree = counted(config)
    if reference := tree["signal"].get("reference"):  # likewise
        tree["signal"]["reference"] = read_reference(reference)
    tree |= {"data_fingerprint": data_fingerprint, "plugin_sha256": [plugin_sha256(path) for path in config.plugins]}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
