"""The section `optim`: which method, and whose rule each kind of tensor has; the rest is the method's own."""

from typing import Annotated

from pydantic import Field

from thriftlab.optim.core.hyper import Later
from thriftlab.optim.core.tables import Tables
from thriftlab.train.config.choice import Choice, Pattern


class OptimConfig(Choice):
    """The method, and the parameters that it treats as matrices."""

    include: tuple[Pattern, ...] = Field(
        (r"\.(attn|mlp)\.",), description="regular expressions: matrices with a matching name are split by the method"
    )
    exclude: tuple[Pattern, ...] = Field((), description="regular expressions: names that are never split")
    tables: Annotated[Tables | None, Later()] = Field(
        None,
        description="who steps embedding and head: one rule for any method, 8bit with its state in 8 bits; own: the "
        "method itself, as it steps matrices; null: what the method does by itself",
    )
    row_floor: Annotated[float, Later()] = Field(
        0.0, ge=0, le=1, description="tables=ember: least mean square of a row, as a share of the table's"
    )
