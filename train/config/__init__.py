"""The configuration of a run: `RunConfig(optim={"name": ...})`, or `load(RunConfig, ["--config", "run.yaml"])`."""

from thriftlab.train.config.parse import load
from thriftlab.train.config.schema import RunConfig

__all__ = ["RunConfig", "load"]
