"""Functions that ask the host on their way, in step with each other, so that they ask together.

Such a function is a generator. It yields what it cannot go on without, is sent the answer, and returns its result:

    yield EIGEN, matrix     eigenvalues and eigenvectors of a symmetric matrix
    yield SINGULAR, matrix  its thin singular value decomposition
    yield READ, tensor      the numbers, on the host

The host waits for a device at each of these: torch looks whether a decomposition went well. So of many matrices those
that are decomposed at once are one wait.
"""

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

EIGEN, SINGULAR, READ = "eigen", "singular", "read"
Asking = Generator[tuple[str, Tensor], Any, Any]


def in_step(calls: list[Asking]) -> list[Any]:
    """What they return."""
    found: list[Any] = [None] * len(calls)
    answers: dict[int, Any] = dict.fromkeys(range(len(calls)))
    while answers:
        asked = {}
        for i, answer in answers.items():
            try:
                asked[i] = calls[i].send(answer)
            except StopIteration as end:
                found[i] = end.value
        answers = answered(asked)
    return found


def answered(asked: dict[int, tuple[str, Tensor]]) -> dict[int, Any]:
    """The answers to the questions, of which those that are alike are one for torch."""
    alike: dict[tuple, list[int]] = {}
    for i, (kind, tensor) in asked.items():
        alike.setdefault((kind,) if kind == READ else (kind, tensor.shape, tensor.dtype), []).append(i)
    answers: dict[int, Any] = {}
    for (kind, *_), places in alike.items():
        answers.update(zip(places, ANSWERS[kind]([asked[i][1] for i in places]), strict=True))
    return answers


def decomposed(decompose: Callable[[Tensor], Any], matrices: list[Tensor]) -> list[Any]:
    if len(matrices) == 1:
        return [decompose(matrices[0])]
    return list(zip(*(part.unbind() for part in decompose(torch.stack(matrices))), strict=True))


def read(tensors: list[Tensor]) -> list[Tensor]:
    if tensors[0].is_meta:
        return tensors
    if len(tensors) == 1:
        return [tensors[0].cpu()]
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


ANSWERS: dict[str, Callable[[list[Tensor]], list[Any]]] = {
    EIGEN: lambda matrices: decomposed(torch.linalg.eigh, matrices),
    SINGULAR: lambda matrices: decomposed(lambda matrix: torch.linalg.svd(matrix, full_matrices=False), matrices),
    READ: read,
}
