"""Waiting for what happens, not for the clock: on a fast machine it may be over by then, on a busy one not begun."""

import time
from pathlib import Path

PATIENCE = 600  # seconds after which something is broken, and not only slow

PLUGIN = """
import os, signal, time
from pathlib import Path
from thriftlab.train import loop
from thriftlab.train.records import stop

plain, steps = loop.one_step, iter(range(1, {step} + 1))

def before():
{lines}

def one_step(*parts):
    if next(steps, None) == {step}:
        before()
    return plain(*parts)

if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank, and not who only reads the configuration
    loop.one_step = one_step
    stop.POLL_SECONDS = 0.0  # a STOP is seen before the next step
"""


def until(condition, process=None, pause=0.01):
    """Returns when the condition holds, or the process has ended."""
    end = time.monotonic() + PATIENCE
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < end, "it does not come"
        time.sleep(pause)


def before_step(file: Path, step: int, lines: str) -> str:
    """A plugin with which the ranks of torchrun execute these lines before a step, counted in each process from 1."""
    indented = "".join(f"    {line}\n" for line in lines.strip().splitlines())
    file.write_text(PLUGIN.format(step=step, lines=indented))
    return str(file)
