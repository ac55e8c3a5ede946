"""python -m thriftlab.launch.kernel_bits DEVICE FILE: what the fused step makes of fixed tensors, bit for bit.

Not for people: `thriftlab bench kernels` starts it, on a GPU and in triton's interpreter, and compares the files.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from thriftlab.kernels.dispatch import VARIABLE
from thriftlab.launch.peers import KERNEL_BITS
from thriftlab.optim import METHODS

SHAPES = ((16, 256), (5, 259), (37,))
STEPS = 3


def unlike(device: torch.device) -> list[str]:
    """The rules whose weights or moments differ between the device and the interpreter."""
    with tempfile.TemporaryDirectory(prefix="thriftlab-") as folder:
        files = [Path(folder) / name for name in ("device", "interpreter")]
        for file, where, interpreter in zip(files, (str(device), "cpu"), ("0", "1"), strict=True):
            environment = {**os.environ, VARIABLE: "triton", "TRITON_INTERPRET": interpreter}
            subprocess.run([sys.executable, "-m", __name__, where, str(file)], env=environment, check=True)
        one, two = (torch.load(file) for file in files)
    same = {rule: all(torch.equal(x, y) for x, y in zip(found, two[rule], strict=True)) for rule, found in one.items()}
    return [f"{rule}: the device's bits are not the interpreter's" for rule, yes in same.items() if not yes]


def bits(rule: str, device: torch.device) -> list[Tensor]:
    """Weights and state after some steps, as integers."""
    method, hyper = KERNEL_BITS[rule]
    draw = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=draw).to(device)) for shape in SHAPES]
    named = [(f"w{i}", weight) for i, weight in enumerate(weights)]
    optimizer = METHODS[method](named, lr=1e-2, weight_decay=0.1, **hyper)  # type: ignore[call-arg]
    for _ in range(STEPS):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=draw).to(device)
        optimizer.step()
    kept = [value for state in optimizer.state.values() for _, value in sorted(state.items()) if value.ndim]
    return [tensor.detach().cpu().contiguous().view(torch.uint8) for tensor in [*weights, *kept]]


def main(device: str, file: str) -> None:
    torch.save({rule: bits(rule, torch.device(device)) for rule in KERNEL_BITS}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
