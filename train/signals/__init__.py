"""Signals: how much the loss of each token counts. Adding one is adding a file."""

import importlib
import pkgutil

from thriftlab.train.signals.base import SIGNALS, Signal
from thriftlab.train.signals.reweight import loss_weights

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SIGNALS", "Signal", "loss_weights"]
