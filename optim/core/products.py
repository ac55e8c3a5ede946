"""Products of fp32 matrices in fp32, whatever the model around is allowed.

A model may have its products in TF32, with 10 bits of a factor. A basis, a Gram matrix or a merged weight may not: what
is wrong in its last bits stays wrong for all steps to come. The coordinates of one gradient, and the step that is made
of them, are as rough as the gradient is: in a plain step they are made as the model's products are.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

EXACT = "highest"  # torch's word
around = EXACT  # what holds around `exact_products`, while that is at work


def exact_products() -> AbstractContextManager:
    """Around products that are to be in fp32. A compiler that is at work goes on with what it found before."""
    if torch.compiler.is_compiling() or torch.get_float32_matmul_precision() == EXACT:
        return nullcontext()
    return made_exact()


def model_products() -> AbstractContextManager:
    """Within `exact_products`, around products that may be as the model's are."""
    return nullcontext() if torch.compiler.is_compiling() or around == EXACT else made(around)


@contextmanager
def made_exact() -> Iterator[None]:
    global around
    around = torch.get_float32_matmul_precision()
    try:
        with made(EXACT):
            yield
    finally:
        around = EXACT


@contextmanager
def made(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
