"""Tokens per CPU second of the loader beside nanoGPT's way of reading, from one memory-mapped shard, on one thread.

    OMP_NUM_THREADS=1 python -m tests.measure.bench_loader

nanoGPT (Karpathy) draws a random offset per row, opens the map for every batch, and converts and stacks row by row.
Both give int64 tensors of the same shape. Pages are in the cache; CPU time is the process's, all threads together.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from thriftlab.data import load_tokenizer, open_dataset, plan, write_manifest, write_shards, write_tokenizer
from thriftlab.data.loader import gather


def prepare(folder: Path, tokens: int) -> Path:
    """Random ids in one shard, returned with the manifest in place."""
    tokenizer = load_tokenizer("bytes")
    document = np.random.default_rng(0).integers(0, 256, 2**20)
    document[0] = tokenizer.delimiter
    count = -(-tokens // len(document))
    documents = ((document, len(document) - 1) for _ in range(count))
    split = {
        "train": write_shards(folder, "random", "train", documents, "uint16"),
        "validation": write_shards(folder, "random", "validation", [], "uint16"),
    }
    entry = write_tokenizer(folder, tokenizer)
    write_manifest(folder, {"tokenizer": entry, "dtype": "uint16", "sources": {"random": split}})
    return folder / split["train"]["shards"][0]["file"]


def random_offsets(shard: Path, sequence_length: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = np.memmap(shard, np.uint16, mode="r")
    starts = torch.randint(len(data) - sequence_length, (batch_size,))
    rows = [torch.from_numpy(data[i : i + sequence_length].astype(np.int64)) for i in starts]
    shifted = [torch.from_numpy(data[i + 1 : i + 1 + sequence_length].astype(np.int64)) for i in starts]
    return torch.stack(rows), torch.stack(shifted)


def measure(read: Callable[[int], object], tokens_per_step: int, seconds: float) -> float:
    """Tokens per CPU second, after a warm-up as long as a fifth of the measurement."""
    for limit in (seconds / 5, seconds):
        start, steps = time.process_time(), 0
        while time.process_time() - start < limit:
            read(steps)
            steps += 1
        rate = steps * tokens_per_step / (time.process_time() - start)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60_000_000)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        shard = prepare(Path(name), options.tokens)
        dataset = open_dataset(name)
        np.fromfile(shard, np.uint16).sum()  # into the page cache
        print(f"{shard.stat().st_size // 2:,} tokens in one shard; million tokens per CPU second")
        print("sequence  batch  thriftlab  nanoGPT's way")
        for length, batch in ((1024, 16), (1024, 64), (256, 32), (256, 128)):
            p = plan(dataset, length, batch, seed=0)
            ours = measure(lambda step, p=p: gather(p, step), length * batch, options.seconds)
            other = measure(lambda _, s=(length, batch): random_offsets(shard, *s), length * batch, options.seconds)
            print(f"{length:8}  {batch:5}  {ours / 1e6:9.0f}  {other / 1e6:13.0f}")


if __name__ == "__main__":
    main()
