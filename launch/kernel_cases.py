"""What the Triton kernels are compared and timed on: problems, and the ways to solve each.

A way is a value of THRIFTLAB_KERNELS, `torch` (the reference), `triton` or `liger`, or `compiled`, plain torch through
torch.compile. All ways of a case are called equally often, so that what they give can be compared after each call.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thriftlab.kernels.dispatch import VARIABLE, KernelError
from thriftlab.kernels.linear_cross_entropy import linear_cross_entropy
from thriftlab.kernels.lost_linear import lost_linear
from thriftlab.launch.bench import tensors
from thriftlab.launch.peers import KERNEL_STEPS
from thriftlab.launch.timing import timer
from thriftlab.optim import METHODS, state_bytes
from thriftlab.train.model import ModelConfig

Way = Callable[[], list[Tensor]]


class Case(NamedTuple):
    name: str
    bound: float  # how far a way may be from plain torch, relative to the largest number of each tensor
    ways: dict[str, Way]
    bytes: int | None = None  # that must be moved at least; None: it is bound by products


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    """One after another, for all at once might not fit in memory."""
    for dtype in (torch.bfloat16, torch.float32):
        yield loss(dtype, device, small)
        yield lost(dtype, device, small)
    for name in KERNEL_STEPS:
        yield step_of(name, device, small)


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = choice
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def under(choice: str, call: Way) -> Way:
    def way() -> list[Tensor]:
        with kernels(choice):
            return call()

    return way


def step_of(name: str, device: torch.device, small: bool) -> Case:
    """A plain step of a method on the shapes of a model, whose first step has been made."""
    method, hyper, bound = KERNEL_STEPS[name]
    hyper = {**hyper, "rank": 8} if small and "rank" in hyper else hyper
    sizes = ModelConfig(preset="nano", vocab_size=256) if small else ModelConfig(preset="llama-130m", vocab_size=32000)
    ways, held = {}, 0
    for choice in ("torch", "triton"):
        groups = tensors(sizes, device)
        optimizer = METHODS[method](groups, lr=1e-3, **hyper)  # type: ignore[call-arg]
        weights = [p for group in groups for p in group["params"]]
        ways[choice] = under(choice, partial(stepped, optimizer, weights))
        with kernels("torch"):
            optimizer.step()
        held = 12 * sum(p.numel() for p in weights) + 2 * state_bytes(optimizer)
    return Case(f"step of {name}", bound, ways, held)


def stepped(optimizer: torch.optim.Optimizer, weights: list[Tensor]) -> list[Tensor]:
    optimizer.step()
    return weights


def loss(dtype: torch.dtype, device: torch.device, small: bool) -> Case:
    """Forward and backward of the loss with late weights, and the head's products."""
    tokens, dim, vocab = (64, 16, 100) if small else (8192, 2048, 32000)
    draw = torch.Generator(device).manual_seed(0)
    hidden, head, late = (
        torch.randn(shape, generator=draw, device=device).mul_(scale).to(dtype)
        for shape, scale in (((tokens, dim), 1.0), ((vocab, dim), dim**-0.5), ((tokens,), 1.0))
    )
    targets = torch.randint(vocab, (tokens,), generator=draw, device=device)
    given = [hidden.requires_grad_(), head.requires_grad_()]

    def solve(function) -> list[Tensor]:
        losses = function(*given, targets)
        return [losses.detach(), *torch.autograd.grad((losses * late).sum(), given)]

    ways = {choice: under(choice, partial(solve, linear_cross_entropy)) for choice in ("torch", "triton", "liger")}
    if device.type == "cuda":
        ways["compiled"] = under("torch", partial(solve, torch.compile(plain_loss)))
    return Case(f"loss, {str(dtype)[6:]}", 1e-4 if dtype == torch.float32 else 2e-2, ways)


def plain_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((hidden @ head.T).float(), targets, reduction="none")


def lost(dtype: torch.dtype, device: torch.device, small: bool) -> Case:
    """Forward and backward of LOST's layer."""
    tokens, width, rank, channels = (64, 32, 8, 4) if small else (16384, 2048, 512, 64)
    draw = torch.Generator(device).manual_seed(0)
    shapes = [(tokens, width), (rank, width), (width, rank), (width, channels)]
    given = [
        torch.randn(shape, generator=draw, device=device).mul_(0.05).to(dtype).requires_grad_() for shape in shapes
    ]
    index = torch.randperm(width, generator=draw, device=device)[:channels].sort().values

    def solve(function) -> list[Tensor]:
        y = function(*given, index, 0.5, "silu")
        return [y.detach(), *torch.autograd.grad(y.float().square().mean(), given)]

    ways = {choice: under(choice, partial(solve, lost_linear)) for choice in ("torch", "triton")}
    if device.type == "cuda":
        ways["compiled"] = under("torch", partial(solve, torch.compile(lost_linear)))
    return Case(f"lost, {str(dtype)[6:]}", 1e-4 if dtype == torch.float32 else 2e-2, ways)


def measured(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of each way, how far it is from plain torch, and why a way was not taken."""
    seconds: dict[str, list[float]] = {"torch": []}
    differs, skipped, failed = {}, {}, []
    reference = [tensor.clone() for tensor in case.ways["torch"]()]
    for name in case.ways.keys() - {"torch"}:
        try:
            differs[name], seconds[name] = difference(case.ways[name](), reference), []
        except KernelError as why:
            skipped[name] = str(why)
        except Exception as error:  # the other ways and cases go on
            failed.append(f"{case.name}: {name}: {type(error).__name__}: {str(error)[:300]}")
    clock = timer(device)
    for _ in range(rounds):
        for name, several in seconds.items():
            several.append(clock(case.ways[name]))
    return {
        "case": case.name, "seconds": seconds, "differs": differs, "skipped": skipped, "bytes": case.bytes,
        "peak": peak_bandwidth(device), "wrong": failed + wrong(case, differs),
    }  # fmt: skip


def difference(found: list[Tensor], reference: list[Tensor]) -> float:
    """The largest, relative to the largest number of a tensor; not a number where one of them is none."""
    pairs = [(one.float(), two.float()) for one, two in zip(found, reference, strict=True)]
    return torch.stack([(one - two).abs().max() / two.abs().max() for one, two in pairs]).max().item()


def peak_bandwidth(device: torch.device) -> float | None:
    """Bytes a second of the memory, by its clock and the width of its bus: two transfers in each tick."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8


def wrong(case: Case, differs: dict[str, float]) -> list[str]:
    """Ways whose results are not those of plain torch."""
    return [
        f"{case.name}: {way} differs from torch by {by:.1e}, and may by {case.bound:.0e}"
        for way, by in differs.items()
        if not by <= case.bound
    ]


def times_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds of each way, and the share of the memory's peak that the kernel reaches."""
    ways = ("torch", "compiled", "triton", "liger")
    head = " | ".join(f"{way}, ms" for way in ways)
    lines = [f"| case | {head} | of the memory's peak |", "|" + "---|" * (len(ways) + 2)]
    for row in rows:
        times = {way: median(seconds) for way, seconds in row["seconds"].items()}
        cells = [f"{1e3 * times[way]:.3g}" if way in times else "-" for way in ways]
        best = times.get("triton")
        share = f"{row['bytes'] / best / row['peak']:.0%}" if best and row["bytes"] and row["peak"] else "-"
        lines.append(f"| {row['case']} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)
