"""From a configuration to the parts of a run: data, model, optimizer, backend, horizon.

The one place where the names in a configuration become things. It looks them up and names none itself.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from thriftlab.data.errors import ConfigError, UserError
from thriftlab.data.mixture import Plan, Source, plan
from thriftlab.data.shards import Dataset, open_dataset
from thriftlab.optim import LAYERS, METHODS, Conversion, Method, convert, split_groups
from thriftlab.optim.core.groups import by_reason
from thriftlab.optim.layers.base import changing, check_patterns
from thriftlab.train.backends.base import Backend
from thriftlab.train.backends.replicas import refuse_differences
from thriftlab.train.budget import SCHEDULES, Horizon
from thriftlab.train.config.schema import LAYER, RunConfig, fingerprint
from thriftlab.train.evaluate import count_rows
from thriftlab.train.model import GPT
from thriftlab.train.objective import Objective
from thriftlab.train.signals import SIGNALS, Signal
from thriftlab.train.signals.reference import open_reference


@dataclass(frozen=True)
class Run:
    """The parts of one run, built. `fingerprint` identifies its result."""

    config: RunConfig
    backend: Backend
    dataset: Dataset
    plan: Plan
    model: GPT
    conversion: Conversion
    optimizer: Method
    schedule: Callable[[float], float]
    horizon: Horizon
    objective: Objective
    fingerprint: str

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def delimiter(self) -> int | None:
        """What opens a document, where documents are masked."""
        return self.dataset.tokenizer.delimiter if self.config.data.document_mask else None

    @property
    def flops_per_token(self) -> int:
        return self.model.flops_per_token(self.config.data.sequence_length)

    @property
    def chief(self) -> bool:
        """Whether this rank speaks for the run: prints, writes, saves."""
        return self.backend.rank == 0


def build(config: RunConfig, backend: Backend) -> Run:
    """All parts of a run before its first step, the same on every rank. UserError for what cannot be built."""
    config.train.rows_per_rank(backend.world)
    if config.train.layerwise and type(backend) is not Backend:
        raise ConfigError(
            f"train.layerwise = true needs backend.name=single: with {backend.name!r} a gradient is complete only when "
            f"the ranks have met; start one process, or set train.layerwise=false"
        )
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    torch.use_deterministic_algorithms(config.train.deterministic)
    dataset = open_dataset(config.data.path, verify=config.data.verify)
    model, conversion = make_model(config, dataset)
    refuse_cut_weights(model, backend)
    model.to_empty(device=backend.device)
    fill(model, config.seed, backend)
    optimizer = make_optimizer(config, model)
    refuse_unprunable(model, optimizer)
    backend.prepare(model, optimizer, config.train.compile, config.train.precision)
    if config.train.layerwise:
        backend.update_in_backward()
    tokens_per_step = config.train.batch_size * config.data.sequence_length
    horizon = config.budget.horizon(tokens_per_step, model.flops_per_token(config.data.sequence_length))
    data_plan = make_plan(config, dataset, horizon.steps)
    return Run(
        config,
        backend,
        dataset,
        data_plan,
        model,
        conversion,
        optimizer,
        functools.partial(SCHEDULES[config.schedule.name], **config.schedule.hyperparameters()),
        horizon,
        make_objective(config, dataset, data_plan, backend.device),
        fingerprint(config, dataset.fingerprint),
    )


def make_model(config: RunConfig, dataset: Dataset) -> tuple[GPT, Conversion]:
    """The model on the meta device, and which of its Linears became layers."""
    vocab_size = config.model.vocab_size or dataset.tokenizer.vocab_size
    if vocab_size < dataset.tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {vocab_size} is less than the {dataset.tokenizer.vocab_size} tokens of "
            f"{config.data.path}; raise it or leave it out"
        )
    with torch.device("meta"):
        sizes = config.model.model_copy(update={"vocab_size": vocab_size})
        model = GPT(sizes, config.train.activation_checkpointing, config.train.loss_keep_bytes)
    return model, replace_layers(config, model)


def replace_layers(config: RunConfig, model: nn.Module) -> Conversion:
    """Puts the layers that the configuration names in the place of Linears, not yet filled. ConfigError if it cannot,
    or if that would save nothing anywhere."""
    layer = config.layer
    if layer.name == LAYER.default:
        return Conversion([], {})
    try:
        check_patterns(layer.exclude, [name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
        done = convert(model, LAYERS[layer.name], layer.include, layer.exclude, **layer.hyperparameters())
    except ValueError as error:  # a pattern that matches nothing, hyper-parameters that do not go together
        raise ConfigError(f"layer: {error}") from error
    if not done.converted:
        raise ConfigError(
            f"layer.name = {layer.name} is in the place of no Linear: {by_reason(done.left) or 'all are excluded'}"
        )
    return done


def refuse_cut_weights(model: GPT, backend: Backend) -> None:
    """ConfigError where layers change their weights between steps, and the backend has them in pieces."""
    if not backend.whole_weights and (layers := changing(model)):
        raise ConfigError(
            f"{next(iter(layers))} and {len(layers) - 1} more layers change whole weights between steps, which under "
            f"backend {backend.name!r} no rank has; use backend.name=ddp or backend.name=owned"
        )


def refuse_unprunable(model: GPT, optimizer: Method) -> None:
    """ConfigError where layers prune moments entry by entry, and the update rule does not keep them so."""
    pruned = {name for name, layer in changing(model).items() if layer.prune < 1}
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            if name.rpartition(".")[0] not in pruned:
                continue
            kept = [entry for entry in optimizer.expected_spec(name, p, group).values() if entry[0]]
            if not all(shape == p.shape and dtype.is_floating_point for shape, dtype in kept):
                raise ConfigError(
                    f"layer.prune below 1 zeroes the smallest entries of moments, and {type(optimizer).__name__} does "
                    f"not keep those of {name} entry by entry; use layer.prune=1, which forgets any state"
                )


def fill(model: GPT, seed: int, backend: Backend) -> None:
    """First weights, a function of the seed and equal on all ranks; they divide the layers that are more work."""
    model.init_weights(seed, slice(backend.rank, None, backend.world))
    for turn, layer in enumerate(model.replaced().values()):
        for tensor in [*layer.parameters(), *layer.buffers()]:
            backend.broadcast(tensor.detach(), turn % backend.world)
    if backend.world > 1:
        refuse_differences(model, backend.share)


def make_optimizer(config: RunConfig, model: nn.Module) -> Method:
    """The method that the configuration names, over groups chosen by parameter names."""
    method = METHODS[config.optim.name]
    seed = {"seed": config.seed} if "seed" in inspect.signature(method).parameters else {}
    try:
        groups = split_groups(model, include=list(config.optim.include), exclude=list(config.optim.exclude))
        return method(groups, **config.optim.hyperparameters(), **seed)
    except ValueError as error:  # a pattern that matches nothing, hyper-parameters that do not go together
        raise ConfigError(f"optim: {error}") from error


def make_plan(config: RunConfig, dataset: Dataset, steps: int | None) -> Plan:
    """The order of the data. `steps` is None under a budget of seconds."""
    data, batch_size = config.data, config.train.batch_size
    sources = [Source(name, **source.model_dump()) for name, source in data.sources.items()] or None
    return plan(dataset, data.sequence_length, batch_size, config.seed, sources, steps)


def make_objective(config: RunConfig, dataset: Dataset, plan: Plan, device: torch.device) -> Objective:
    """The signal that the configuration names. ConfigError where it cannot be had from these data."""
    chosen = config.signal
    names = [source.name for source in plan.sources]
    try:
        signal = SIGNALS[chosen.name](**chosen.hyperparameters())
        refuse_unheld(signal, dataset, names, config.data.sequence_length)
        reference = signal.reference and open_reference(signal.reference, dataset, plan, config.data.verify)
        return Objective(
            signal,
            names,
            chosen.statistics,
            chosen.shuffle,
            config.seed,
            dataset.tokenizer.delimiter,
            reference or None,
            device,
        )
    except ValueError as error:  # hyper-parameters that do not go together, or not with these data
        raise ConfigError(f"signal: {error}") from error


def refuse_unheld(signal: Signal, dataset: Dataset, names: list[str], sequence_length: int) -> None:
    """ValueError where the signal looks at held-out losses and a source has none."""
    for name in names if signal.validate_every else []:
        if count_rows(dataset.windows(name, "validation", sequence_length), None) == 0:
            raise ValueError(f"held-out losses are asked for, and source {name!r} has no held-out text; prepare some")
