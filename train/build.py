"""From a configuration to the parts of a run: data, model, optimizer, backend, plan, objective.

`build` is the table of contents: first everything that can be refused from the configuration and the backend alone,
then the parts in their order, and the functions below in the order in which it calls them. The one place where the
names in a configuration become things: it looks them up and names none itself.
"""

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from thriftlab.data.errors import CheckpointError, ConfigError, UserError
from thriftlab.data.mixture import Plan, Source, plan
from thriftlab.data.repeated import repeated_plan
from thriftlab.data.shards import Dataset, open_dataset
from thriftlab.optim import LAYERS, METHODS, Conversion, Method, convert, split_groups
from thriftlab.optim.core.groups import by_reason, table_patterns
from thriftlab.optim.core.products import EXACT
from thriftlab.optim.layers.base import changing, check_patterns
from thriftlab.train.attention import why_no_flash
from thriftlab.train.backends.base import Backend
from thriftlab.train.backends.device import best_precision
from thriftlab.train.backends.replicas import refuse_differences, take_up
from thriftlab.train.budget import SCHEDULES, Horizon
from thriftlab.train.checkpoints.reader import opened, steps_in
from thriftlab.train.config.schema import LAYER, RunConfig, TrainConfig, fingerprint, settled
from thriftlab.train.evaluate import count_rows
from thriftlab.train.few_bits import narrow
from thriftlab.train.memory import Peaks
from thriftlab.train.model import GPT
from thriftlab.train.objective import Objective
from thriftlab.train.refuse import refuse
from thriftlab.train.signals import SIGNALS, Signal
from thriftlab.train.signals.reference import open_reference
from thriftlab.train.step import micro_batch_rows


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
    peaks: Peaks
    micro_batch_size: int | None  # windows of one forward; None: not known before the memory of a GPU is looked at

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def mask_delimiter(self) -> int | None:
        """The token that opens a document, where attention is masked between documents."""
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
    config = settled(config, best_precision(backend.device))
    refuse(config, backend)
    peaks = Peaks(backend.device)
    warn_of_slow_attention(config, backend)
    set_torch(config.train)
    dataset = open_dataset(config.data.path, verify=config.data.verify)
    model, conversion = make_model(config, dataset)
    fill(model, config.seed, backend, Path(config.out) / "checkpoints")
    optimizer = make_optimizer(config, model)
    narrow(config, model, optimizer)
    backend.prepare(model, optimizer, config.train.compile, config.train.precision)
    if config.train.layerwise:
        backend.update_in_backward()
    horizon = make_horizon(config, model)
    data_plan = make_plan(config, dataset, horizon.steps)
    horizon = replace(horizon, steps=horizon.steps and data_plan.fitting(horizon.steps))
    objective = make_objective(config, dataset, data_plan, backend.device)
    return Run(
        config=config,
        backend=backend,
        dataset=dataset,
        plan=data_plan,
        model=model,
        conversion=conversion,
        optimizer=optimizer,
        schedule=functools.partial(SCHEDULES[config.schedule.name], **config.schedule.hyperparameters()),
        horizon=horizon,
        objective=objective,
        fingerprint=fingerprint(config, dataset.fingerprint),
        peaks=peaks,
        micro_batch_size=micro_batch_size(config, backend, objective.waits),
    )


def warn_of_slow_attention(config: RunConfig, backend: Backend) -> None:
    """Says what keeps attention on a GPU from torch's fastest kernel."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    why = why_no_flash(dtype, config.model.dim // config.model.heads)
    if backend.device.type != "cpu" and backend.rank == 0 and why and not config.data.document_mask:
        warnings.warn(f"attention does not take the flash kernel: {why}", RuntimeWarning, stacklevel=2)


def set_torch(config: TrainConfig) -> None:
    """What is torch's own, of the whole process."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:  # else torch refuses products on a GPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("high" if config.matmul == "tf32" else EXACT)


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
        t = config.train
        model = GPT(sizes, t.activation_checkpointing, t.loss_keep_bytes, t.dropout)
    return model, replace_layers(config, model)


def replace_layers(config: RunConfig, model: nn.Module) -> Conversion:
    """Puts the layers that the configuration names in the place of Linears, not yet filled. ConfigError if it cannot,
    or if that would save nothing anywhere."""
    layer = config.layer
    if layer.name == LAYER.default:
        return Conversion([], {})
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with options_of("layer"):
        check_patterns(layer.exclude, linears)
    with options_of("layer"):
        done = convert(model, LAYERS[layer.name], layer.include, layer.exclude, **layer.hyperparameters())
    if not done.converted:
        raise ConfigError(f"layer.name = {layer.name} replaces no Linear: {by_reason(done.left) or 'all are excluded'}")
    return done


def fill(model: GPT, seed: int, backend: Backend, checkpoints: Path) -> None:
    """First weights, a function of the seed and equal on all ranks; they divide the layers that are more work. A run
    that goes on has that work behind it."""
    model.to_empty(device=backend.device)
    model.tie()
    if not (model.replaced() and taken_up(model, backend, checkpoints)):
        model.init_weights(seed, slice(backend.rank, None, backend.world))
        for turn, layer in enumerate(model.replaced().values()):
            for tensor in [*layer.parameters(), *layer.buffers()]:
                backend.broadcast(tensor.detach(), turn % backend.world)
    if backend.world > 1:
        refuse_differences(model, backend.share)


def taken_up(model: GPT, backend: Backend, checkpoints: Path) -> bool:
    """Whether all ranks have the weights of the newest checkpoint now. Nobody has verified them: they stand in for
    first weights, until the run restores all that it goes on with."""
    path = backend.share(next((path for _, path in steps_in(checkpoints)), None))[0]
    try:
        found = path and opened(path)
        if found:
            take_up(model, found.reader("model"), found.reader("buffers"))
    except (CheckpointError, OSError, ValueError, KeyError):
        found = None
    return all(backend.share(found is not None))


def make_optimizer(config: RunConfig, model: GPT) -> Method:
    """The method that the configuration names, over groups chosen by parameter names."""
    method = METHODS[config.optim.name]
    known = {"seed": config.seed, "head_dim": model.config.dim // model.config.heads}
    given = {key: value for key, value in known.items() if key in inspect.signature(method).parameters}
    include, exclude = list(config.optim.include), list(config.optim.exclude)
    chosen = {key: value for key in ("tables", "row_floor") if (value := getattr(config.optim, key))}
    if config.optim.tables == "own" and not method.roles:  # then they are matrices among the others
        include += table_patterns(model)
        del chosen["tables"]
    with options_of("optim"):
        groups = split_groups(model, include, exclude, method.roles or "tables" in chosen)
        optimizer = method(groups, **config.optim.hyperparameters(), **chosen, **given)
    refuse_unprunable(model, optimizer)
    return optimizer


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


def make_horizon(config: RunConfig, model: GPT) -> Horizon:
    """Where the budget ends the run."""
    tokens_per_step = config.train.batch_size * config.data.sequence_length
    return config.budget.horizon(tokens_per_step, model.flops_per_token(config.data.sequence_length))


def make_plan(config: RunConfig, dataset: Dataset, steps: int | None) -> Plan:
    """The order of the data. `steps` is None under a budget of seconds."""
    data, batch_size = config.data, config.train.batch_size
    given = {name: Source(name, **source.model_dump()) for name, source in data.sources.items()}
    if all(source.weight is None and source.epochs is None for source in given.values()):
        given = {name: Source(name) for name in dataset.sources} | given
    what = dataset, data.sequence_length, batch_size, config.seed, [*given.values()], steps
    if data.repetition.fraction is not None:
        return repeated_plan(*what, **data.repetition.model_dump())
    return plan(*what, share_of_target(config, steps), data.reshuffle == "documents")


def share_of_target(config: RunConfig, steps: int | None) -> Fraction | None:
    """The part of the target's steps that a proxy takes; None for a run that is no proxy."""
    target, tokens_per_step = config.data.proxy_of, config.train.batch_size * config.data.sequence_length
    if target is None:
        return None
    if steps is None:
        raise ConfigError(
            "data.proxy_of compares the tokens of two runs, and a budget of seconds has no known number of them; set "
            "budget.tokens or budget.flops"
        )
    if target < steps * tokens_per_step:
        raise ConfigError(
            f"data.proxy_of = {target:,} tokens is less than the {steps * tokens_per_step:,} of this run; raise it, or "
            "lower the budget"
        )
    return Fraction(steps, target // tokens_per_step)


def make_objective(config: RunConfig, dataset: Dataset, plan: Plan, device: torch.device) -> Objective:
    """The signal that the configuration names. ConfigError where it cannot be had from these data."""
    chosen = config.signal
    names = [source.name for source in plan.sources]
    with options_of("signal"):
        signal = SIGNALS[chosen.name](**chosen.hyperparameters())
    refuse_unheld(signal, dataset, names[: len(plan.windows)], config.data.sequence_length)
    reference = signal.reference and open_reference(signal.reference, dataset, plan, config.data.verify)
    with options_of("signal"):
        return Objective(
            signal,
            domains=names,
            statistics=chosen.statistics,
            shuffle=chosen.shuffle,
            seed=config.seed,
            delimiter=dataset.tokenizer.delimiter,
            reference=reference or None,
            device=device,
        )


def micro_batch_size(config: RunConfig, backend: Backend, waits: bool) -> int | None:
    """Windows of one forward, as set or as a CPU's cache holds them; None where the memory of a GPU has to be asked.
    `waits`: whether a second micro-batch would mean a second forward of all."""
    if config.train.micro_batch_size or backend.device.type != "cpu":
        return config.train.micro_batch_size
    all_rows = config.train.rows_per_rank(backend.world)
    return all_rows if waits else micro_batch_rows(backend.device, config.data.sequence_length, config.model.dim)


def refuse_unheld(signal: Signal, dataset: Dataset, names: list[str], sequence_length: int) -> None:
    """ConfigError where the signal looks at held-out losses and a source has none."""
    for name in names if signal.validate_every else []:
        if count_rows(dataset.windows(name, "validation", sequence_length), None) == 0:
            raise ConfigError(
                f"signal: held-out losses are asked for, and source {name!r} has no held-out text; prepare some"
            )


@contextmanager
def options_of(section: str) -> Iterator[None]:
    """Around one call that documents ValueError for options that do not go together, or a pattern that matches nothing:
    then it is a ConfigError of this section."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{section}: {error}") from error
