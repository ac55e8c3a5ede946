"""How far a run is: a bar on a terminal, a line every ten seconds in a log file."""

import sys
import time

from tqdm import tqdm

LOG_SECONDS = 10.0


class Progress:
    """Counts tokens towards `total` (None: unknown); shows tokens/s, the latest loss and the time left."""

    def __init__(self, total: int | None, done: int, label: str, shown: bool = True):
        self.lines = shown and not sys.stderr.isatty()
        self.next_line = 0.0
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit="tok",
            unit_scale=True,
            disable=not shown,
            dynamic_ncols=True,
            file=Silence() if self.lines else sys.stderr,
        )

    def update(self, done: int, loss: float | None) -> None:
        if loss is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.bar.update(done - self.bar.n)
        if self.lines and time.monotonic() >= self.next_line:
            self.line()

    def line(self) -> None:
        print(str(self.bar), file=sys.stderr, flush=True)
        self.next_line = time.monotonic() + LOG_SECONDS

    def close(self) -> None:
        if self.lines:
            self.line()
        self.bar.close()


class Silence:
    """Where a bar is drawn that is printed line by line."""

    def write(self, _: str) -> None: ...

    def flush(self) -> None: ...
