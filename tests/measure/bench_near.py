"""Cost of finding near duplicates, in CPU seconds of one thread.

    OMP_NUM_THREADS=1 python -m tests.measure.bench_near text [PLACE]     signatures: MB and documents per second
    OMP_NUM_THREADS=1 python -m tests.measure.bench_near pairs MILLIONS   edges and forest: seconds and memory

PLACE is what `inputs.NAME.path` takes, the embedded corpus unless given; the rates are the best of three passes, for
documents as they are and cut into pieces of 600 characters. Pairs are 14 a document, a fifth of the documents copies
that agree with another on 80 % of the bands. They are split into files by bucket, and grouped file by file.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from thriftlab.data.corpora.readers import read
from thriftlab.data.order import mix64
from thriftlab.data.prepare import minhash, near

T = TypeVar("T")
CUT, CHUNK, PARTS = 600, 1 << 14, 32  # characters; documents; files


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def text(place: str) -> None:
    whole = [document.text for document in read(place)]
    cut = [each[i : i + CUT] for each in whole for i in range(0, len(each), CUT)]
    size = sum(len(each.encode()) for each in whole)
    print(f"{size / 1e6:.1f} MB of {place}; of CPU time, one thread:")
    stages: dict[str, Callable[[Sequence[str]], object]] = {
        "words": minhash.word_hashes,
        "shingles": lambda texts: minhash.shingles(texts, 5),
        "signatures, 14x8": lambda texts: minhash.buckets_of(texts, near.banding()),
    }
    for name, texts in (("whole", whole), (f"{CUT} characters", cut)):
        batches = [texts[batch] for batch in minhash._batches(texts)]
        for stage, work in stages.items():
            best = min(seconds(lambda: [work(batch) for batch in batches]) for _ in range(3))  # noqa: B023
            print(f"{len(texts):7,} documents, {name:14}  {stage:16}  {size / best / 1e6:6.1f} MB/s  "
                  f"{len(texts) / best:9,.0f} documents/s")  # fmt: skip


def made_up(documents: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Buckets and numbers, [CHUNK * 14] each."""
    random, bands = np.random.default_rng(0), np.arange(14)
    for first in range(0, documents, CHUNK):
        number = np.arange(first, min(first + CHUNK, documents))
        copy = random.random(len(number)) < 0.2
        like = np.where(copy, random.integers(0, documents, len(number)), number)
        agrees = random.random((len(number), 14)) < 0.8
        seed = np.where(agrees, like[:, None], number[:, None] + documents) * 14 + bands
        yield mix64(seed.ravel().astype(np.uint64)), np.repeat(number, 14)


def pairs(millions: float) -> None:
    documents = round(millions * 1e6 / 14)
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name, str(part)) for part in range(PARTS)]
        for bucket, number in made_up(documents):
            part = bucket >> np.uint64(59)
            for p in range(PARTS):
                with open(files[p], "ab") as file:
                    np.stack([bucket, number.astype(np.uint64)], axis=1)[part == p].tofile(file)

        def group(file: Path) -> np.ndarray:
            bucket, number = np.fromfile(file, np.uint64).reshape(-1, 2).T
            rows = [np.zeros(len(bucket), np.int32), bucket.copy(), number.astype(np.int64)]
            return near.edges(pa.table(rows, schema=near.PAIRS))

        print(f"{documents * 14:,} pairs of {documents:,} documents in {PARTS} files")
        found = measured("edges of all files", lambda: [group(file) for file in files])
        forest = measured("their forest", lambda: near.forest(np.concatenate(found)))
        print(f"{sum(map(len, found)):,} edges, {len(forest):,} documents removed")


def measured(name: str, work: Callable[[], T]) -> T:
    """Memory is the process's peak above its peak so far."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    result = work()
    spent = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{name}: {spent:.2f} s, {peak / 1024:.0f} MiB")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("text", "pairs"))
    parser.add_argument("of", nargs="?", default="")
    options = parser.parse_args()
    if options.what == "text":
        text(options.of or "embedded")
    else:
        pairs(float(options.of or 3))


if __name__ == "__main__":
    main()
