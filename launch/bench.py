"""thriftlab bench optim: what a step of each method costs in seconds, beside torch's own over lists of tensors.

One process, one set of weights and random gradients for all; on a CPU one thread and its own seconds, on a GPU the
seconds between two events. The optimizers take turns in every round, so a noise that lasts affects them all alike;
ratios are taken within a round. A refresh is forced by setting the group's `gap` to 1 for one step. The surprise: a
peer's refresh is its first step, which allocates its state as well.
"""

import json
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from thriftlab.data.errors import ConfigError
from thriftlab.data.files import make_folder, replace_atomically
from thriftlab.data.paths import FilePath
from thriftlab.data.prepare.request import split_commas
from thriftlab.launch.peers import FLOORS, NO_REFRESH, PEERS, RULER, held_bytes, ruler, variants
from thriftlab.launch.timing import peak_allocation, timer
from thriftlab.optim import METHODS, Method, predicted_state_bytes, split_groups
from thriftlab.optim.state.weights import Rounding, WeightDtype
from thriftlab.train.backends.device import Device, choose_device, warn_of_idle_gpu
from thriftlab.train.config.choice import Section
from thriftlab.train.model import GPT, PRESETS, ModelConfig
from thriftlab.train.records.record import provenance

REFRESHES = 3  # rounds with a refresh: an SVD of every matrix costs as much as ten steps
MATRICES = (r"\.(attn|mlp)\.",)


class OptimBench(Section):
    """How the methods are timed."""

    methods: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = Field(
        (), description="names with commas between them; empty: all, and other packages' methods where installed"
    )
    rounds: int = Field(7, ge=1, description="turns of every method; 7 or more for figures to be quoted")
    preset: Literal[tuple(PRESETS)] = Field(  # type: ignore[valid-type]
        "llama-60m", description="whose shapes (model.preset)"
    )
    weights: Annotated[tuple[WeightDtype, ...], BeforeValidator(split_commas)] = Field(
        ("fp32",), description="how weights are kept (train.weights), with commas between them; of each method all"
    )
    rounding: Rounding = Field("random", description="of weights in bf16 and bf16+8")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N; auto: a GPU where torch sees one")
    out: FilePath | None = Field(None, description="JSON file for every number; null: none")


class Timing:
    """One optimizer and what was measured of it."""

    def __init__(self, label: str, optimizer: torch.optim.Optimizer):
        self.label, self.optimizer = label, optimizer
        device = optimizer.param_groups[0]["params"][0].device
        self.seconds = timer(device)
        self.ours = type(optimizer) in METHODS.values()
        self.refreshes = self.ours and "gap" in optimizer.param_groups[0]
        self.spec_bytes = predicted_state_bytes(optimizer) if self.ours else None  # type: ignore[arg-type]
        self.plain: list[float] = []
        first = self.seconds(optimizer.step)
        self.refresh = [] if self.ours else [first]
        self.state_bytes = held_bytes(optimizer)
        self.transient_bytes = peak_allocation(optimizer.step, device)

    def take_turn(self, refresh: bool) -> None:
        if refresh and self.refreshes:
            self.set_gap(1)
            self.refresh.append(self.seconds(self.optimizer.step))
            self.set_gap(NO_REFRESH)
        self.plain.append(self.seconds(self.optimizer.step))

    def set_gap(self, gap: int) -> None:
        for group in self.optimizer.param_groups:
            group["gap"] = gap

    def numbers(self, base: list[float]) -> dict[str, Any]:
        ratios = [own / other for own, other in zip(self.plain, base, strict=True)]
        return {
            "label": self.label, "plain_seconds": self.plain, "ratios": ratios, "refresh_seconds": self.refresh,
            "state_bytes": self.state_bytes, "spec_bytes": self.spec_bytes, "transient_bytes": self.transient_bytes,
        }  # fmt: skip


def bench_methods(options: OptimBench) -> dict[str, Any]:
    """Time the methods, print a table and return its numbers."""
    unknown = set(options.methods) - set(METHODS)
    if unknown:
        raise ConfigError(f"methods: unknown {', '.join(sorted(unknown))}; there are {', '.join(sorted(METHODS))}")
    if options.out:
        make_folder(Path(options.out).parent)
        if Path(options.out).is_dir():
            raise ConfigError(f"out: {options.out} is a folder; name a file in it")
    warn_of_idle_gpu(options.device)
    device, threads = choose_device(options.device), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = make_timings(options, device)
        for number in range(options.rounds):
            for timing in timings:
                timing.take_turn(refresh=number < REFRESHES)
    finally:
        torch.set_num_threads(threads)
    origin = provenance()
    result = {
        "preset": options.preset, "rounds": options.rounds, "device": name_of(device, origin["machine"]), **origin,
        "rows": [timing.numbers(timings[0].plain) for timing in timings],
    }  # fmt: skip
    print(table(result))
    if options.out:
        replace_atomically(Path(options.out), json.dumps(result, indent=1).encode())
    return result


def name_of(device: torch.device, machine: dict[str, Any]) -> str:
    """A GPU, or one thread of a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"one thread of {machine['cpu']}"


def make_timings(options: OptimBench, device: torch.device) -> list[Timing]:
    """The ruler first, then the methods, floors, and the peers that are installed."""
    sizes = ModelConfig(preset=options.preset)
    groups = tensors(sizes, device)
    split = [p for group in groups if group["split"] for p in group["params"]]
    plain = [p for group in groups if not group["split"] for p in group["params"]]
    timings = [Timing(RULER, ruler(split, plain))]
    for label, (name, hyper) in variants().items():
        for kept in options.weights if not options.methods or name in options.methods else ():
            own = groups if kept == "fp32" else tensors(sizes, device)  # which it changes in place
            optimizer = METHODS[name](own, lr=1e-6, **hyper)  # type: ignore[call-arg]
            if kept != "fp32":
                keep(optimizer, kept, options.rounding)
            if "gap" in optimizer.defaults:
                for group in optimizer.param_groups:
                    group["gap"] = NO_REFRESH
            timings.append(Timing(label if kept == "fp32" else f"{label} weights={kept}", optimizer))
    for label, (names, make) in FLOORS.items():
        if not options.methods or set(names) & set(options.methods):
            timings.append(Timing(label, make(split, plain)))
    for label, make in PEERS.items() if not options.methods else ():
        try:
            timings.append(Timing(label, make(split, plain)))
        except ImportError as error:
            print(f"{label}: left out ({error})")
    return timings


def tensors(sizes: ModelConfig, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
    """Parameter groups of a model's shapes, with fixed random weights and gradients of 0.02."""
    with torch.device("meta"):
        model = GPT(sizes.model_copy(update={"vocab_size": sizes.vocab_size or 32000}))
    draw = torch.Generator(device).manual_seed(0)
    groups = split_groups(model, include=MATRICES, roles=True)
    for group in groups:
        group["params"] = [torch.nn.Parameter(noise(p.shape, draw)) for p in group["params"]]
        for p in group["params"]:
            p.grad = noise(p.shape, draw)
    return groups


def keep(optimizer: Method, weights: WeightDtype, rounding: Rounding) -> None:
    """Weights in few bits, with gradients that stay fp32."""
    grads = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    for p in grads:
        p.grad = None
    optimizer.keep_weights(weights, rounding)
    for p, grad in grads.items():
        p.grad_dtype, p.grad = torch.float32, grad


def noise(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=draw, device=draw.device) * 0.02


def table(result: dict[str, Any]) -> str:
    """Markdown, one row an optimizer: median (range)."""
    unit = "CPU s" if "thread" in result["device"] else "GPU s"
    lines = [
        f"{result['preset']}, {result['device']}, torch {torch.__version__}, "
        f"median (range) of {result['rounds']} interleaved rounds, commit {(result['commit'] or 'none')[:10]}",
        "",
        f"| optimizer | plain step, {unit} | ratio to foreach | refresh, {unit} | state MB | declared | transient MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        declared = row["spec_bytes"]
        said = "-" if declared is None else "equal" if declared == row["state_bytes"] else f"{declared / 1e6:.1f}"
        lines.append(
            f"| {row['label']} | {spread(row['plain_seconds'])} | {spread(row['ratios'])} "
            f"| {spread(row['refresh_seconds'])} | {row['state_bytes'] / 1e6:.1f} | {said} "
            f"| {row['transient_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{median(values):.3g} ({min(values):.3g}-{max(values):.3g})"
