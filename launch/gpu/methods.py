"""Checks of layers and update rules."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from thriftlab.launch.bench import tensors
from thriftlab.launch.gpu.setting import TINY, Finding, Setting
from thriftlab.launch.gpu.trace import no_waiting, reads, traced
from thriftlab.launch.peers import NO_REFRESH, variants
from thriftlab.launch.probe import configured, loss_of, opened, stepper
from thriftlab.launch.timing import timer
from thriftlab.optim import METHODS, Method, State, keyed_generator
from thriftlab.optim.core.hyper import hyperparameters
from thriftlab.optim.state.dense import DENSE
from thriftlab.optim.state.subspaces import named_subspace
from thriftlab.train.config.schema import LAYER
from thriftlab.train.model import ModelConfig


def layers(setting: Setting) -> Iterator[Finding]:
    """Every layer in every way of its first weights, made on the device, and a step."""
    common = {
        "model": setting.size({"preset": "micro"}, {**TINY, "dim": 64, "hidden": 96}),
        "data": {"path": str(setting.text), "sequence_length": setting.size(256, 16)},
        "train": {"batch_size": setting.size(8, 2), "precision": "fp32"},
        "backend": {"device": str(setting.device)},
        "out": str(setting.folder / "run"),
    }
    losses, wrong = {}, []
    for layer in layer_cases():
        label = " ".join(f"{value}" if key == "name" else f"{key}={value}" for key, value in layer.items())
        try:
            with opened(configured(common, {"layer": layer})) as run:
                step = stepper(run)
                losses[label] = [loss_of(run, step()) for _ in range(2)]
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}: {error}")
        else:
            if not all(map(math.isfinite, losses[label])):
                wrong.append(f"{label}: loss {losses[label]}")
        yield Finding(f"{len(losses)} layers stepped, {len(wrong)} bad", {"losses": losses}, wrong)


def layer_cases() -> Iterator[dict[str, Any]]:
    """Every layer by name, with every `init` and `init_gain` that it takes."""
    for name in LAYER.entries:
        fields = LAYER.model(name).model_fields
        ways = {"init": choices(fields["init"].annotation)} if "init" in fields else {}
        if "init_gain" in fields:
            ways["init_gain"] = [None, 1.0, "dense"]
        for values in itertools.product(*ways.values()):
            yield {"name": name, **dict(zip(ways, values, strict=True))}


def choices(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []


# -------------------------------------------------------------------------------------------------------- update rules


def methods(setting: Setting) -> Iterator[Finding]:
    """Every method with every dtype of its state: two steps with a refresh, plain ones that wait for nothing, and one
    that is refused, which leaves every bit."""
    sizes = ModelConfig(**setting.model({"preset": "llama-60m", "layers": 2}), vocab_size=setting.size(32000, 64))
    groups = tensors(sizes, setting.device)
    yes, no = (torch.full((), value, device=setting.device) for value in (1.0, 0.0))
    done, wrong = [], []
    for label, name, hyper in method_cases():
        try:
            optimizer = make(name, groups, with_rank(name, hyper, setting.size(128, 8)), gap=1)
            optimizer.step()
            optimizer.step()
            set_gap(optimizer, NO_REFRESH)
            with no_waiting(setting.device):
                optimizer.step()
                optimizer.step(applied=yes)
            before = bits(optimizer)
            optimizer.step(applied=no)
            if not all(map(torch.equal, before, bits(optimizer))):
                wrong.append(f"{label}: a refused step changes weights or state")
            if not all(p.isfinite().all() for group in groups for p in group["params"]):
                wrong.append(f"{label}: a weight is not finite")
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}")
        done.append(label)
        yield Finding(f"{len(done)} combinations of method and state, {len(wrong)} bad", {"done": done}, wrong)


def bits(optimizer: Method) -> list[Tensor]:
    """Copies of weights and state, as bytes."""
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.reshape(-1).view(torch.uint8).clone() for tensor in (*weights, *kept)]


def method_cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(label, method, hyper-parameters) of every variant with every dtype of state."""
    for label, (name, hyper) in variants().items():
        state = hyperparameters(METHODS[name]).get("state_dtype")
        dtypes = choices(get_args(state.annotation)[0]) if state and "state_dtype" not in hyper else []
        for dtype in dtypes or [None]:
            yield f"{label} {dtype or ''}".strip(), name, {**hyper, **({"state_dtype": dtype} if dtype else {})}


def with_rank(name: str, hyper: dict[str, Any], most: int) -> dict[str, Any]:
    """The hyper-parameters with a rank of at most so much, if any, so that the matrices of a small model are split."""
    takes = "rank" in hyperparameters(METHODS[name])
    return {**hyper, "rank": min(hyper.get("rank", most), most)} if takes else hyper


def drawn(name: str, hyper: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters with a subspace that is drawn instead of one that is made of singular vectors: its plain
    step is the same, and its first refresh costs nothing."""
    subspace = hyperparameters(METHODS[name]).get("subspace")
    costly = subspace is not None and "subspace" not in hyper and subspace.default in DENSE
    return {**hyper, "subspace": "orthogonal"} if costly else hyper


def make(name: str, groups: list[dict[str, Any]], hyper: dict[str, Any], gap: int = NO_REFRESH) -> Method:
    optimizer = METHODS[name](groups, lr=1e-6, **hyper)  # type: ignore[call-arg]
    set_gap(optimizer, gap)
    return optimizer


def set_gap(optimizer: Method, gap: int) -> None:
    for group in optimizer.param_groups if "gap" in optimizer.defaults else ():
        group["gap"] = gap


def launches(setting: Setting) -> Iterator[Finding]:
    """Kernels of a plain step of every method, and how long the device is idle in it; 4 of the 24 layers of 1B."""
    sizes = ModelConfig(**setting.model({"preset": "llama-1b", "layers": 4}), vocab_size=setting.size(32000, 64))
    groups, seconds = tensors(sizes, setting.device), timer(setting.device)
    matrices = sum(len(group["params"]) for group in groups if group["split"])
    rows: dict[str, Any] = {}
    for label, (name, hyper) in variants().items():
        optimizer = make(name, groups, drawn(name, with_rank(name, hyper, setting.size(256, 8))))
        optimizer.step()
        optimizer.step()
        trace = traced(optimizer.step, setting.device)
        rows[label] = {
            "launches": trace.launches, "per_matrix": trace.launches / matrices, "idle": trace.idle,
            "seconds": seconds(optimizer.step), "kernels": dict(trace.kernels.most_common(5)),
        }  # fmt: skip
        del optimizer
        worst = max(rows, key=lambda label: rows[label]["launches"])
        says = f"{matrices} matrices: {rows[worst]['launches']} launches at most ({worst})"
        busiest = max(row["idle"] for row in rows.values())
        yield Finding(f"{says}, idle up to {busiest:.0%}", {"matrices": matrices, "methods": rows})


# -------------------------------------------------------------------------------------------------------------- refresh

SHAPES = ((2048, 2048), (5461, 2048), (2048, 5461))  # the matrices of llama-1b
ANGLE = 1e-3  # what optim/state/dense.py promises


def refresh(setting: Setting) -> Iterator[Finding]:
    """A refresh of one matrix of each shape: seconds, waits of the host, angle to the singular vectors."""
    rank, seconds = setting.size(512, 8), timer(setting.device)
    rows: dict[str, Any] = {}
    wrong: list[str] = []
    for shape in setting.size(SHAPES, ((96, 96), (128, 96))):
        gradient, vectors = known_vectors(shape, rank, setting.device)
        for name in (name for name, kind in DENSE.items() if kind.uses_gradient):
            again = refresher(name, rank, gradient)
            with reads(setting.device) as waits:
                basis = again()
            taken, far = seconds(again), angle(basis["vectors"], vectors)
            label = f"{name} {shape[0]}x{shape[1]}"
            rows[label] = {"seconds": taken, "waits": len(waits), "where": sorted(set(waits)), "angle": far}
            if not far < ANGLE:
                wrong.append(f"{label}: angle {far:.1e} to the singular vectors, promised {ANGLE}")
            slowest = max(rows, key=lambda label: rows[label]["seconds"])
            waited = max(row["waits"] for row in rows.values())
            says = f"rank {rank}: {rows[slowest]['seconds']:.3f} s at most ({slowest}), {waited} waits at most"
            yield Finding(says, {"matrices": rows}, wrong)


def refresher(name: str, rank: int, gradient: Tensor) -> Callable[[], State]:
    """The second refresh of a subspace, from the basis of the first where it goes on from one; the first has loaded
    the libraries that it needs."""
    subspace, draw = named_subspace(name, rank, None), keyed_generator(0, "check", 0)
    basis = subspace.refresh(gradient, "check", 0, draw)
    if hasattr(subspace, "refine"):
        return lambda: subspace.refine(gradient, basis)
    return lambda: subspace.refresh(gradient, "check", 1, draw)


def known_vectors(shape: tuple[int, int], rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A matrix whose singular values fall like 1/i, with a step of 1.1 after the first `rank`; the vectors of its
    shorter side, [min, rank] in float64, leading ones first."""
    draw, short = torch.Generator(device).manual_seed(0), min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(side, short, generator=draw, device=device, dtype=torch.float64)).Q
        for side in (max(shape), short)
    )
    values = 1 / torch.arange(1, short + 1, device=device, dtype=torch.float64)
    values[rank:] /= 1.1
    tall = (left * values) @ right.T
    return (tall if shape[0] >= shape[1] else tall.T).float().contiguous(), right[:, :rank]


def angle(found: Tensor, right: Tensor) -> float:
    """The largest principal angle between the columns, by its sine."""
    found = torch.linalg.qr(found.double()).Q
    return torch.linalg.matrix_norm(found - right @ (right.T @ found), 2).item()
