"""What sharding costs, for docs/scale-out.md.

python -m tests.measure.price_zero model        bytes and seconds of a step on many GPUs, from planned exchanges
python -m tests.measure.price_zero METHOD ...   step time of each stage on two ranks here, over that of DDP
"""

import argparse
import statistics
import time

import torch

from tests.tools import gang
from thriftlab.data.loader import Batch
from thriftlab.optim import METHODS, Muon, split_groups
from thriftlab.optim.core.fragments import Fragment
from thriftlab.train.backends import make_backend
from thriftlab.train.backends.ddp import DDP
from thriftlab.train.backends.zero.engine import DeepSpeed, engine_settings
from thriftlab.train.backends.zero.exchange import make_ownership
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.step import train_step

# ------------------------------------------------------------------------------------------------------- many GPUs

FLOPS, MFU, RULE_MFU = 989e12, 0.4, 0.4  # H100 SXM in bf16, dense; what a step and what a matrix rule reach of it
NODE, NVLINK, NETWORK, REACHED = 8, 450e9, 400e9 / 8, 0.8  # GPUs; bytes/s of one GPU each way; what collectives reach
TOKENS = 16384  # of one GPU and step
WORD = 4  # bytes: weights and gradients travel in fp32


def cut(shapes, world, one_by_one):
    """What each rank holds: every tensor cut by itself (ZeRO-3), or all in a row (ZeRO-1 and -2)."""
    held = [[] for _ in range(world)]
    part = -(-sum(shape.numel() for shape in shapes.values()) // world)
    at = 0
    for name, shape in shapes.items():
        n = shape.numel()
        low, step = (0, -(-n // world)) if one_by_one else (at, part)
        for rank in range(low // step, min((low + n - 1) // step, world - 1) + 1):
            start, stop = max(rank * step - low, 0), min((rank + 1) * step - low, n)
            if start < stop:
                held[rank].append(Fragment(name, tuple(shape), start, stop))
        at += n
    return held


def newton_schulz(shape):
    m, n = sorted(shape)
    return 5 * (4 * m * m * n + 2 * m**3)


def price(model, method, world, stage):
    shapes = {name: p.shape for name, p in model.named_parameters()}
    group_of = {name: group for group in method.param_groups for name in group["names"]}
    tensors = {n: p for group in method.param_groups for n, p in zip(group["names"], group["params"], strict=True)}
    by_entry = {name: method.elementwise(tuple(shape), group_of[name]) for name, shape in shapes.items()}
    costs = {name: method.cost(name, tensors[name], group_of[name]) for name in shapes}
    held = cut(shapes, world, one_by_one=stage == 3)
    plan = make_ownership(held, by_entry, costs)
    exchanged = max(plan.sent(rank) for rank in range(world)) * WORD
    rules = [0] * world
    for rank, fragments in enumerate(held):
        for f in fragments:
            if not by_entry[f.name] and plan.owner.get(f.name, rank) == rank:
                rules[rank] += newton_schulz(f.shape)
    size = sum(shape.numel() for shape in shapes.values())
    zero = 3 * size * WORD * (world - 1) / world
    link = (NVLINK if world <= NODE else NETWORK) * REACHED
    compute = 6 * size * TOKENS / (FLOPS * MFU)
    every = sum(newton_schulz(shape) for name, shape in shapes.items() if not by_entry[name])
    return (
        zero,
        exchanged,
        compute,
        zero / link,
        exchanged / link,
        *(x / (FLOPS * RULE_MFU) for x in (max(rules), every)),
    )


def model_of_time():
    print(
        f"Assumed: {TOKENS:,} tokens per GPU and step; {FLOPS / 1e12:.0f} TFLOP/s, of which a step reaches {MFU:.0%}, "
        f"a rule {RULE_MFU:.0%};\nwithin a node of {NODE} {NVLINK / 1e9:.0f} GB/s per GPU, between nodes "
        f"{NETWORK / 1e9:.0f} GB/s (400 Gb/s), of which collectives reach {REACHED:.0%};\nfp32 on the wire; nothing "
        f"overlaps; the busiest rank counts.\n"
    )
    print("| Muon | GPUs | stage | ZeRO, GB | exchange, GB | of ZeRO's | model, s | ZeRO, s | exchange, s | rule, s "
          "| rule on all, s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for preset in ("llama-1b", "llama-7b"):
        with torch.device("meta"):
            model = GPT(ModelConfig(preset=preset))
        method = Muon(split_groups(model, include=[r"\.(attn|mlp)\."]))
        for world in (8, 64, 512):
            for stage in (1, 3):
                zero, sent, compute, *seconds, rule, unsharded = price(model, method, world, stage)
                cells = [f"{zero / 1e9:.1f}", f"{sent / 1e9:.3f}", f"{sent / zero:.1%}", f"{compute:.2f}"]
                cells += [*(f"{s:.3f}" for s in seconds), f"{rule:.3f}", f"{unsharded:.3f}"]
                print(f"| {preset} | {world} | {stage} | {' | '.join(cells)} |", flush=True)


# -------------------------------------------------------------------------------------------------------------- here

SIZES = ModelConfig(preset=None, dim=256, layers=4, heads=4, hidden=704, vocab_size=2048)
ROWS, LENGTH, ROUNDS = 4, 256, 6


class Theirs(DeepSpeed):
    """DeepSpeed as it is by itself, with torch's AdamW and clipping of its own."""

    def prepare(self, model, optimizer, compiled=False, precision="fp32"):
        import deepspeed

        config = engine_settings(self.stage, precision) | {"gradient_clipping": 1.0}
        config["zero_optimization"] = {"stage": self.stage}
        own = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        self.module = self.engine = deepspeed.initialize(model=model, optimizer=own, config=config)[0]

    def step(self, scale, max_norm):
        self.engine.step()
        return 0.0, True


def beside_ddp(methods):
    """Medians over rounds of each stage's step time over DDP's; steps take turns."""
    zero, ratios = make_backend("deepspeed"), {}
    tokens = torch.randint(SIZES.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(zero.rank))
    batch = Batch(tokens, torch.zeros(ROWS), torch.arange(ROWS))

    def make(backend, hyper):
        torch.manual_seed(0)
        model = GPT(SIZES)
        model.init_weights(0)
        groups = split_groups(model, include=[r"\.(attn|mlp)\."])
        hyper = dict(hyper)
        method = METHODS[hyper.pop("name")](groups, **hyper)
        backend.prepare(model, method)
        return backend

    def copy(kind, **changes):
        other = object.__new__(kind)
        other.__dict__.update({**zero.__dict__, **changes})
        return other

    for label, hyper in methods.items():
        runs = {"ddp": make(copy(DDP), hyper)}
        kind = Theirs if label == OWN else DeepSpeed
        runs |= {stage: make(copy(kind, stage=stage), hyper) for stage in range(4)}
        times = {name: [] for name in runs}
        for _ in range(ROUNDS + 2):
            for name, backend in runs.items():
                zero.sum(torch.zeros(1))
                clock = time.perf_counter()
                train_step(backend, batch, None, 2, "fp32", 1.0)
                zero.sum(torch.zeros(1))
                times[name].append(time.perf_counter() - clock)
        pairs = {s: [a / b for a, b in zip(times[s][2:], times["ddp"][2:], strict=True)] for s in range(4)}
        ratios[label] = statistics.median(times["ddp"][2:]), {s: statistics.median(some) for s, some in pairs.items()}
    zero.close()
    return ratios


OWN = "DeepSpeed's own"
HYPER = {
    OWN: {"name": "adamw"},
    "adamw": {"name": "adamw"},
    "frugal blocks": {"name": "frugal"},
    "frugal columns": {"name": "frugal", "subspace": "columns"},
    "frugal coordinates": {"name": "frugal", "subspace": "coordinates"},
    "galore": {"name": "galore", "rank": 32},
    "muon": {"name": "muon", "iteration": "fp32"},
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["model", *HYPER])
    asked = parser.parse_args().what
    if asked == ["model"]:
        model_of_time()
    else:
        results = gang.ranks(2, beside_ddp, {name: HYPER[name] for name in asked})[0]
        print("| 2 ranks | DDP, ms | stage 0 | 1 | 2 | 3 |\n|---|---|---|---|---|---|")
        for name, (ddp, ratios) in results.items():
            print(f"| {name} | {1000 * ddp:.0f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios.values())} |")
