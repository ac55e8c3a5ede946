"""Update rules and layers, usable in anyone's loop: ordinary `torch.optim.Optimizer`s and `nn.Module`s.

A file in this folder is an update rule, a file in layers/ is a layer method, and adding one is adding a file: every
file is imported, and registers what it defines. core/ is what rules are made of, state/ is what they keep.
"""

import importlib
import pkgutil
import sys
from typing import NoReturn

from thriftlab.optim import layers
from thriftlab.optim.adam_mini import AdamMini
from thriftlab.optim.adamw import AdamW
from thriftlab.optim.apollo import Apollo
from thriftlab.optim.badam import BAdam
from thriftlab.optim.conda import Conda
from thriftlab.optim.core.bill import predicted_state_bytes, state_bytes
from thriftlab.optim.core.groups import split_groups
from thriftlab.optim.core.hyper import BelowOne, Betas, Search
from thriftlab.optim.core.listing import left_to_adamw
from thriftlab.optim.core.method import METHODS, Method
from thriftlab.optim.core.split import SplitOptimizer
from thriftlab.optim.dion2 import Dion2
from thriftlab.optim.fira import Fira
from thriftlab.optim.frugal import Frugal
from thriftlab.optim.galore import GaLore
from thriftlab.optim.layers.base import LAYERS, Conversion, Dense, Layer, convert
from thriftlab.optim.layers.cola import CoLA
from thriftlab.optim.layers.lost import LostLinear, convert_lost
from thriftlab.optim.layers.lowrank import LowRank
from thriftlab.optim.layers.relora import LoRA, ReLoRA
from thriftlab.optim.layers.sltrain import SLTrain
from thriftlab.optim.muon import Muon
from thriftlab.optim.normuon import NorMuon
from thriftlab.optim.rmnp import RMNP
from thriftlab.optim.scale import Scale
from thriftlab.optim.signsgd import SignSGD
from thriftlab.optim.sinkgd import SinkGD
from thriftlab.optim.soap import SOAP
from thriftlab.optim.stable_spam import StableSPAM
from thriftlab.optim.state.keys import Spec, State, keyed_generator
from thriftlab.optim.state.subspaces import Subspace
from thriftlab.optim.subtrack import SubTrack

__all__ = [
    "LAYERS", "METHODS", "RMNP", "AdamMini", "AdamW", "Apollo", "BAdam", "BelowOne", "Betas", "CoLA", "Conda",
    "Conversion", "Dense", "Dion2", "Fira", "Frugal", "GaLore", "Layer", "LoRA", "LostLinear", "LowRank", "Method",
    "Muon", "NorMuon", "ReLoRA", "SLTrain", "SOAP", "Scale", "Search", "SignSGD", "SinkGD", "Spec",
    "SplitOptimizer", "StableSPAM", "State", "SubTrack", "Subspace", "convert", "convert_lost", "keyed_generator",
    "left_to_adamw", "predicted_state_bytes", "split_groups", "state_bytes",
]  # fmt: skip

for _package in (sys.modules[__name__], layers):
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)


class _NoSuchModule:
    """The last finder of modules: says where the names of a module are that is not, or no longer, in this package."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> NoReturn | None:
        if not name.startswith(f"{__name__}."):
            return None
        raise ModuleNotFoundError(
            f"there is no module {name}; import public names from {__name__} itself: from {__name__} import Method",
            name=name,
        )


sys.meta_path.append(_NoSuchModule)  # type: ignore[arg-type]
