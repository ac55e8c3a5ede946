"""Steps that are queued and whose numbers the host has not read. On a CPU there are none between two steps; on a GPU
there is one, so that the device has the next step to do while the host waits for the numbers of the last.

So all that looks at the numbers of a step, log, counters and the end of a run that diverges, does so one step late on a
GPU, and names the step that they are of. Before an evaluation or a checkpoint everything is read.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from thriftlab.data.errors import UserError
from thriftlab.train.backends.base import Backend
from thriftlab.train.build import Run
from thriftlab.train.late import Numbers, send
from thriftlab.train.log import Counters, Log
from thriftlab.train.step import result_of

WARM_STEPS = 2  # first steps of a process, left out of tokens/s: allocator, caches, compilation


class Unread:
    """Brings the numbers of each step to `counters` and `log`, in order.

    `asked` is what the ranks have asked for together, as of the last step that was read: `Objective.asked` summed.
    """

    def __init__(self, run: Run, counters: Counters, log: Log):
        self.run, self.counters, self.log, self.first = run, counters, log, counters.step
        self.kept = 0 if run.backend.device.type == "cpu" else 1
        self.queued: deque[tuple[Callable[[], Numbers], float]] = deque()
        self.seconds = 0.0  # spent since numbers were read
        self.asked: list[float] = []

    def add(self, numbers: Numbers, lr: float, clock: float) -> None:
        """A step that was begun at `clock` is queued."""
        self.queued.append((send(numbers), lr))
        if len(self.queued) > self.kept:
            self.read(clock)
        else:
            self.seconds += time.perf_counter() - clock

    def read_all(self) -> None:
        while self.queued:
            self.read(time.perf_counter())

    def read(self, clock: float) -> None:
        """The oldest step. The time since `clock` is its own, and what was spent before while nothing was read."""
        receive, lr = self.queued.popleft()
        result = result_of(self.run.backend, receive())
        seconds, self.seconds = self.seconds + time.perf_counter() - clock, 0.0
        self.counters.add(result, seconds, timed=self.counters.step - self.first >= WARM_STEPS)
        self.asked = result.asked or []
        self.log.step(result, lr, seconds)
        refuse_divergence(self.counters, self.run.config.train.max_skipped_steps)


def refuse_divergence(counters: Counters, most: int) -> None:
    if counters.skipped_in_a_row >= most:
        raise UserError(
            f"loss or gradient was not finite in the {counters.skipped_in_a_row} steps up to step {counters.step}, and "
            f"nothing was updated in them; lower optim.lr, set train.clip=1.0, or use train.precision=fp32"
        )


def agree(backend: Backend, halt: bool, seconds: float, answered: Sequence[float] = ()) -> tuple[bool, float]:
    """One answer for all ranks: whether any of them was asked to stop, and the first rank's clock. `answered`: what the
    GPUs have summed already, with a step (`asks`), so that nobody waits for them."""
    if backend.world == 1:
        return halt, seconds
    if not answered:
        clock = seconds if backend.rank == 0 else 0.0
        answered = backend.sum(torch.tensor([halt, clock], dtype=torch.float64, device=backend.device)).tolist()
    halts, clock = answered
    return halts > 0, clock


def asks(backend: Backend, halt: bool, seconds: float) -> tuple[float, ...]:
    """What several GPUs sum with their step, to `agree` later; nothing on CPUs, which agree before it."""
    if backend.world == 1 or backend.device.type == "cpu":
        return ()
    return float(halt), seconds if backend.rank == 0 else 0.0
