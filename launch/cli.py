"""thriftlab COMMAND: finds the command, shows help, and turns errors into one line and an exit code.

The commands are declared in commands.py.
"""

import difflib
import signal
import sys
import warnings
from collections.abc import Sequence

from thriftlab.launch.commands import COMMANDS, Command
from thriftlab.launch.messages import (
    fail,
    is_message,
    missing_extra,
    no_room_or_right,
    one_line,
    print_anything,
    readers_left,
    tell_torchrun,
)

HELP_FLAGS = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 2 for what the user can correct, 128 + n after signal n."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    warnings.formatwarning = one_line
    print_anything()
    try:
        if name in HELP_FLAGS:
            print(overview())
        elif name not in COMMANDS:
            near = difflib.get_close_matches(name, shown(), 1) or shown()
            return fail(f"unknown command {name!r}; did you mean {' or '.join(near)}?")
        elif not set(HELP_FLAGS).isdisjoint(rest):
            print(COMMANDS[name].help([word for word in rest if word not in HELP_FLAGS]))
        else:
            if COMMANDS[name].alone:
                from thriftlab.train.backends.environment import refuse_ranks

                refuse_ranks(name)
            COMMANDS[name].run(rest)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and readers_left():
            return 128 + signal.SIGPIPE
        message = missing_extra(error) or (str(error) if is_message(error) else no_room_or_right(error))
        if message is None:
            tell_torchrun(f"{type(error).__name__}: {error} (its traceback is above)")
            raise
        tell_torchrun(message)
        return fail(message, getattr(error, "code", 2))
    return 0


def shown() -> dict[str, Command]:
    return {name: command for name, command in COMMANDS.items() if not command.hidden}


def overview() -> str:
    usages = "\n\n".join(command.usage for command in shown().values())
    return (
        f"thriftlab: which pretraining method pays, under your budget?\n\n{usages}\n\n"
        f"thriftlab COMMAND --help lists the keys of a command."
    )
