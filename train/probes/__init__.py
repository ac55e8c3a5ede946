"""Probes: what a model can do, measured while it trains. Adding one is adding a file."""

import importlib
import pkgutil

from thriftlab.train.probes.base import PROBES, measured

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["PROBES", "measured"]
