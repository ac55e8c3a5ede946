"""Runs of DeepSpeed's stages beside one process: what test_zero.py holds and what prove_zero.py prints."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from thriftlab.data.loader import Batch
from thriftlab.optim import (
    RMNP,
    SOAP,
    AdamMini,
    AdamW,
    Apollo,
    BAdam,
    Conda,
    Dion2,
    Fira,
    Frugal,
    GaLore,
    Muon,
    NorMuon,
    Scale,
    SignSGD,
    SinkGD,
    StableSPAM,
    SubTrack,
    split_groups,
    state_bytes,
)
from thriftlab.optim.layers.base import LAYERS, convert
from thriftlab.train.backends.base import Backend
from thriftlab.train.backends.channel import ALONE, Channel
from thriftlab.train.backends.pieces import whole
from thriftlab.train.backends.replicas import buffers, take_up_buffers
from thriftlab.train.checkpoints.reader import latest
from thriftlab.train.checkpoints.writer import Writer
from thriftlab.train.records.record import read_record
from thriftlab.train.step import train_step

ROWS, LENGTH, VOCABULARY = 12, 6, 29
METHODS = {
    "adamw": functools.partial(AdamW, lr=3e-3, weight_decay=0.1),
    "adamw, 8 bit": functools.partial(AdamW, lr=3e-3, state_dtype="8bit"),
    "adamw, bf16 state": functools.partial(AdamW, lr=3e-3, state_dtype="bf16"),
    "signsgd": functools.partial(SignSGD, lr=1e-3),
    "frugal blocks": functools.partial(Frugal, lr=3e-3, gap=7, density=0.5),
    "frugal columns": functools.partial(Frugal, lr=3e-3, gap=7, subspace="columns", density=0.3),
    "frugal rows": functools.partial(Frugal, lr=3e-3, gap=7, subspace="rows", density=0.3, on_refresh="project"),
    "frugal coordinates": functools.partial(Frugal, lr=3e-3, gap=7, subspace="coordinates", density=0.3),
    "frugal columns, keep": functools.partial(Frugal, lr=3e-3, gap=7, subspace="columns", on_refresh="keep"),
    "frugal svd": functools.partial(Frugal, lr=3e-3, gap=7, subspace="svd", density=0.4),
    "galore": functools.partial(GaLore, lr=3e-3, gap=7, rank=4),
    "fira": functools.partial(Fira, lr=3e-3, gap=7, rank=4),
    "subtrack": functools.partial(SubTrack, lr=3e-3, gap=7, rank=4, step_size=1.0),
    "apollo": functools.partial(Apollo, lr=3e-3, gap=7, rank=4),
    "badam": functools.partial(BAdam, lr=3e-3, gap=7, density=0.5, unit="tensor"),
    "muon": functools.partial(Muon, lr=3e-3, iteration="fp32"),
    "scale": functools.partial(Scale, lr=3e-3, length="rms"),
    "rmnp": functools.partial(RMNP, lr=3e-3, nesterov=True, tables="own"),
    "sinkgd": functools.partial(SinkGD, lr=3e-3),
    "tables by ember": functools.partial(Frugal, lr=3e-3, gap=4, rule="lion", plain="rule", tables="ember"),
    "swan": functools.partial(SinkGD, lr=3e-3, whiten=True),
    "adam mini": functools.partial(AdamMini, lr=3e-3, weight_decay=0.1, heads=("up",), head_dim=41),
    "normuon": functools.partial(NorMuon, lr=3e-3, iteration="fp32"),
    "stable_spam": functools.partial(StableSPAM, lr=3e-3, gap=5),
    "soap": functools.partial(SOAP, lr=3e-3, gap=5, max_precond_dim=50),
    "conda": functools.partial(Conda, lr=3e-3, gap=7),
    "dion2": functools.partial(Dion2, lr=3e-3, iteration="fp32"),
    "muon, bf16 iteration": functools.partial(Muon, lr=3e-3),
}
MATRICES = [r"up|gate|mix|down"]


class Net(nn.Module):
    """Odd sizes, a tied embedding, and matrices that are longer than a quarter of the whole."""

    def __init__(self, checkpointing=False):
        super().__init__()
        self.checkpointing = checkpointing
        self.embed = nn.Embedding(VOCABULARY, 11)
        self.norm = nn.LayerNorm(11)
        self.up = nn.Linear(11, 123)
        self.gate = nn.Linear(11, 5, bias=False)
        self.mix = nn.Linear(5, 11, bias=False)
        self.down = nn.Linear(123, 11, bias=False)
        self.head = nn.Linear(11, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def body(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x)))) + self.mix(torch.tanh(self.gate(x)))

    def forward(self, tokens, targets, documents=None):
        x = self.embed(tokens.clamp(min=0))
        x = recomputed(self.body, x, use_reentrant=False) if self.checkpointing else self.body(x)
        losses = nn.functional.cross_entropy(
            self.head(x).float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
        )
        return losses.view(targets.shape)


def build(method, **model):
    """`method` is one of METHODS, or LAYER+METHOD."""
    layer, _, rule = method.rpartition("+")
    torch.manual_seed(3)
    net = Net(**model)
    if layer:
        convert(net, LAYERS[layer], MATRICES, rank=0.5)
    roles = METHODS[rule].func.roles or "tables" in METHODS[rule].keywords
    return net, METHODS[rule](split_groups(net, MATRICES, roles=roles))


def batch(step, rank, world):
    """Rows of one rank; in every fifth step the last rank of several has nothing to predict."""
    draw = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=draw)
    tokens[:, 1::2] = (tokens[:, :-1:2] * 7 + 3) % VOCABULARY
    if step % 5 == 4:
        tokens[-(ROWS // 4) :] = -1
    mine = tokens[rank * ROWS // world : (rank + 1) * ROWS // world]
    return Batch(mine, torch.zeros(len(mine)), torch.arange(len(mine)))


def steps(backend, first, last, rows, precision="fp32", max_norm=None, spoil=()):
    """(loss, norm, applied) of each step; in those of `spoil` the last rank's gradient is not finite."""
    results = []
    for step in range(first, last):
        handle = None
        if step in spoil and backend.rank == backend.world - 1:
            handle = backend.model.norm.register_forward_hook(lambda *parts: parts[2] * float("nan"))
        result = train_step(backend, batch(step, backend.rank, backend.world), None, rows, precision, max_norm)
        results.append((result.loss, result.grad_norm, result.applied))
        if handle:
            handle.remove()
    return results


def reference(method, count, micro_batches, **options):
    """Weights after `count` steps of one process that walks through the micro-batches of all ranks in their order."""
    backend = Backend()
    net, optimizer = build(method)
    backend.prepare(net, optimizer)
    results = steps(backend, 0, count, ROWS // micro_batches, **options)
    return {name: p.detach().clone() for name, p in net.named_parameters()}, results, state_bytes(optimizer)


def weights(backend):
    """All weights, on every rank."""
    pieces = [
        (name, piece.start, piece.tensor.clone()) for name, piece in backend.weights().items() if backend.saves(name)
    ]
    found = {name: torch.full((torch.Size(p.shape).numel(),), torch.nan) for name, p in shapes(backend).items()}
    for said in backend.share(pieces):
        for name, start, tensor in said:
            found[name][start : start + len(tensor)] = tensor
    return {name: flat.view(shapes(backend)[name].shape) for name, flat in found.items()}


def shapes(backend):
    groups = backend.optimizer.param_groups
    return {n: p for group in groups for n, p in zip(group["names"], group["params"], strict=True)}


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def prepared(backend, stage, method, checkpointing=False, settings=None, chunk=None, precision="fp32"):
    """The model on `backend` at this stage; how often each rule has run is in the list returned."""
    backend.stage, backend.settings = stage, settings or {}
    backend.chunk = chunk or type(backend).chunk
    net, optimizer = build(method, checkpointing=checkpointing)
    ran, update = [], optimizer.update

    def counting(names, *rest):
        ran.extend(names)
        update(names, *rest)

    optimizer.update = counting
    backend.prepare(net, optimizer, precision=precision)
    return ran


def measured(backend):
    """What there is to know of this rank beside its weights."""
    exchange = getattr(backend.sharded, "exchange", None)
    return {
        "sent": exchange.sent if exchange else 0,
        "planned": exchange.ownership.sent(backend.rank) if exchange else 0,
        "chunks": len(exchange.ownership.chunks) if exchange else 0,
        "owned": {name: len(some) for name, some in exchange.ownership.holders.items()} if exchange else {},
        "state_bytes": state_bytes(backend.optimizer),
        "predicted_bytes": backend.predicted_state_bytes(),
    }


TRAINING = ("precision", "max_norm", "spoil")  # options of the steps


def compare(backend, cases, count):
    """On every rank, for each case (method, stage, options): the largest difference to one process that walks
    through the micro-batches of all ranks, in their order; and what was measured."""
    found, world = [], backend.world
    one_process = functools.cache(lambda *key: reference(*key[:3], **dict(key[3])))
    for method, stage, options in cases:
        training = {key: value for key, value in options.items() if key in TRAINING}
        accumulate, building = options.get("accumulate", 1), {**options, "precision": options.get("precision", "fp32")}
        for key in ("accumulate", "max_norm", "spoil"):
            building.pop(key, None)
        expected, theirs, total = one_process(method, count, world * accumulate, tuple(training.items()))
        ran = prepared(backend, stage, method, **building)
        ours = steps(backend, 0, count, ROWS // world // accumulate, **training)
        entry = {**measured(backend), "total_bytes": total, "ran": ran, "steps": (ours, theirs)}
        found.append((difference(expected, weights(backend)), entry))
    return found


# ----------------------------------------------------------------------------------------------------- saved, resumed


def save(backend, folder, step):
    kept = {name: whole(tensor) for name, tensor in buffers(backend.model).items()}
    groups = {"model": backend.weights(), "buffers": kept, "optim": backend.states()}
    ours = {group: {k: p for k, p in pieces.items() if backend.saves(k)} for group, pieces in groups.items()}
    writer = Writer(folder, 1, False, backend.channel())
    writer.save(step, ours, {"optim": backend.options()})
    writer.wait()


def resume(backend, folder):
    """Whatever the buffers were."""
    found = latest(folder, Channel(backend.rank, backend.share))
    for tensor in buffers(backend.model).values():
        tensor.zero_()
    take_up_buffers(backend.model, found.reader("buffers"))
    backend.load(found.reader("model"), found.reader("optim"), found.meta["optim"])


def save_all(backend, cases, at, folder):
    """Trains each (method, stage) for `at` steps and saves it."""
    for method, stage in cases:
        prepared(backend, stage, method)
        steps(backend, 0, at, ROWS // backend.world)
        save(backend, folder / f"{method}-{stage}-{backend.world}", at)


def resume_all(backend, cases, at, end, folder):
    """Goes on with each (method, saved as "METHOD-STAGE-WORLD", stage) to step `end`; the weights."""
    found = []
    for method, saved, stage in cases:
        prepared(backend, stage, method)
        resume(backend, folder / saved)
        steps(backend, at, end, ROWS // backend.world)
        found.append({name: w.numpy() for name, w in weights(backend).items()})
    return found


def read_run(folder):
    """Weights, results, model and memory of a finished run."""
    last = latest(folder / "checkpoints", ALONE)
    entry = read_record(folder / "record.json")
    return {"weights": dict(last.reader("model")), **{key: entry[key] for key in ("results", "model", "memory")}}
