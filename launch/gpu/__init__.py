"""Checks of this package on a GPU: check.py runs them, machine.py to runs.py are what they do."""
