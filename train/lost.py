"""A rank that is lost is a message within a bounded time, and not a job that hangs or a page of trace.

Whoever waits for a rank that crashed is told so by its closed connection; whoever waits for one that hangs gives up
after `backend.timeout`. Then those who gave up call the roll through torchrun's store, and name who does not answer.
One surprise: torch gives groups that others make (DeepSpeed, for one) half an hour whatever was asked of the first
group, unless its own default is changed.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from thriftlab.train.errors import UserError

ROLL_CALL = 5.0  # seconds; ranks that wait for the same one give up within less


class LostRank(UserError):
    """Another rank does not answer, and training ends here."""


def set_timeout(seconds: float) -> None:
    """How long a rank waits for another in any group that is made from now on."""
    limit = timedelta(seconds=seconds)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit


@contextmanager
def named_losses(out: str, timeout: float) -> Iterator[None]:
    """Turns the failure of a collective in the body into LostRank. `timeout` in seconds, as in `set_timeout`."""
    try:
        yield
    except RuntimeError as error:
        if not is_collective(error):
            raise
        raise LostRank(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {why(str(error), timeout)}. To go on from the "
            f"newest checkpoint in {out}, start the same command again; torchrun --max-restarts 3 does so by itself"
        ) from error


def is_collective(error: RuntimeError) -> bool:
    """Whether ranks failed to talk to each other; gloo has no exception of its own."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def why(said: str, timeout: float) -> str:
    if "imed out" not in said:
        return "another rank's connection closed: it crashed or was killed; its own message, or torchrun's, says why"
    silent = roll_call(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    who = f"rank {' and rank '.join(map(str, silent))} hangs" if silent else "some rank hangs"
    return (
        f"no answer within backend.timeout = {timeout:g} s; {who}, or its node is gone "
        f"(if it is only slow, raise backend.timeout)"
    )


def roll_call(rank: int, world: int) -> list[int]:
    """The ranks that do not answer within ROLL_CALL seconds; none where the store itself is gone."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"roll call/{attempt}/{number}" for number in range(world)]
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=ROLL_CALL))
        store.set(keys[rank], "here")
        time.sleep(ROLL_CALL)
        return [number for number, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return []
