"""A process that is killed at a change of files that is known beforehand, however fast the machine is."""

import os
import signal
import sys

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
WRITES = os.O_WRONLY | os.O_RDWR


def die_after(changes: int) -> None:
    """SIGKILL for this process in the place of the next change. What libraries write in C does not count."""
    left = iter(range(changes))

    def count(event, given):
        if (event in CHANGES or event == "open" and given[2] & WRITES) and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
