"""How much work the host has, by the number of calls that Python makes: the same on every machine."""

import sys


def calls_of(function) -> int:
    """Calls of Python's and of C's functions, once the function has run before and everything is made."""
    function()
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count
