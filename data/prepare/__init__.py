"""Text to token shards: `prepare(PrepareConfig(out=..., inputs={"web": Input(path=...)}))`."""

from thriftlab.data.prepare.pipeline import prepare
from thriftlab.data.prepare.request import Input, PrepareConfig

__all__ = ["Input", "PrepareConfig", "prepare"]
