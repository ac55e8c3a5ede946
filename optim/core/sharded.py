"""State of parameters that `torch.distributed.fsdp.fully_shard` (FSDP2) cuts by rows, and what a state dict has of it.

Key by key it is the state of one process. A moment with a row for each row of the parameter is a DTensor that lies as
the parameter does, as in torch.optim. So torch.distributed.checkpoint saves it, and loads it at any number of ranks.

Two surprises. Of chosen rows and single entries the ranks have different numbers, which no DTensor can say: such a
moment is a plain piece here, and a state dict deals it out evenly, a collective operation. And torch wants the keys of
a checkpoint before it reads one, so what is idle has zeros and a negative `start` in a state dict, not nothing; that of
one process as well.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn.functional import pad

from thriftlab.optim.core.fragments import LOCAL, Fragment, is_cut, is_moment, place, small_shape
from thriftlab.optim.core.guard import MOMENT_NAMES
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.weights import LOW, dtype_of_step, low_spec

IDLE = -1  # less `start`: what a state dict has for the `start` of a tensor without moments
UNKNOWN = "diagnostic."  # what a state says of a whole matrix, and no rank knows


def check_placement(name: str, p: DTensor) -> None:
    if p.device_mesh.ndim != 1 or tuple(p.placements) != (Shard(0),):
        raise ValueError(
            f"{name} is a DTensor with placements {tuple(p.placements)} on a mesh of {tuple(p.device_mesh.shape)} "
            "ranks; sharded parameters are supported where they are cut by rows, (Shard(dim=0),), over a mesh of one "
            "dimension: call fully_shard with such a mesh, without shard_placement_fn and without tensor parallelism"
        )


def rows_here(rows: int, p: DTensor) -> tuple[int, int]:
    """Which of so many rows this rank has of a tensor that is cut as `p` is: as many as the first, while there are."""
    most = -(-rows // p.device_mesh.size())
    start = min(most * p.device_mesh.get_local_rank(), rows)
    return start, min(start + most, rows)


def fragment_here(name: str, p: DTensor) -> Fragment:
    """The rows of `p` that this rank has."""
    row = p.numel() // max(p.shape[0], 1)
    start, stop = rows_here(p.shape[0], p)
    return Fragment(name, tuple(p.shape), start * row, stop * row)


def like_rows(shape: tuple[int, ...], p: DTensor) -> bool:
    """Whether a moment of this shape has a row for each row of `p`."""
    return len(shape) == p.ndim and shape[0] == p.shape[0]


def as_dtensor(local: Tensor, shape: tuple[int, ...], p: DTensor) -> DTensor:
    """A tensor of this shape, cut as `p` is, from the rows that are here; on the device that they are on."""
    row, rows = torch.Size(shape[1:]), rows_here(shape[0], p)
    meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), local.dtype)
    local = local.view(rows[1] - rows[0], *row)
    return DTensor(local, DTensorSpec(p.device_mesh, p.placements, tensor_meta=meta), requires_grad=False)  # type: ignore


def lies_like(tensor: DTensor, p: DTensor) -> bool:
    return (tensor.device_mesh, tensor.placements) == (p.device_mesh, p.placements)


# A step: the state as that of a fragment, and back.


def opened(fragment: Fragment, state: State, group: dict[str, Any]) -> State:
    """The state of the rows that are here: moments are flat views."""
    here = {key: t.to_local().view(-1) if isinstance(t, DTensor) else t for key, t in state.items()}
    if here:
        place(fragment, here, group)
    return here


def closed(p: DTensor, here: State, state: State, group: dict[str, Any]) -> State:
    """The state of `p` from that of its rows; `state` is the one that was opened."""
    shape = small_shape(tuple(p.shape), here, group)
    found = {key: tensor for key, tensor in here.items() if key not in LOCAL}
    for key, tensor in found.items():
        size = tuple(p.shape) if key == LOW else shape
        if is_cut(key, tensor.shape) and like_rows(size, p):
            old = state.get(key)
            same = isinstance(old, DTensor) and old.shape == size and old.to_local().data_ptr() == tensor.data_ptr()
            found[key] = old if same else as_dtensor(tensor, size, p)  # type: ignore[assignment]
    return found


# State dicts of all ranks: the state of the whole tensor, each moment cut evenly.


def show(optimizer: Any, saved: dict[str, Any]) -> None:
    """Puts into a state dict what all ranks have together of the parameters that are DTensors, and what is idle."""
    for group, indices in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for name, p, index in zip(group["names"], group["params"], indices["params"], strict=True):
            if index not in saved["state"]:
                continue
            state, shape = saved["state"][index], tuple(p.shape)
            if isinstance(p, DTensor) and optimizer.elementwise(shape, group):
                spec = optimizer.spec(shape, dtype_of_step(p, group), **group) | low_spec(shape, p.dtype, group)
                saved["state"][index] = shown(p, state, group, spec)
                continue
            if isinstance(p, DTensor):
                refuse_owned(optimizer, name, p)
                state = {key: value for key, value in state.items() if key != "owner"}
            if "start" in state and not any(key in state for key in MOMENT_NAMES):
                zeros = partial(torch.zeros, device=p.device)
                state = filled(state, optimizer.passing_spec(p, group), zeros)
            saved["state"][index] = state


def states_here(optimizer: Any, state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[Any, State]:
    """The states of a state dict as they are kept here, by index: rows of a parameter that is a DTensor, or the whole.

    Args:
        groups: those that the state dict has, with options of the optimizer's own.
    """
    of_rank = check_rank(state_dict)
    states = dict(state_dict["state"])
    has_idle = any(is_idle(saved) for saved in states.values())
    for own, indices in zip(optimizer.param_groups, groups, strict=True):
        group = {**indices, "params": own["params"]}
        for name, p, index in zip(group["names"], group["params"], indices["params"], strict=True):
            if not (saved := states.get(index)):
                continue
            if has_idle and not is_idle(saved):
                check_complete(name, saved, optimizer.passing_spec(p, group))
            states[index] = state_here(optimizer, name, p, saved, group, of_rank)
    return states


def state_here(optimizer: Any, name: str, p: Tensor, saved: State, group: dict[str, Any], of_rank: bool) -> State:
    """What is kept here of the saved state of a tensor; `of_rank`: this rank saved it."""
    if not of_rank:
        saved = of_one_process(saved, optimizer.idle(name, p, group, saved), optimizer.passing_spec(p, group))
    if isinstance(p, DTensor) and optimizer.elementwise(tuple(p.shape), group):
        return kept_rows(p, saved, group) if of_rank else taken_up(name, p, saved, group)
    if isinstance(p, DTensor) and not of_rank:
        refuse_owned(optimizer, name, p)
    return {key: whole(value) for key, value in saved.items()}


def refuse_owned(optimizer: Any, name: str, p: DTensor) -> None:
    """ValueError where the state of a tensor lies at its owner."""
    if p.device_mesh.size() > 1:
        raise ValueError(
            f"{type(optimizer).__name__}: the state of {name} lies whole at one rank, and torch.distributed.checkpoint "
            "would lose it; save rank_state_dict() in a file of each rank and load it on as many ranks, or use "
            "`thriftlab train` with backend.name=owned or fsdp2, whose checkpoints fit any number of ranks"
        )


def shown(p: DTensor, state: State, group: dict[str, Any], spec: Spec) -> State:
    """What a state dict holds of `p`; `spec`: the state of one process. Collective where ranks have uneven pieces."""
    shape = small_shape(tuple(p.shape), state, group)
    saved = {
        key: dealt_out(tensor, shape, p) if is_moment(key, tensor.shape) and not isinstance(tensor, DTensor) else tensor
        for key, tensor in state.items()
    }
    saved |= {key: torch.tensor(torch.nan) for key in spec if key.startswith(UNKNOWN)}
    absent = {key: entry for key, entry in spec.items() if is_moment(key, entry[0]) and key not in state}

    def zeros(size: tuple[int, ...], dtype: torch.dtype) -> DTensor:
        start, stop = rows_here(size[0], p)
        return as_dtensor(torch.zeros(stop - start, *size[1:], dtype=dtype, device=p.device), size, p)

    return filled(saved, absent, zeros)


def filled(state: State, absent: Spec, zeros: Callable[..., Tensor]) -> State:
    """A state with zeros for what is absent, and marked as idle, if anything is."""
    if not absent:
        return state
    values = {
        key: torch.tensor(torch.nan, dtype=dtype) if key.startswith(UNKNOWN) else zeros(size, dtype=dtype)
        for key, (size, dtype) in absent.items()
    }
    return {**state, **values, "start": IDLE - state["start"]}


def dealt_out(piece: Tensor, shape: tuple[int, ...], p: DTensor) -> DTensor:
    """A tensor of this shape from flat pieces of it, in the order of the ranks, that are of any length."""
    ranks, count = p.device_mesh.get_group(), torch.tensor([len(piece)], device=piece.device)
    counts = [torch.zeros_like(count) for _ in range(p.device_mesh.size())]
    dist.all_gather(counts, count, group=ranks)
    lengths = [int(count) for count in counts]
    padded = pad(piece, (0, max(lengths) - len(piece)))
    pieces = [torch.empty_like(padded) for _ in lengths]
    if max(lengths):
        dist.all_gather(pieces, padded, group=ranks)
    whole = torch.cat([piece[:length] for piece, length in zip(pieces, lengths, strict=True)]).view(shape)
    start, stop = rows_here(shape[0], p)
    return as_dtensor(whole[start:stop].clone(), shape, p)


def is_idle(saved: Any) -> bool:
    """Whether it is what `filled` says of a tensor without moments, and not a user's own entry."""
    start = saved.get("start") if isinstance(saved, dict) else None
    return isinstance(start, Tensor) and not start.ndim and int(start) <= IDLE


def of_one_process(saved: State, idle: bool, passing: Collection[str] = MOMENT_NAMES) -> State:
    """A saved state without what is not of one process: diagnostics that nobody knew, zeros of an idle block. Where a
    state of one process was read over one of ours, the zeros have no mark: those of a tensor that is to be `idle` now.

    Args:
        passing: the keys that come and go.
    """
    state = {key: value for key, value in saved.items() if not (key.startswith(UNKNOWN) and bool(value.isnan()))}
    come = {key: value for key, value in state.items() if key in passing}
    marked = bool(passing) and is_idle(saved)
    if marked or idle and not any(value.any() for value in as_local(come).values()):
        state = {key: value for key, value in state.items() if key not in come}
    return state | {"start": IDLE - state["start"]} if marked else state


def check_complete(name: str, saved: State, passing: Spec) -> None:
    """ValueError where moments are missing in a state dict that has them of idle blocks, too."""
    if missing := [key for key, (shape, _) in passing.items() if is_moment(key, shape) and key not in saved]:
        raise ValueError(
            f"{name}: the saved state has no {missing[0]}, though the block was active; "
            "torch.distributed.checkpoint.state_dict with flatten_optimizer_state_dict=True loses it, since it takes "
            "only the keys that the optimizer has before; save and load without flatten_optimizer_state_dict"
        )


def whole(value: Any) -> Any:
    """A tensor whole; collective where it is cut."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def taken_up(name: str, p: DTensor, saved: State, group: dict[str, Any]) -> State:
    """The state of `p` from a saved one that is whole, or cut as in a state dict; collective where it is cut in another
    way than it is kept."""
    fragment = fragment_here(name, p)
    here: State = {}
    for key, value in saved.items():
        if not (isinstance(value, Tensor) and is_cut(key, value.shape)) and not key.startswith(UNKNOWN):
            here[key] = value.clone() if isinstance(value, Tensor) else value
    shape = small_shape(fragment.shape, here, group)
    first, stop = place(fragment, here, group)
    for key, value in saved.items():
        if not (isinstance(value, Tensor) and is_cut(key, value.shape)):
            continue
        size, own = (
            (fragment.shape, slice(fragment.start, fragment.stop)) if key == LOW else (shape, slice(first, stop))
        )
        if tuple(value.shape) != size:
            raise ValueError(
                f"{name}: the saved {key} has the shape {tuple(value.shape)}, and {size} is that of the whole; "
                "load a state dict of whole tensors or of DTensors, or what rank_state_dict() gave on as many ranks"
            )
        if isinstance(value, DTensor) and lies_like(value, p) and like_rows(size, p):
            here[key] = value.to_local().clone().view(-1)
        else:
            here[key] = whole(value).reshape(-1)[own].clone()
    return closed(p, here, {}, group)


# The state of one rank alone.


def this_rank() -> list[int]:
    """Rank and number of ranks."""
    return [dist.get_rank(), dist.get_world_size()] if dist.is_initialized() else [0, 1]


def check_rank(state_dict: dict[str, Any]) -> bool:
    """Whether the state dict is of one rank; ValueError where that is another one."""
    if (rank := state_dict.get("rank", this_rank())) != this_rank():
        raise ValueError(
            f"the state of rank {rank[0]} of {rank[1]} is loaded by rank {this_rank()[0]} of {this_rank()[1]}; what "
            "rank_state_dict() gave is for the same rank of as many"
        )
    return "rank" in state_dict


def as_local(state: State) -> State:
    """What is here of a state."""
    return {key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()}


def keep_own(optimizer: Any, saved: dict[str, Any]) -> None:
    """Puts into a state dict what this rank keeps, and which rank that is."""
    saved["state"] = {index: as_local(state) for index, state in saved["state"].items()}
    saved["rank"] = this_rank()


def kept_rows(p: DTensor, saved: State, group: dict[str, Any]) -> State:
    """The state of `p` from what this rank saved of it."""
    return closed(p, {key: value.flatten() if value.ndim else value for key, value in saved.items()}, {}, group)
