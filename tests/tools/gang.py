"""Processes for tests: ranks that talk through gloo, and victims to kill; forked from one that has imported torch."""

import gc
import multiprocessing
import os
import socket
import traceback
from collections import deque

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.tools.preload"])


def start(function, *arguments, **environment):
    """A process that runs function(*arguments); its result, or its traceback, comes through the returned pipe."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, environment, function, arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def ranks(world, function, *arguments):
    """Results of function(*arguments) on `world` ranks, in order."""
    port = free_port()
    group = [
        start(
            function,
            *arguments,
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=world,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(world)
    ]
    results = [pipe.recv() for _, pipe in group]
    for process, _ in group:
        process.join(60)
    failures = [result for result in results if isinstance(result, Failure)]
    assert not failures, failures[0].text
    return results


def free_port():
    """A port that no other process is given before somebody listens on it: that may be on an address in use if both
    sides allow it, as torch and SLURM do."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    held.append(holder)
    return holder.getsockname()[1]


held = deque(maxlen=64)


class Failure:
    def __init__(self, text):
        self.text = text


def _work(pipe, environment, function, arguments):
    import torch

    gc.freeze()  # a million objects of imported modules, which every full collection would walk through
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    try:
        pipe.send(function(*arguments))
    except BaseException:
        pipe.send(Failure(traceback.format_exc()))


class Forked:
    """Stands in for `subprocess.Popen` of a study: the same command and log, without the seconds that torch takes."""

    def __init__(self, command, stdout, env, **_):
        self.process, self.answer = start(_command, command[3:], stdout.name, **env)
        self.pid, self.returncode = self.process.pid, None

    def poll(self):
        if self.returncode is None and self.answer.poll():
            self.returncode = self.answer.recv()
            self.process.join()
        return self.returncode


def _command(words, log):
    from thriftlab.launch import cli

    os.setsid()
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        return cli.main(words)
    except Exception:
        traceback.print_exc()
        return 1
