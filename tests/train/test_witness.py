"""The witness leaves no trace, finds nothing where nothing is wrong, and names what is."""

import pytest
import torch

from tests.tools import gang
from tests.tools.methods import MAKERS
from tests.tools.scale import CONFIG, SEQ, batch, make, one_step
from thriftlab.optim import AdamW, Frugal
from thriftlab.optim.core.owners import assign
from thriftlab.train.backends import make_backend
from thriftlab.train.backends.pieces import whole
from thriftlab.train.witness import WitnessError, witness

pytestmark = pytest.mark.slow

BACKENDS = [("ddp", {}), ("owned", {}), ("fsdp2", {}), ("deepspeed", {"stage": 1}), ("deepspeed", {"stage": 3})]
TOKENS = torch.randint(CONFIG.vocab_size, (2, 2, SEQ + 1), generator=torch.Generator().manual_seed(9))
MATRIX = "layers.1.mlp.up.weight"


def bits(backend):
    """Everything that a run is made of."""
    pieces = {**backend.weights(), **{f"state {key}": piece for key, piece in backend.states().items()}}
    random = torch.get_rng_state().numpy().tobytes()
    with torch.no_grad():
        pieces["losses"] = whole(backend.module(*batch(0, 0, 1)))  # by the weights that the model works with
    return {key: piece.tensor.numpy().tobytes() for key, piece in pieces.items()}, str(backend.options()), random


def examine(backend_name, options, cases):
    """Whether the witness was content with each method, and nothing changed; also in the middle of a run."""
    results = {}
    backend = make_backend(backend_name, **options)
    for name in cases:
        layer, _, rule = name.rpartition("+")
        backend.prepare(*make(MAKERS[rule], layer=layer))
        results[name] = []
        for t in range(2):
            before = bits(backend)
            said = witness(backend, TOKENS, "fp32", 1.0)
            results[name].append(said.startswith("witness:") and bits(backend) == before)
            one_step(backend, [batch(t, backend.rank, backend.world)])
    backend.close()
    return results


@pytest.mark.parametrize(("backend", "options"), BACKENDS, ids=lambda x: str(x))
def test_it_is_content_and_leaves_no_trace(backend, options):
    cases = ["blocks", "columns", "lost+fira"] + (["adamw", "muon"] if backend in ("ddp", "owned") else [])
    for results in gang.ranks(2, examine, backend, options, cases):
        assert results == {name: [True] * 2 for name in cases}


# ------------------------------------------------------------------------------------------------------ planted faults


def another_seed(backend, model, optimizer):
    optimizer.param_groups[0]["seed"] += 1


def skipped(backend, model, optimizer):
    plain = optimizer.update

    def update(names, weights, grads, states, group):
        kept = [i for i, name in enumerate(names) if name != MATRIX]
        plain([names[i] for i in kept], *([of[i] for i in kept] for of in (weights, grads, states)), group)

    optimizer.update = update
    if hasattr(backend, "sharded"):
        plain_cut = backend.sharded.update_cut
        backend.sharded.update_cut = lambda group, names, *flat: plain_cut(
            group, [name for name in names if name != MATRIX], *flat
        )


def not_added(backend, model, optimizer):
    if backend.name == "fsdp2":  # there hooks of a parameter, of which a rank has rows, are not called
        module = model.layers[1].mlp.up
        module.forward = lambda x: torch.nn.functional.linear(x, module.weight.detach())
    else:
        dict(model.named_parameters())[MATRIX].register_hook(torch.zeros_like)


def other_weights(backend, model, optimizer):
    with torch.no_grad():
        dict(model.named_parameters())[MATRIX].mul_(1.1)


def not_told(backend, model, optimizer):
    plain = backend.update

    def update(applied=None):
        before = model.embed.weight.detach().clone()
        plain(applied)
        model.embed.weight.data.copy_(before)

    backend.update = update


def other_rate(backend, model, optimizer):
    optimizer.param_groups[0]["lr"] *= 1.01


def seek(backend_name, options, faults, rank):
    """What the witness says of each fault, planted on one rank."""
    backend, said = make_backend(backend_name, **options), {}
    for fault in faults:
        model, optimizer = make(lambda p: Frugal(p, subspace="columns", lr=0.01, seed=1))
        backend.prepare(model, optimizer)
        vars(backend).pop("update", None)
        if backend.rank == rank:
            fault(backend, model, optimizer)
        try:
            said[fault.__name__] = witness(backend, TOKENS, "fp32", 1.0)
        except WitnessError as error:
            said[fault.__name__] = str(error)
    backend.close()
    return said


@pytest.mark.parametrize("backend", ["ddp", "owned"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_is_found_and_named(backend, rank):
    faults = [another_seed, skipped, not_added, other_weights, not_told, other_rate]
    stepped_here = backend == "ddp" or assign(make(AdamW)[1].costs(), 2)[MATRIX] == rank
    for said in gang.ranks(2, seek, backend, {}, faults, rank):
        print(*said.values(), sep="\n\n")
        assert "basis.index" in said["another_seed"]
        assert not stepped_here or MATRIX in said["skipped"]
        assert f"{MATRIX}: the gradient of a sequence" in said["not_added"]
        assert f"{MATRIX}: rank" in said["other_weights"]
        assert "embed.weight" in said["not_told"]
        assert "weight: after a step" in said["other_rate"]


@pytest.mark.parametrize(("backend", "options"), BACKENDS[2:], ids=lambda x: str(x))
def test_a_fault_in_a_shard_is_found_and_named(backend, options):
    """At stage 1 the last rank has the matrix whole, else it has half of it."""
    faults = [another_seed, skipped, not_added, other_rate]
    for said in gang.ranks(2, seek, backend, options, faults, 1):
        print(*said.values(), sep="\n\n")
        assert "basis.index: after a step" in said["another_seed"]
        assert f"{MATRIX}: {'nobody has state' if options == {'stage': 1} else 'after a step'}" in said["skipped"]
        assert f"{MATRIX}: the gradient of a sequence" in said["not_added"]
        assert "weight: after a step" in said["other_rate"]
