"""What the environment says of the ranks, as torchrun sets it: read here, and refused here where it does not fit."""

import os
from typing import NamedTuple

from thriftlab.data.errors import BackendError

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
OF_RANKS = (*RANKS, "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = "torchrun --nproc_per_node 2 -m thriftlab.launch train ..."


class Environment(NamedTuple):
    rank: int = 0
    world: int = 1
    local_rank: int | None = None  # among the ranks of this machine


def read_environment() -> Environment:
    """BackendError for what is missing or no number; one process where nothing is said of ranks."""
    if not any(name in os.environ for name in RANKS):
        return Environment()
    world = number("WORLD_SIZE", 1)
    rank = 0 if world == 1 and "RANK" not in os.environ else number("RANK", 0)
    if rank >= world:
        raise BackendError(f"RANK = {rank} in the environment is not below WORLD_SIZE = {world}; {remedy()}")
    return Environment(rank, world, number("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else None)


def number(name: str, least: int, most: int = 2**31) -> int:
    """A number in the environment."""
    text = os.environ.get(name)
    if not text:
        raise BackendError(f"{name} is {'missing in' if text is None else 'empty in'} the environment; {remedy()}")
    if not (text.isascii() and text.isdigit() and least <= int(text[:12]) <= most):
        raise BackendError(f"{name} = {text!r} in the environment is no number from {least} on; {remedy()}")
    return int(text)


def remedy() -> str:
    said = [name for name in (*RANKS, "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    return f"start several ranks with: {TORCHRUN}; or one process after: unset {' '.join(said)}"


def meeting_point() -> tuple[str, int]:
    """Where ranks meet: MASTER_ADDR and MASTER_PORT."""
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise BackendError(f"MASTER_ADDR is missing in the environment; {remedy()}")
    return host, number("MASTER_PORT", 1, 65535)


def refuse_ranks(command: str) -> None:
    """BackendError for a command that is not one of several ranks, but was started as one."""
    if "TORCHELASTIC_RUN_ID" in os.environ or read_environment().world > 1:
        raise BackendError(
            f"thriftlab {command} is one process and was started as a rank (WORLD_SIZE = "
            f"{os.environ.get('WORLD_SIZE')} in the environment); start it without torchrun, or after: "
            f"unset {' '.join(name for name in OF_RANKS if name in os.environ)}"
        )
