"""How far a run is: a bar on a terminal, a line every ten seconds in a log file."""

import sys

from tqdm import tqdm

LOG_SECONDS = 10.0


class Progress:
    """Counts tokens towards `total` (None: unknown), shows tokens/s, loss and the time left."""

    def __init__(self, total: int | None, done: int, label: str, shown: bool = True):
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit="tok",
            unit_scale=True,
            disable=not shown,
            dynamic_ncols=terminal,
            ascii=None if terminal else True,
            mininterval=0.2 if terminal else LOG_SECONDS,
            file=sys.stderr,
        )

    def update(self, done: int, loss: float | None) -> None:
        if loss is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        self.bar.close()
