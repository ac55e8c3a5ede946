"""Weights and gradients in few bits in training: gradients, several ranks, checkpoints, the bill, what is refused."""

import functools
import inspect

import numpy as np
import pytest
import torch

from tests.tools import gang
from tests.tools.methods import MAKERS
from tests.tools.runs import stop_at
from tests.tools.scale import CONFIG, SEQ, batch, make, one_step
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import BackendError, UserError
from thriftlab.optim import METHODS, AdamW, split_groups
from thriftlab.optim.core.bill import predicted_state_parts, state_parts
from thriftlab.optim.state.weights import join
from thriftlab.train.backends import make_backend
from thriftlab.train.backends.base import Backend as Single
from thriftlab.train.backends.channel import Channel
from thriftlab.train.backends.ddp import DDP
from thriftlab.train.backends.fsdp2 import FSDP2, vectors_in
from thriftlab.train.backends.zero.engine import DeepSpeed
from thriftlab.train.checkpoints.reader import latest, load
from thriftlab.train.checkpoints.writer import Writer
from thriftlab.train.config.schema import RunConfig, settled
from thriftlab.train.export import joined_weights
from thriftlab.train.loop import run
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.refuse import refuse_few_bits
from thriftlab.train.windows import autocast
from thriftlab.train.witness import WitnessError, witness

STEPS = 5
LINEARS = (".attn.", ".mlp.")


def few(name, weights, gradients, layer=None, rounding="random", **hyper):
    """Model and optimizer as a run makes them."""
    model, optimizer = make(MAKERS[name], layer=layer, **hyper)
    optimizer.keep_weights(weights, rounding, 0)
    for p in model.parameters():
        if p.ndim > 1 and p.requires_grad and gradients == "fp32":
            p.grad_dtype = torch.float32
    return model, optimizer


def stepped(model, optimizer):
    """What is stepped of every parameter, fp32."""
    lows = {p: optimizer.state.get(p, {}).get("weight.low") for p in model.parameters()}
    return {
        name: join(p.detach(), lows[p]).numpy() if p.dtype == torch.bfloat16 else p.detach().numpy()
        for name, p in model.named_parameters()
    }


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------------- gradients


def gradients_of(model, parts):
    for inputs, targets in parts:
        with autocast(torch.device("cpu"), "bf16"):
            loss = model(inputs, targets).sum()
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_bf16_weights_are_those_of_the_same_weights_in_fp32(micro_batches, tied):
    model, wide = (GPT(CONFIG.model_copy(update={"tied": tied, "vocab_size": 5000})) for _ in range(2))
    model.init_weights(0)
    optimizer = AdamW(model.named_parameters())
    optimizer.keep_weights("bf16")
    for p in model.parameters():
        p.grad_dtype = torch.float32
    wide.load_state_dict(model.state_dict())
    parts = [batch(t, 0, 1) for t in range(micro_batches)]
    ours, theirs = gradients_of(model, parts), gradients_of(wide, parts)
    assert {grad.dtype for grad in ours.values()} == {torch.float32}
    for name, grad in ours.items():
        assert torch.equal(grad, theirs[name]), name
    if micro_batches == 1:
        for p in model.parameters():
            p.grad, p.grad_dtype = None, p.dtype
        for name, grad in gradients_of(model, parts).items():
            if name not in ("embed.weight",) or not tied:  # there two sums are added in bf16
                assert torch.equal(grad, theirs[name].to(grad.dtype)), name


def test_the_norm_of_bf16_gradients_and_what_is_clipped():
    draw = torch.Generator().manual_seed(0)
    grads = {}
    steps = []
    for narrow in (False, True):
        model, optimizer = few("adamw", "bf16+16", "bf16" if narrow else "fp32")
        backend = make_backend("single")
        backend.prepare(model, optimizer)
        for name, p in model.named_parameters():
            if name not in grads:
                grads[name] = torch.randn(p.shape, generator=draw).to(p.dtype)
            p.grad = grads[name].to(p.grad_dtype, copy=True)
        norm, _ = backend.step(torch.tensor(0.1234, dtype=torch.float64), 0.5)
        steps.append((norm, stepped(model, optimizer)))
    exact = 0.1234 * torch.cat([grad.double().flatten() for grad in grads.values()]).norm()
    assert all(abs(norm / exact - 1) < 1e-6 for norm, _ in steps)
    assert equal(steps[0][1], steps[1][1])


@pytest.mark.parametrize("gradients", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["columns", "signsgd"])
def test_layerwise_is_the_normal_update(name, gradients):
    ends = []
    for layerwise in (False, True):
        model, optimizer = few(name, "bf16+8", gradients)
        backend = make_backend("single")
        backend.prepare(model, optimizer)
        if layerwise:
            backend.update_in_backward()
        norms = []
        for t in range(STEPS):
            parts = [batch(t, 0, 2)]
            backend.begin(sum((targets >= 0).sum() for _, targets in parts).double())
            norms.append(one_step(backend, parts, precision="bf16")[0])
        ends.append((norms, stepped(model, optimizer)))
        assert backend.gradient_bytes == 0 or not layerwise
    assert ends[0][0] == ends[1][0] and equal(ends[0][1], ends[1][1])


# ----------------------------------------------------------------------------------------------------- several ranks

RULES = ["adamw", "columns", "galore", "8bit"]  # by entry, by chosen columns, whole, and whole for its blocks
MAKERS = {**MAKERS, "8bit": functools.partial(MAKERS["columns"], state_dtype="8bit")}
CASES = {  # backend: (method, weights, gradients, layer)
    "owned": [
        *((name, "bf16+8", "fp32", None) for name in RULES),
        ("fira", "bf16", "fp32", "lost"),
        ("badam", "bf16+16", "fp32", "sltrain"),
        ("muon", "bf16", "bf16", None),
    ],
    "ddp": [("columns", "bf16+8", "bf16", "cola")],
    "fsdp2": [("badam", "bf16", "bf16", "lowrank"), *((name, "bf16+8", "bf16", None) for name in RULES)],
}


def together(world, cases):
    """Of each case what is stepped after some steps, as this rank has it, and what it keeps."""
    found = []
    for name, some in cases.items():
        backend = make_backend(name)
        for rule, weights, gradients, layer in some:
            model, optimizer = few(rule, weights, gradients, layer)
            backend.prepare(model, optimizer, precision="bf16")
            norms = [one_step(backend, [batch(t, backend.rank, world)], precision="bf16")[0] for t in range(STEPS)]
            held = {**backend.weights(), **backend.states()}
            pieces = {key: (p.start, p.tensor.view(torch.int16).numpy() if p.tensor.dtype == torch.bfloat16 else
                            p.tensor.numpy()) for key, p in held.items()}  # fmt: skip
            kept = sum(p.tensor.nbytes for key, p in backend.states().items() if p.shape and "diagnostic" not in key)
            found.append((pieces, norms, kept == backend.predicted_state_bytes()))
        backend.close()
    return found


def alone(world, rule, weights, gradients, layer):
    """The same of one process: gradients of the ranks are summed in fp32, and rounded once where they are bf16."""
    model, optimizer = few(rule, weights, gradients, layer)
    backend = make_backend("single")
    backend.prepare(model, optimizer)
    norms = []
    for t in range(STEPS):
        parts = [batch(t, r, world) for r in range(world)]
        count = sum((targets >= 0).sum() for _, targets in parts).double()
        sums = {}
        for inputs, targets in parts:
            gradients_of(model, [(inputs, targets)])
            for p in model.parameters():
                if p.grad is not None:
                    sums[p] = sums[p] + p.grad.float() if p in sums else p.grad.float()
                    p.grad = None
        for p, total in sums.items():
            p.grad = total.to(p.grad_dtype)
        norms.append(backend.step(1 / count, None)[0].item())
    return {**backend.weights(), **backend.states()}, norms


@pytest.fixture(scope="module")
def ranks_of_two():
    return gang.ranks(2, functools.partial(together, 2), CASES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "backend", "case"),
    [(i, name, case) for i, (name, case) in enumerate((n, c) for n, some in CASES.items() for c in some)],
    ids=lambda value: str(value),
)
def test_two_ranks_are_one_process(ranks_of_two, number, backend, case):
    expected, norms = alone(2, *case)
    low_at = {}
    for rank, results in enumerate(ranks_of_two):
        pieces, got, as_planned = results[number]
        assert got == (norms if backend != "fsdp2" else pytest.approx(norms, rel=1e-6))
        assert as_planned
        for key, (start, tensor) in pieces.items():
            if key.rpartition("/")[2] in ("whole.first", "whole.size", "owner") or "diagnostic" in key:
                continue
            right = expected[key].tensor
            right = right.view(torch.int16).numpy() if right.dtype == torch.bfloat16 else right.numpy()
            assert np.array_equal(tensor, right[start : start + tensor.size], equal_nan=tensor.dtype.kind == "f"), key
            if key.endswith("weight.low"):
                low_at.setdefault(key, []).append((rank, tensor.size))
    if backend == "owned":
        assert all(len(places) == 1 for places in low_at.values())
    if backend == "fsdp2" and case[0] in ("adamw", "columns"):
        assert all(len(places) == 2 for places in low_at.values())


def summed(backends):
    """Gradients 256, 1 and 1: added in bf16 they would be 256."""
    found = []
    for name in backends:
        backend = make_backend(name)
        model = torch.nn.Linear(1, 6, bias=False, dtype=torch.bfloat16)
        backend.prepare(model, AdamW([("weight", model.weight)]))
        backend.begin(torch.ones(()))
        with backend.micro_batch(last=True):
            backend.backward(backend.module(torch.full((1, 1), 1.0 if backend.rank else 256.0).bfloat16()).sum())
        found.append([piece.tensor.float().tolist() for piece in backend.gradients().values()])
        backend.close()
    return found


@pytest.mark.slow
def test_bf16_gradients_of_three_ranks_are_summed_in_fp32():
    backends = ["ddp", "owned", "fsdp2"]
    for found in gang.ranks(3, summed, backends):
        for name, tensors in zip(backends, found, strict=True):
            assert all(set(tensor) <= {258.0} for tensor in tensors), name


# --------------------------------------------------------------------------------------------------------- checkpoints

TRAVELLERS = [("columns", "bf16+8"), ("galore", "bf16")]


def leg(backend_name, folder, first, last):
    """Steps first to last of every traveller, from a checkpoint and into the next one; what is stepped on this rank."""
    backend, ends = make_backend(backend_name), {}
    channel = backend.channel()
    for name, weights in TRAVELLERS:
        model, optimizer = few(name, weights, "bf16" if backend_name == "fsdp2" else "fp32")
        backend.prepare(model, optimizer, precision="bf16")
        if first:
            found = latest(folder / name, Channel(backend.rank, backend.share))
            backend.load(found.reader("model"), found.reader("optim"), found.meta["optim"])
        for t in range(first, last):
            one_step(backend, [batch(t, r, 2) for r in range(2)[backend.rank :: backend.world]], precision="bf16")
        groups = {"model": backend.weights(), "optim": backend.states()}
        ours = {group: {k: p for k, p in pieces.items() if backend.saves(k)} for group, pieces in groups.items()}
        writer = Writer(folder / name, 9, False, channel)
        writer.save(last + (first == last), ours, {"optim": backend.options()})
        ends[name] = stepped(model, optimizer) if backend_name == "single" else None
    backend.close()
    return ends


@pytest.mark.slow
def test_checkpoints_of_any_backend_go_on_in_any_other(tmp_path):
    """Two ranks, one process; and then through FSDP2 and owners on three, which load and save the same bits."""
    gang.ranks(2, leg, "owned", tmp_path, 0, 2)
    ends = leg("single", tmp_path, 2, 5)
    gang.ranks(3, leg, "fsdp2", tmp_path, 5, 5)
    gang.ranks(3, leg, "owned", tmp_path, 6, 6)
    for name, weights in TRAVELLERS:
        model, optimizer = few(name, weights, "fp32")
        backend = make_backend("single")
        backend.prepare(model, optimizer)
        for t in range(5):
            one_step(backend, [batch(t, r, 2) for r in range(2)], precision="bf16")
        assert equal(ends[name], stepped(model, optimizer))
        saved = [load(tmp_path / name / f"step-{step:08d}") for step in (5, 6, 7)]
        assert equal({k: w.numpy() for k, w in joined_weights(saved[2]).items()}, ends[name])
        for group, tensors in saved[0].tensors.items():
            for key, tensor in tensors.items():
                others = [one.tensors[group].get(key) for one in saved[1:]]
                assert "diagnostic" in key or all(torch.equal(tensor, other) for other in others), key


def test_a_run_is_resumed_to_the_bit_and_exported(tiny_data, tmp_path):
    train = {"precision": "bf16", "weights": "bf16+8", "gradients": "bf16", "micro_batch_size": 8}
    optim = {"name": "frugal", "gap": 3, "subspace": "columns", "state_dtype": "8bit"}
    configs = [tiny_config(tiny_data, tmp_path / out, train=train, optim=optim) for out in ("whole", "parts")]
    entry = run(configs[0])
    stop_at(configs[1], 3)
    assert run(configs[1])["results"] == entry["results"]
    assert entry["memory"]["predicted"] == entry["memory"]["measured"]
    found, other = (latest(tmp_path / out / "checkpoints") for out in ("whole", "parts"))
    for group, tensors in found.tensors.items():
        assert tensors.keys() == other.tensors[group].keys()
        assert all(torch.equal(t.nan_to_num(), other.tensors[group][key].nan_to_num()) for key, t in tensors.items())
    seen, joined = found.tensors["model"], joined_weights(found)
    assert all(weight.dtype == torch.float32 for weight in joined.values())
    for name, weight in seen.items():
        assert (joined[name] - weight.float()).abs().max() <= 2**-8 * weight.abs().max()
        assert torch.equal(joined[name], weight.float()) == (weight.ndim == 1)


@pytest.mark.parametrize(("weights", "bound"), [("bf16", 2**-8), ("bf16+8", 2**-16), ("bf16+16", 0)])
def test_first_weights_come_back_from_a_checkpoint_before_the_first_step(tmp_path, weights, bound):
    first, _ = make(MAKERS["adamw"])
    model, optimizer = few("adamw", weights, "fp32")
    backend = make_backend("single")
    backend.prepare(model, optimizer)
    Writer(tmp_path, 1, False).save(0, {"model": backend.weights(), "optim": backend.states()}, {})
    back = joined_weights(latest(tmp_path))
    for name, p in first.named_parameters():
        assert bool(((back[name] - p).abs() <= bound * p.abs()).all()), name


def test_who_writes_a_weight_outside_of_a_step_drops_its_low_bits():
    model, optimizer = few("adamw", "bf16+8", "fp32", layer="relora")
    backend = make_backend("single")
    backend.prepare(model, optimizer)
    for t in range(3):
        one_step(backend, [batch(t, 0, 2)], precision="bf16")
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    factor, table = next(name for name in states if name.endswith("lr_in")), "embed.weight"
    moments = {name: states[name]["exp_avg"].clone() for name in (factor, table)}
    assert all(states[name]["weight.low"].any() for name in (factor, table))
    backend.forget({factor: 0.5})  # a share of its moments, and all low bits, for the factor was written anew
    assert not states[factor]["weight.low"].any() and states[table]["weight.low"].any()
    kept = states[factor]["exp_avg"] == moments[factor]
    assert 0.4 < kept.float().mean() < 0.6
    backend.forget({factor: 1})
    assert not optimizer.state.get(dict(model.named_parameters())[factor])
    backend.put_weights(lambda name, piece: piece.tensor.clone())
    assert not states[table]["weight.low"].any() and torch.equal(states[table]["exp_avg"], moments[table])


# --------------------------------------------------------------------------------------------------------- the witness


def another_key(backend, optimizer):
    optimizer.param_groups[0]["weight_seed"] += 1


def no_low_bits(backend, optimizer):
    plain = optimizer.apply

    def apply(names, weights, grads, states, *rest, **more):
        for state in states:
            state.pop("weight.low", None)
        plain(names, weights, grads, states, *rest, **more)

    optimizer.apply = apply


FAULTS = {"another_key": another_key, "no_low_bits": no_low_bits, "no_gradient": lambda backend, optimizer: None}


def examined(cases):
    said = []
    tokens = torch.randint(CONFIG.vocab_size, (2, 2, SEQ + 1), generator=torch.Generator().manual_seed(9))
    for name, gradients, fault in cases:
        backend = make_backend(name)
        model, optimizer = few("8bit" if name == "fsdp2" else "adamw", "bf16+8", gradients)
        if fault == "no_gradient" and backend.rank:
            next(p for p in model.parameters() if p.ndim > 1).register_hook(torch.zeros_like)
        backend.prepare(model, optimizer, precision="bf16")
        one_step(backend, [batch(0, backend.rank, 2)], precision="bf16")
        if fault and backend.rank:
            FAULTS[fault](backend, optimizer)
        before = {key: p.tensor.clone() for key, p in {**backend.weights(), **backend.states()}.items()}
        try:
            said.append(witness(backend, tokens, "bf16", 1.0)[:8])
        except WitnessError as error:
            said.append(str(error))
        after = {**backend.weights(), **backend.states()}
        assert all(torch.equal(tensor.nan_to_num(), after[key].tensor.nan_to_num()) for key, tensor in before.items())
        backend.close()
    return said


@pytest.mark.slow
def test_the_witness_is_content_and_finds_faults():
    cases = [(name, "bf16", None) for name in CASES] + [("owned", "fp32", None)]
    cases += [("owned", "bf16", fault) for fault in FAULTS] + [("ddp", "bf16", "another_key")]
    for said in gang.ranks(2, examined, cases):
        for (name, _, fault), words in zip(cases, said, strict=True):
            assert (words == "witness:") == (fault is None), (name, fault, words)


# --------------------------------------------------------------------------------------------------- bill and refusals


@pytest.mark.parametrize(
    ("backend", "train", "message"),
    [
        (Single, {"weights": "bf16"}, "train.weights = bf16 .* set train.precision=bf16"),
        (Single, {"gradients": "bf16"}, "train.gradients = bf16 .* set train.precision=bf16"),
        (Single, {"precision": "bf16", "gradients": "bf16"}, "one micro-batch .* set train.micro_batch_size=8"),
        (DDP, {"precision": "bf16", "weights": "bf16+8"}, "'ddp' a gradient has .* set train.gradients=bf16, or use"),
        (FSDP2, {"precision": "bf16", "weights": "bf16"}, "'fsdp2' a gradient has .* backend.name=owned"),
        (DDP, {"precision": "bf16", "gradients": "bf16", "micro_batch_size": 8}, "set train.weights, too"),
        (DeepSpeed, {"precision": "bf16", "weights": "bf16+8"}, "DeepSpeed takes fp32 parameters only.*name=owned"),
        (DeepSpeed, {"precision": "bf16", "gradients": "bf16", "micro_batch_size": 8}, "use backend.name=owned"),
    ],
)
def test_refusals_say_what_to_do(backend, train, message):
    config = RunConfig(train={"batch_size": 8, **train})
    with pytest.raises(UserError, match=message) as refused:
        refuse_few_bits(settled(config, "fp32"), backend)  # class attributes say what a backend can
    assert "\n" not in str(refused.value)


def test_fsdp2_refuses_a_module_that_has_both_kinds():
    model, _ = few("adamw", "bf16", "bf16", layer="sltrain")
    with pytest.raises(BackendError, match="attn.q has matrices in few bits and vectors in fp32"):
        list(vectors_in(model.layers[0]))


@pytest.mark.parametrize("maker", METHODS.values(), ids=METHODS)
def test_the_bill_of_every_method(maker):
    """Predicted from shapes on the meta device, measured on tensors after a step; the refreshing ones have begun."""
    for weights, hyper in (("bf16+8", {"state_dtype": "8bit"}), ("bf16", {})):
        known = {k: v for k, v in hyper.items() if k in inspect.signature(maker).parameters}
        model, optimizer = make(maker, **known)
        optimizer.keep_weights(weights)
        expected = predicted_state_parts(optimizer)
        backend = make_backend("single")
        backend.prepare(model, optimizer)
        one_step(backend, [batch(0, 0, 1)], precision="bf16")
        assert predicted_state_parts(optimizer) == state_parts(optimizer)
        assert expected["low_bits"] == (weights == "bf16+8") * sum(p.numel() for p in model.parameters() if p.ndim > 1)
        assert backend.gradient_bytes == sum(p.numel() * p.grad_dtype.itemsize for p in model.parameters())


def test_the_table_of_bytes_a_parameter():
    """Of llama-60m, from the methods' own declarations: the specification's columns A, D and G."""
    with torch.device("meta"):
        model = GPT(ModelConfig(preset="llama-60m"))
    count = sum(p.numel() for p in model.parameters())
    rows = {
        "adamw": (16.00, 7.03, 14.00, {}),
        "galore": (13.64, 6.62, 11.64, {"rank": 128}),
        "frugal": (13.39, 6.37, 11.39, {"subspace": "columns", "density": 0.25}),
        "muon": (14.26, 6.59, 12.26, {}),
        "signsgd": (8.00, 5.00, 6.00, {}),
    }
    for name, (a, d, g, hyper) in rows.items():
        groups = split_groups(model, [r"\.(attn|mlp)\."])
        for total, other, state_dtype in ((a, 8, "fp32"), (d, 5, "8bit"), (g, 6, "fp32")):
            known = {"state_dtype": state_dtype} if "state_dtype" in inspect.signature(METHODS[name]).parameters else {}
            state = sum(predicted_state_parts(METHODS[name](groups, **hyper, **known)).values())
            assert state / count + other == pytest.approx(total, abs=0.006), name
