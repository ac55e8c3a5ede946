"""The witness: before ranks train together, two probe steps are held against one process, tensor by tensor.

    step 1      the same sequence on every rank
    between     the second sequence on the first rank alone: its gradient g
    step 2      the second sequence on every rank: the summed gradient must be (number of ranks) g
    both        of each tensor in turn, gradient, weight and state are gathered, the same method makes its update once
                more on a rank that has no part in it, and every rank holds what it has against that

The probes go the way of training, through the backend, and are undone: weights, state, hyper-parameters and random
numbers are afterwards what they were, bit for bit. There is never more than one whole tensor of a kind on a rank.

One surprise: bits are gathered by addition. Each rank puts its piece, as bytes, into a row of zeros, and their sum is
the whole; so the witness needs nothing of a backend but a sum and what it holds.
"""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thriftlab.data.errors import UserError
from thriftlab.optim import Method
from thriftlab.optim.core.method import downhill
from thriftlab.optim.state.storage import wide
from thriftlab.optim.state.weights import LOW, join
from thriftlab.train.backends.base import Backend
from thriftlab.train.backends.holdings import rehearsal
from thriftlab.train.backends.pieces import Piece, Pieces
from thriftlab.train.windows import autocast, count_targets, split_windows, total_loss

TOLERANCE = 1e-3  # of a norm: rounding stays far below it, and no fault that we know of does
ROUNDED = 2**-8  # of a sum that is kept in bf16
OTHERWISE = 0.1  # of the entries of a weight in few bits, which a last bit of the update may round the other way
SHOWN = 5  # findings in the message
Kinds = dict[str, set[tuple[tuple[int, ...], torch.dtype]]]  # of whole tensors: one, if ranks agree


class WitnessError(UserError):
    """The ranks together do not do what one process does."""


class Held(NamedTuple):
    """What this rank saves, before an update."""

    gradients: Pieces
    weights: Pieces
    states: Pieces


@torch.no_grad()
def witness(backend: Backend, tokens: Tensor, precision: str, max_norm: float | None) -> str:
    """Raises WitnessError on all ranks if one of them finds a difference; else says what was compared.

    Args:
        backend: prepared, of several ranks.
        tokens: two batches of windows, the same on every rank, int64 [2, rows, seq + 1].
        precision, max_norm: as in `train_step`.
    """
    clock = time.perf_counter()
    first, second = tokens.to(backend.device)
    devices = [backend.device] if backend.device.type == "cuda" else []
    with rehearsal(backend), torch.random.fork_rng(devices):
        refuse(backend, compare_weights(backend))
        probe(backend, first, precision)
        refuse(backend, compare_step(backend, first, max_norm))
        probe(backend, second, precision, alone=True)
        alone = saved_here(backend, backend.gradients())
        backend.step(torch.full((), torch.nan, device=backend.device), max_norm)  # lets go of the gradients
        probe(backend, second, precision)
        refuse(backend, compare_sums(backend, alone))
        refuse(backend, compare_step(backend, second, max_norm))
    count = sum(len(group["params"]) for group in backend.optimizer.param_groups)
    return f"witness: {count} tensors on {backend.world} ranks as on one, {time.perf_counter() - clock:.1f} s"


def refuse(backend: Backend, findings: list[str]) -> None:
    """Raises on every rank what any of them has found."""
    found = [finding for of_rank in backend.share(findings) for finding in of_rank]
    if found:
        more = f"\n... and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise WitnessError(
            f"the witness: {backend.world} ranks under backend {backend.name!r} do not do what one process does\n"
            + "\n".join(found[:SHOWN])
            + f"{more}\nStart all ranks from one installation and one configuration; a method of your own must be a "
            "function of (seed, name, count). backend.name=ddp steps every tensor on every rank; backend.witness=false "
            "trains all the same"
        )


def probe(backend: Backend, windows: Tensor, precision: str, alone: bool = False) -> None:
    """Leaves the summed gradient of the windows, which every rank has, or the first one alone."""
    inputs, targets = split_windows(windows)
    if alone and backend.rank:
        targets = torch.full_like(targets, -1)
    torch.manual_seed(0)  # for a module that draws: the same on all ranks
    backend.begin(count_targets(targets))
    with torch.enable_grad(), backend.micro_batch(last=True):
        with autocast(backend.device, precision):
            loss = total_loss(backend.module(inputs, targets, None))
        backend.backward(loss)


def compare_weights(backend: Backend) -> list[str]:
    """Whether replicas are replicas, to the bit."""
    held = backend.weights()
    saved, kinds, findings = saved_here(backend, held), kinds_of(backend, held), []
    for name in kinds:
        right = gather(backend, saved, name, kinds).reshape(-1)
        if name in held and not torch.equal(held[name].tensor, right[held[name].start : held[name].stop]):
            findings.append(f"{name}: rank {backend.rank} starts with other weights than the rank that saves it")
    return findings


def compare_sums(backend: Backend, alone: Pieces) -> list[str]:
    """Whether the sum over ranks that all have one sequence is as many times its gradient."""
    together = saved_here(backend, backend.gradients())
    norms = {name: piece.tensor.norm().item() for name, piece in together.items()}
    noise = 1e-6 * max(norms.values(), default=0.0)
    findings = []
    for name, (_, _, total) in together.items():
        tolerance = TOLERANCE if total.itemsize >= 4 else ROUNDED
        total, expected = total.to(wide(total.dtype)), backend.world * alone[name].tensor.to(wide(total.dtype))
        if not (total - expected).norm() <= tolerance * expected.norm() + noise:
            findings.append(
                f"{name}: the gradient of a sequence that all ranks have is {norms[name] / expected.norm():.4g} of "
                f"{backend.world} times the first rank's: a rank's gradient was not added, or its weights differ"
            )
    return findings


def compare_step(backend: Backend, windows: Tensor, max_norm: float | None) -> list[str]:
    """Takes the step whose gradients are there, and repeats it tensor by tensor."""
    held = Held(*(saved_here(backend, p) for p in (backend.gradients(), backend.weights(), backend.states())))
    scale = 1 / (backend.world * count_targets(split_windows(windows)[1]))
    if not backend.step(scale, max_norm)[1]:
        return ["the gradient of a probe is not finite"]

    now = {**backend.weights(), **backend.states()}
    gradients, before, after = kinds_of(backend, held.gradients), kinds_of(backend, held.states), kinds_of(backend, now)
    if odd := [key for key, kinds in after.items() if len(kinds) > 1]:
        return [f"{key}: shape or dtype differ between ranks" for key in odd] if backend.rank == 0 else []
    judges, findings = choose_judges(backend, held.weights), []
    for group in backend.optimizer.param_groups:
        for name in group["names"]:
            if name not in gradients:
                continue  # nobody has one
            judge, expected = judges[name], {}
            gradient = gather(backend, held.gradients, name, gradients)
            weight = gather(backend, held.weights, name, after)
            state = {entry(key): gather(backend, held.states, key, before) for key in keys_of(name, before)}
            if backend.rank == judge:
                expected = recompute(backend, name, group, weight.clone(), gradient, state)
                findings += wrong_keys(name, expected, keys_of(name, after))
            rights = {key: publish(backend, expected.get(key), key, after) for key in [name, *keys_of(name, after)]}
            low = f"{name}/{LOW}"
            right, start = join_with(rights[name], rights.get(low)), join_with(weight, state.get(LOW))
            for key, whole in rights.items():
                if key in now and key not in (name, low):
                    findings += difference(backend, key, now[key], whole, whole, judge)
            if name in now and low in now:  # one number has two codes; an owner may have all low bits, of some weights
                (_, start_here, kept), bits = now[name], now[low]
                bits_here = bits.tensor[start_here - bits.start :][: len(kept)]
                joined = now[name]._replace(tensor=join_with(kept, bits_here))
                findings += difference(backend, name, joined, right, right - start, judge, rights[low].itemsize == 1)
            elif name in now:
                rounded = weight.dtype == torch.bfloat16
                findings += difference(backend, name, now[name], rights[name], right - start, judge, rounded)
    return findings


def join_with(weight: Tensor, low: Tensor | None) -> Tensor:
    """What is stepped of a weight: with low bits, where it has some."""
    return weight if low is None else join(weight, low)


def wrong_keys(name: str, expected: dict[str, Tensor], kept: list[str]) -> list[str]:
    """What the update leaves and the ranks have not, or the other way round."""
    odd = {key for key in expected if key != name and matters(key)} ^ set(kept)
    return [f"{name}: {'nobody has' if key in expected else 'there should be no'} state {entry(key)!r}" for key in odd]


def recompute(
    backend: Backend, name: str, group: dict[str, Any], weight: Tensor, gradient: Tensor, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """One step of one tensor, as one process takes it: its state, and its weight under ""."""
    assert isinstance(backend.optimizer, Method)
    state = {key: tensor if tensor.ndim else tensor.cpu() for key, tensor in state.items()}
    gradient = downhill(weight, gradient, group["maximize"])
    backend.optimizer.apply([name], [weight], [gradient], [state], group, scale=backend.factor)
    return {name: weight, **{f"{name}/{key}": tensor for key, tensor in state.items()}}


def difference(
    backend: Backend, key: str, piece: Piece, right: Tensor, moved: Tensor, judge: int, rounded: bool = False
) -> list[str]:
    """What is wrong with a piece, held against the whole as it should be; `moved` is what small errors are small to.
    Of what is `rounded` to few bits most entries must be equal: other random bits change every third."""
    part, moved = (tensor.reshape(-1)[piece.start : piece.stop].double() for tensor in (right, moved))
    far = piece.tensor.to(part.device).double() - part
    if right.dtype.is_floating_point:
        wrong = not far.norm() <= TOLERANCE * moved.norm() + 1e-6 * part.norm()
        wrong |= rounded and int((far != 0).sum()) > OTHERWISE * far.numel()
    else:
        wrong = bool((far.abs() > (right.dtype == torch.uint8)).any())  # codes of 8 bits may round the other way
    if not wrong:
        return []
    return [
        f"{key}: after a step rank {backend.rank} differs from what the same gradient and state give on rank {judge} "
        f"({int((far != 0).sum())} of {far.numel()} entries differ, by up to {far.abs().max():.3g})"
    ]


# ------------------------------------------------------------------------------------------------- between the ranks


def saved_here(backend: Backend, pieces: Pieces) -> Pieces:
    """Copies of the pieces that this rank saves."""
    return {k: p._replace(tensor=p.tensor.clone()) for k, p in pieces.items() if backend.saves(k)}


def kinds_of(backend: Backend, pieces: Pieces) -> Kinds:
    """Shape and dtype of everything that any rank has; more than one where ranks disagree."""
    merged: Kinds = {}
    for of_rank in backend.share({key: (piece.shape, piece.tensor.dtype) for key, piece in pieces.items()}):
        for key, kind in of_rank.items():
            merged.setdefault(key, set()).add(kind)
    return merged


def keys_of(name: str, kinds: Kinds) -> list[str]:
    """Of one parameter's state, without what no step depends on."""
    return [key for key in kinds if key.rpartition("/")[0] == name and matters(key)]


def matters(key: str) -> bool:
    return not entry(key).startswith("diagnostic.")


def entry(key: str) -> str:
    return key.rpartition("/")[2]


def choose_judges(backend: Backend, weights: Pieces) -> dict[str, int]:
    """For each parameter a rank that does not step it, by turns; any rank where all do."""
    holders: dict[str, set[int]] = {}
    for rank, names in enumerate(backend.share(list(weights))):
        for name in names:
            holders.setdefault(name, set()).add(rank)
    judges = {}
    for turn, (name, busy) in enumerate(sorted(holders.items())):
        free = [rank for rank in range(backend.world) if rank not in busy] or list(range(backend.world))
        judges[name] = free[turn % len(free)]
    return judges


def gather(backend: Backend, pieces: Pieces, key: str, kinds: Kinds) -> Tensor:
    """A whole tensor on every rank, from the pieces that ranks save."""
    row = empty_row(backend, key, kinds)
    if key in pieces:
        row[pieces[key].start : pieces[key].stop] = pieces[key].tensor
    return add_bytes(backend, row, key, kinds)


def publish(backend: Backend, tensor: Tensor | None, key: str, kinds: Kinds) -> Tensor:
    """The tensor of the one rank that has it, on every rank."""
    row = empty_row(backend, key, kinds)
    if tensor is not None and tensor.numel() == row.numel():
        row.copy_(tensor.reshape(-1))
    return add_bytes(backend, row, key, kinds)


def empty_row(backend: Backend, key: str, kinds: Kinds) -> Tensor:
    ((shape, dtype),) = kinds[key]
    return torch.zeros(torch.Size(shape).numel(), dtype=dtype, device=backend.device)


def add_bytes(backend: Backend, row: Tensor, key: str, kinds: Kinds) -> Tensor:
    ((shape, _),) = kinds[key]
    return (backend.sum(row.view(torch.uint8)).view(row.dtype) if row.numel() else row).view(shape)
