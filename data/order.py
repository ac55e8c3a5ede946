"""The order of everything: a keyed bijection on [0, n), computed at a point and never stored.

A six-round Feistel cipher over the smallest even number of bits that holds n, walked until it lands below n
(cycle-walking: Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). The round function is the finaliser of
splitmix64 (Steele, Lea & Flood 2014). The surprise: unlike a shuffled array it needs no memory, and no library's random
generator decides what "seed 0" means, so an order published today is the same order on every machine and version.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: splitmix64's increment
ROUNDS = 6

Cipher = Callable[[NDArray[np.uint64], NDArray[np.uint64], int], NDArray[np.uint64]]


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64, a bijection on 64-bit words; arithmetic is modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def round_keys(seed: int, epoch: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Keys of the six rounds, [ROUNDS, len(epoch)]."""
    start = np.array([seed * int(GOLDEN) % 2**64], np.uint64)
    rounds = np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None]
    return mix64(mix64(start + epoch) + rounds * GOLDEN)


def feistel(x: NDArray[np.uint64], keys: NDArray[np.uint64], half: int) -> NDArray[np.uint64]:
    """Encrypt words of 2 * half bits, element i under keys[:, i]."""
    width, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> width, x & mask
    for key in keys:
        left, right = right, left ^ (mix64(right ^ key) & mask)
    return (left << width) | right


def decrypt(x: NDArray[np.uint64], keys: NDArray[np.uint64], half: int) -> NDArray[np.uint64]:
    """The inverse of `feistel`."""
    width, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> width, x & mask
    for key in keys[::-1]:
        left, right = right ^ (mix64(left ^ key) & mask), left
    return (left << width) | right


def permute(index: ArrayLike, n: int, seed: int, epoch: ArrayLike) -> NDArray[np.int64]:
    """Where positions `index` of epoch `epoch` point: a bijection on [0, n) for every (seed, epoch).

    `index` and `epoch` are integers or integer arrays that broadcast, 0 <= index < n; returns int64 of their shape.
    """
    return walk(feistel, index, n, seed, epoch)


def unpermute(row: ArrayLike, n: int, seed: int, epoch: ArrayLike) -> NDArray[np.int64]:
    """The inverse of `permute`: the positions of epoch `epoch` that point to rows `row`."""
    return walk(decrypt, row, n, seed, epoch)


def walk(cipher: Cipher, word: ArrayLike, n: int, seed: int, epoch: ArrayLike) -> NDArray[np.int64]:
    """The cipher, again and again until it lands below n."""
    word, epoch = np.broadcast_arrays(np.asarray(word, np.uint64), np.asarray(epoch, np.uint64))
    half = (max(2, (n - 1).bit_length()) + 1) // 2
    keys = round_keys(seed, epoch.ravel())
    found = cipher(word.ravel(), keys, half)
    outside = np.flatnonzero(found >= n)
    while outside.size:
        found[outside] = cipher(found[outside], keys[:, outside], half)
        outside = outside[found[outside] >= n]
    return found.reshape(word.shape).astype(np.int64)


def stream(start: int, count: int, n: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draws start, ..., start + count - 1 of the endless stream that passes over [0, n) once per epoch.

    Returns (epoch, row), int64 [count] each.
    """
    epoch, index = np.divmod(np.arange(start, start + count, dtype=np.int64), n)
    return epoch, permute(index, n, seed, epoch)
