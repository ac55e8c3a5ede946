"""Products of fp32 matrices in fp32, whatever the model around is allowed.

A model may have its products in TF32, with 10 bits of a factor. A basis, a Gram matrix or a merged weight may not: what
is wrong in its last bits stays wrong for all steps to come.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

EXACT = "highest"  # torch's word


def exact_products() -> AbstractContextManager:
    """Around products that are to be in fp32. A compiler that is at work goes on with what it found before."""
    if torch.compiler.is_compiling() or torch.get_float32_matmul_precision() == EXACT:
        return nullcontext()
    return made_exact()


@contextmanager
def made_exact() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(EXACT)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
