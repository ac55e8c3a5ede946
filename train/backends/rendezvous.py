"""Ranks find each other, and notice within a bounded time when one of them is lost.

Whoever waits for a rank that crashed is told so by its closed connection; whoever waits for one that hangs gives up
after `backend.timeout`. Then those who gave up call the roll through their store, and name who does not answer.
One surprise: torchrun keeps one store over all restarts (torch 2.13), in which a new rank may find the address of a
dead one. So the ranks of one start first agree on a word that no other start has used, and keep to keys under it.
"""

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread

import torch.distributed as dist
from torch.distributed import distributed_c10d

from thriftlab.data.errors import UserError

ROLL_CALL = 5.0  # seconds; ranks that wait for the same one give up within less
POLL = 0.02  # seconds


class LostRank(UserError):
    """Another rank does not answer, and training ends here."""


def set_timeout(seconds: float) -> None:
    """How long a rank waits for another in every group that is made from now on, whoever makes it (DeepSpeed's own
    groups ask for torch's default, half an hour)."""
    limit = timedelta(seconds=seconds)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit


def meet(host: str, port: int, rank: int, world: int) -> dist.Store:
    """A store that these ranks share with nobody else, dead or alive. Returns when all of them are here."""
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=rank == 0 and not by_torchrun,
            timeout=distributed_c10d.default_pg_timeout,
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise LostRank(
            f"rank {rank} cannot meet the others at MASTER_ADDR = {host}, MASTER_PORT = {port}: "
            f"{str(error).splitlines()[0]}; name the machine of rank 0 and a free port of it"
        ) from None
    me = uuid.uuid4().hex
    store.set(f"hello/{rank}", me)
    if rank == 0:
        welcome(store, me, set(range(1, world)))
        return dist.PrefixStore(me, store)
    word = store.get(f"welcome/{me}").decode()
    store.set(f"here/{word}/{rank}", "")
    return dist.PrefixStore(word, store)


def welcome(store: dist.Store, word: str, missing: set[int]) -> None:
    """Hand the word to everyone who says hello; an old hello of a dead rank does no harm."""
    deadline = time.monotonic() + distributed_c10d.default_pg_timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"hello/{rank}"]):
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", word)
        missing = {rank for rank in missing if not store.check([f"here/{word}/{rank}"])}
        if time.monotonic() > deadline:
            raise LostRank(f"{ranks_in_words(missing)} did not start within backend.timeout; its own log says why")
        time.sleep(POLL)


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
    if "NCCL" in said and not re.search("time(d )?out|ncclRemoteError", said, re.IGNORECASE):
        return f"NCCL failed: {said.strip().splitlines()[-1]} (NCCL_DEBUG=INFO says more)"
    if not re.search("time(d )?out", said, re.IGNORECASE):
        return "another rank's connection closed: it crashed or was killed; its own message, or torchrun's, says why"
    silent = roll_call(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return (
        f"no answer within backend.timeout = {timeout:g} s; {ranks_in_words(silent) or 'some rank'} hangs, or its node "
        f"is gone (if it is only slow, raise backend.timeout)"
    )


def ranks_in_words(ranks: set[int]) -> str:
    return " and ".join(f"rank {rank}" for rank in sorted(ranks))


def roll_call(rank: int, world: int) -> set[int]:
    """The ranks that do not answer within ROLL_CALL seconds; none where the store itself does not answer."""
    silent: set[int] = set()

    def call() -> None:
        with suppress(RuntimeError, ValueError):
            store = distributed_c10d._get_default_store()
            store.set(f"alive/{rank}", "")
            time.sleep(ROLL_CALL)
            silent.update(number for number in range(world) if not store.check([f"alive/{number}"]))

    caller = Thread(target=call, daemon=True)  # may wait for ever for a store on a node that is gone
    caller.start()
    caller.join(2 * ROLL_CALL)
    return silent
