"""The refresh beside the SVD that it stands for: time and accuracy on gradients recorded from training.

    OMP_NUM_THREADS=1 python -m tests.measure.bench_refresh gradients.pt

Trains two layers of LLaMA-60M's width on made-up text for 200 steps and keeps the gradients of the last layer's
matrices in the file, or takes them from there. Each is decomposed in turn by `torch.linalg.svd` in float32 (what the
published codes call), by us, and by us from the basis of the recording before it. Truth is the SVD in float64.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from thriftlab.data import load_tokenizer
from thriftlab.data.corpora.synthetic import generate
from thriftlab.data.tokens import encode_document
from thriftlab.optim.state.dense import leading_vectors, tall_of
from thriftlab.train.model import GPT, ModelConfig

STEPS = (0, 10, 50, 100, 150, 200)
Gradients = dict[str, list[Tensor]]


def record(layers: int = 2, rows: int = 8, length: int = 128) -> Gradients:
    """Name of a matrix -> its gradients at STEPS."""
    tokenizer = load_tokenizer("bytes")
    texts = generate(documents=400, noise=0.05, domain=0, seed=1)
    tokens = np.concatenate([encode_document(tokenizer, text)[0] for text in texts]).astype(np.int64)
    model = GPT(ModelConfig(preset="llama-60m", layers=layers, vocab_size=tokenizer.vocab_size))
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    found: Gradients = defaultdict(list)
    for step in range(max(STEPS) + 1):
        starts = torch.randint(len(tokens) - length, (rows,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([torch.from_numpy(tokens[i : i + length + 1]) for i in starts])  # [batch, seq + 1]
        loss = model(batch[:, :-1], batch[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        if step in STEPS:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
            for name, p in model.layers[-1].named_parameters():
                if p.ndim == 2:
                    found[name].append(p.grad.clone())
        optimizer.step()
    return dict(found)


def seconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def errors(grad: Tensor, rank: int, basis: Tensor, resolved: float) -> tuple[float, float]:
    """(largest principal angle to the leading singular vectors, or 0 where they are not separate; energy missed)

    They are separate where sigma_rank >= 1.05 sigma_(rank+1) and sigma_rank >= resolved * sigma_1.
    """
    tall = tall_of(grad).double()
    _, values, rows = torch.linalg.svd(tall, full_matrices=False)
    want = rows[:rank].T
    missed = 1 - (tall @ basis).square().sum() / values[:rank].square().sum()
    separate = values[rank - 1] >= 1.05 * values[rank] and values[rank - 1] >= resolved * values[0]
    angle = torch.linalg.matrix_norm(basis - want @ (want.T @ basis), 2).asin() if separate else torch.zeros(())
    return angle.item(), missed.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.file.exists():
        torch.save(record(), options.file)
    gradients: Gradients = torch.load(options.file, weights_only=True)
    print("rank  shape        SVD ms   cold: times as fast, angle, energy missed    warm: the same")
    for rank in options.ranks:
        rows = defaultdict(lambda: {"svd": [], "cold": [], "warm": []})
        for grads in gradients.values():
            for last, grad in zip(grads, grads[1:], strict=False):
                start, row = leading_vectors(last, rank).float(), rows[tuple(grad.shape)]
                full, _ = seconds(lambda g=grad: torch.linalg.svd(g, full_matrices=False)[2])
                row["svd"].append((full,))
                for kind, where, resolved in (("cold", None, 1e-5), ("warm", start, 1e-3)):
                    took, basis = seconds(lambda g=grad, r=rank, s=where: leading_vectors(g, r, s))
                    row[kind].append((full / took, *errors(grad, rank, basis, resolved)))
        for shape, row in rows.items():
            cells = [f"{1e3 * median(t for (t,) in row['svd']):6.1f}"]
            for kind in ("cold", "warm"):
                ratios, angles, missed = zip(*row[kind], strict=True)
                spread = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                cells.append(f"{spread}, {max(angles):.0e}, {max(missed):.0e}")
            print(f"{rank:4}  {shape!s:12} {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
