"""What a state is, and randomness that is a function of (seed, name, count): of the run, the tensor, the refresh.

Nothing is drawn from a generator that goes on. So a draw does not depend on the order of tensors, on the number of
ranks or on a resume.
"""

import hashlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

State = dict[str, Tensor]  # of one parameter
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shapes and dtypes of a state


def has_data(tensor: Tensor) -> bool:
    """Whether there is anything to read or to point to: not in meta and fake tensors, and not in empty ones."""
    return tensor.numel() > 0 and not tensor.is_meta and not isinstance(tensor, FakeTensor)


def spec_bytes(spec: Spec) -> int:
    """Bytes of a state that is declared so, 0-dim counters apart."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in spec.values() if shape)


def keyed_seed(seed: int, name: str, count: int) -> int:
    """63 bits that are a function of (seed, name, count)."""
    digest = hashlib.blake2b(f"{seed}/{count}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, name: str, count: int) -> torch.Generator:
    """A CPU generator that is a function of (seed, name, count)."""
    return torch.Generator().manual_seed(keyed_seed(seed, name, count))


def hash63(x: Tensor) -> Tensor:
    """Scrambles int64 to 63 well-mixed bits."""
    return mix64_(x.clone()).bitwise_and_((1 << 63) - 1)


def mix64_(x: Tensor) -> Tensor:
    """Scrambles int64 in place to 64 well-mixed bits: the finaliser of splitmix64, in wrapping arithmetic."""
    x = _mixed(x, 30).mul_(-0x40A7B892E31B1A47)
    x = _mixed(x, 27).mul_(-0x6B2FB644ECCEEE15)
    return _mixed(x, 31)


def _mixed(x: Tensor, shift: int) -> Tensor:
    """x xor (x >> shift), in place; the shift fills up with zeros, also below a sign."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << 64 - shift) - 1))
