"""LoRA and ReLoRA against their equations in float64; merges in runs: resumed, on several ranks, refused."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.tools import gang
from tests.tools.layers import BLOCKS, on_meta, parameters, tiny, tokens
from tests.tools.runs import LAYERWISE, LONG, NORMAL, assert_same, ended, run_status, said, stop_at, stop_rank, traces
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import UserError
from thriftlab.optim import METHODS, AdamW, LoRA, ReLoRA, convert, split_groups
from thriftlab.optim.layers.base import before_step, changing, describe, export, rebuild
from thriftlab.optim.state.keys import keyed_generator
from thriftlab.train.backends import make_backend
from thriftlab.train.budget import Horizon, cosine, jagged
from thriftlab.train.loop import run
from thriftlab.train.records.record import read_record

RELORA = {"name": "relora", "rank": 4, "merge_every": 6}


def filled(kind=ReLoRA, shape=(9, 12), dtype=torch.float64, b=True, **options):
    """A layer and the weight that it began with; with `b` the factor B is not zero."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw, dtype=torch.float64)
    layer = kind(shape[1], shape[0], **{"rank": 4, **options}, dtype=dtype)
    layer.load_dense(weight, keyed_generator(0, "layer.weight", 1))
    if b:
        with torch.no_grad():
            layer.lr_out.copy_(torch.randn(layer.lr_out.shape, generator=draw, dtype=torch.float64))
    return layer, weight


def draw(count):
    return keyed_generator(0, "layer", count)


# ------------------------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("kind", [LoRA, ReLoRA])
def test_output_and_gradients(kind):
    """y = x W0^T + (alpha / r) x A^T B^T, and nothing for W0."""
    layer, weight = filled(kind, alpha=3.0)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    a, b = (t.detach().clone().requires_grad_() for t in (layer.lr_in, layer.lr_out))
    y = x @ weight.T + 3 / 4 * (x @ a.T) @ b.T
    torch.testing.assert_close(layer(x), y)
    g = torch.randn_like(y)
    ours = torch.autograd.grad(layer(x), (x, layer.lr_in, layer.lr_out), g)
    for one, other in zip(ours, torch.autograd.grad(y, (x, a, b), g), strict=True):
        torch.testing.assert_close(one, other)
    assert [name for name, p in layer.named_parameters() if not p.requires_grad] == ["weight"]
    assert torch.autograd.gradcheck(layer, x)


def test_it_starts_as_the_linear():
    layer, weight = filled(b=False, shape=(90, 100), rank=50)
    assert torch.equal(layer.weight, weight) and not layer.lr_out.any() and layer.alpha == 32
    assert 0.09 < layer.lr_in.abs().max() <= 0.1 and abs(layer.lr_in.std() * math.sqrt(3) - 0.1) < 5e-3
    assert abs(layer.lr_in.mean()) < 5 * 0.06 / math.sqrt(5000)


def test_a_merge_moves_what_was_learnt_and_changes_nothing_else():
    layer, weight = filled(merge_every=5, alpha=3.0)
    a, b, x = layer.lr_in.clone(), layer.lr_out.clone(), torch.randn(7, 12, dtype=torch.float64)
    before = layer(x)
    names = []
    with torch.no_grad():
        for step in range(5):
            assert not layer.before_step(step, draw) and torch.equal(layer.lr_in, a)
        names = layer.before_step(5, draw)
    assert set(names) == {"lr_in", "lr_out"}
    torch.testing.assert_close(layer.weight, weight + 3 / 4 * b @ a)
    torch.testing.assert_close(layer(x), before)
    assert not layer.lr_out.any() and not torch.equal(layer.lr_in, a)
    assert layer.lr_in.abs().max() <= 1 / math.sqrt(12)
    assert not layer.weight.requires_grad


def test_each_merge_draws_another_factor_by_seed_name_and_count():
    models = [tiny(), tiny(), tiny()]
    seen = []
    for model, seed in zip(models, (0, 0, 1), strict=True):
        convert(model, ReLoRA, BLOCKS, rank=4, merge_every=2)
        drawn = []
        for step in range(7):
            names = before_step(model, step, seed)
            assert len(names) == (28 if step in (2, 4, 6) else 0) and len(set(names)) == len(names)
            assert set(names) <= dict(model.named_parameters()).keys()
            drawn.append(torch.stack([model.layers[i].attn.q.lr_in.detach().clone() for i in (0, 1)]))
        seen.append(torch.stack(drawn))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert all(torch.equal(seen[0][2 * i], seen[0][2 * i + 1]) for i in range(3))
    different = [seen[0][step][layer] for step in (0, 2, 4, 6) for layer in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


def test_small_steps_are_not_lost_in_a_bf16_model():
    """What is merged is 2^-12 of W0, which bf16 would round away."""
    layer, _ = filled(dtype=torch.bfloat16, alpha=4.0, merge_every=1)
    assert layer.weight.dtype == torch.float32 and layer.lr_in.dtype == torch.bfloat16
    with torch.no_grad():
        layer.weight.fill_(1.0)
        for step in range(1, 5):
            layer.lr_in.fill_(2.0**-7), layer.lr_out.fill_(2.0**-7)  # four times the product: 2^-12
            layer.before_step(step, draw)
    assert torch.equal(layer.weight, torch.full((9, 12), 1 + 4 * 2.0**-12))
    y = layer(torch.ones(3, 12, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


def test_a_lora_is_never_merged():
    model = tiny()
    convert(model, LoRA, BLOCKS, rank=4)
    assert not changing(model) and not before_step(model, 10_000, 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [LoRA, ReLoRA])
def test_a_bias_an_export_and_a_description(kind, bias):
    model = nn.Sequential(nn.Linear(24, 32, bias=bias))
    plain, x = copy.deepcopy(model[0]), torch.randn(3, 24)
    convert(model, kind, rank=5, alpha=7.0)
    torch.testing.assert_close(model(x), plain(x))
    with torch.no_grad():
        model[0].lr_out.normal_()
    fresh = nn.Sequential(nn.Linear(24, 32, bias=bias))
    rebuild(fresh, describe(model))
    fresh.load_state_dict(model.state_dict())
    y = model(x)
    assert torch.equal(fresh(x), y) and not fresh[0].weight.requires_grad
    export(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("options, word", [({"merge_every": 0}, "merge_every"), ({"alpha": 0.0}, "alpha"),
                                           ({"rank": -1}, "rank")])  # fmt: skip
def test_a_wrong_value_is_named(options, word):
    with pytest.raises(ValueError, match=word):
        ReLoRA(16, 12, **options)


def test_numbers_and_flops_of_llama():
    """All weights stay, few are trained; no gradient of W0 is made."""
    dense, model = on_meta("llama-60m"), on_meta("llama-60m")
    done = convert(model, ReLoRA, BLOCKS, rank=128)
    assert len(done.converted) == 56 and not done.left
    shapes = 8 * ([(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)])
    factors = sum(128 * (m + n) for m, n in shapes)
    assert parameters(model) == parameters(dense) + factors
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == parameters(model) - sum(m * n for m, n in shapes)
    assert as_millions(trained) == "42.77", "as the low-rank model of the papers' tables"
    saved = sum(6 * m * n - (4 * m * n + 6 * 128 * (m + n)) for m, n in shapes)
    assert model.flops_per_token(256) == dense.flops_per_token(256) - saved


def as_millions(count):
    return f"{count / 1e6:.2f}"


def test_a_frozen_weight_is_in_no_group():
    model = tiny()
    convert(model, ReLoRA, BLOCKS, rank=4)
    groups = split_groups(model, include=[r"\.(attn|mlp)\."])
    named = {name for group in groups for name in group["names"]}
    assert named == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.endswith("attn.q.weight") for name in named)


# ------------------------------------------------------------------------------------------------ one loop by hand


def by_hand(model, steps, every, seed=0, lr=1e-2):
    """ReLoRA's algorithm with torch's own AdamW in float64: a dense W, factors beside it, a new optimizer after each
    merge; of the layers alone, all else stands still."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ReLoRA)}
    weights = {name: m.weight.detach().clone() for name, m in layers.items()}
    factors = {name: [m.lr_in.detach().clone(), m.lr_out.detach().clone()] for name, m in layers.items()}
    trained = optimizer = None
    for step in range(steps):
        if step % every == 0:
            if step:
                for name, (a, b) in factors.items():
                    weights[name] = weights[name] + layers[name].alpha / a.shape[0] * (b @ a).detach()
                    g = keyed_generator(seed, f"{name}.before_step", step // every)
                    new = torch.rand(a.shape, generator=g, dtype=torch.float64)
                    factors[name] = [(2 * new - 1) / math.sqrt(a.shape[1]), torch.zeros_like(b)]
            trained = [t.requires_grad_() for pair in factors.values() for t in pair]
            optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        values = {
            f"{name}.{key}": t
            for name, (a, b) in factors.items()
            for key, t in (("weight", weights[name]), ("lr_in", a), ("lr_out", b))
        }
        loss = torch.func.functional_call(model, values, (tokens(length=9 + step), tokens(length=9 + step))).sum()
        grads = torch.autograd.grad(loss, trained)
        for p, grad in zip(trained, grads, strict=True):
            p.grad = grad
        optimizer.step()
    return {name: weights[name] + layers[name].alpha / 4 * (b @ a).detach() for name, (a, b) in factors.items()}


def test_a_training_is_the_papers_algorithm():
    model = tiny().double()
    convert(model, ReLoRA, BLOCKS, rank=4, merge_every=3)
    expected = by_hand(copy.deepcopy(model), 8, 3)
    for name, p in model.named_parameters():
        p.requires_grad_("lr_" in name)
    backend = make_backend("single")
    groups = split_groups(model, include=[r"\.(attn|mlp)\."])
    backend.prepare(model, AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0))
    for step in range(8):
        backend.forget(before_step(model, step, 0))
        backend.backward(model(tokens(length=9 + step), tokens(length=9 + step)).sum())
        backend.step(torch.tensor(1.0), None)
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(name).to_dense(), weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_any_rule_begins_anew_with_the_factors_and_keeps_the_rest(name):
    model = tiny()
    convert(model, ReLoRA, BLOCKS, rank=8, merge_every=4)
    backend = make_backend("single")
    short = {"gap": 3} if "gap" in METHODS[name](model.parameters()).defaults else {}
    short |= {"rank": 2} if "rank" in METHODS[name](model.parameters()).defaults else {}
    backend.prepare(model, METHODS[name](split_groups(model, include=[r"\.(attn|mlp)\."]), **short))
    state, fresh = backend.optimizer.state, None
    for step in range(6):
        names = before_step(model, step, 0)
        before = {n: dict(state[p]) for n, p in model.named_parameters() if p in state}
        backend.forget(names)
        if step == 4:
            assert len(names) == 28
            assert not any(key.rpartition("/")[0] in names for key in backend.states())
            kept = {n: dict(state[p]) for n, p in model.named_parameters() if p in state}
            assert kept == {n: entries for n, entries in before.items() if n not in names}
        model(tokens(), tokens()).sum().backward()
        backend.step(torch.tensor(1.0), None)
        if step in (0, 4):
            counters = {k: int(p.tensor) for k, p in backend.states().items() if k.endswith("lr_in/step")}
            assert set(counters.values()) <= {1}
            keys = {key for key in backend.states() if "lr_" in key}
            assert fresh is None or keys == fresh, "as after the first step"
            fresh = keys


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("kept", ["fp32", "bf16"])
def test_pruned_moments_keep_their_largest_entries(share, kept):
    """Each moment by its own sizes, and the counts go on."""
    model = tiny()
    convert(model, ReLoRA, BLOCKS, rank=4, merge_every=2, prune=share)
    backend = make_backend("single")
    backend.prepare(model, AdamW(split_groups(model, include=[r"\.(attn|mlp)\."]), state_dtype=kept))
    for _ in range(2):
        model(tokens(), tokens()).sum().backward()
        backend.step(torch.tensor(1.0), None)
    before = {key: piece.tensor.clone() for key, piece in backend.states().items()}
    shares = before_step(model, 2, 0)
    assert set(shares.values()) == {share}
    backend.forget(shares)
    after = {key: piece.tensor for key, piece in backend.states().items()}
    assert after.keys() == before.keys()
    for key, old in before.items():
        expected = old.clone()
        if key.rpartition("/")[0] in shares and old.numel() > 1:
            order = old.abs().float().numpy().argsort(kind="stable")
            expected[torch.from_numpy(order[: round(share * old.numel())])] = 0
            ties = (after[key] != expected) & (old.abs() == old.abs().flatten()[order[round(share * old.numel()) - 1]])
            expected[ties] = 0  # as large as the largest of those
        assert torch.equal(after[key], expected), key


OTHER_STATES = [{"name": "galore", "rank": 2}, {"name": "adamw", "state_dtype": "8bit"},
                {"name": "frugal", "subspace": "columns", "density": 0.5}]  # fmt: skip


@pytest.mark.parametrize("optim", OTHER_STATES, ids=lambda o: o["name"])
def test_moments_that_cannot_be_pruned_are_refused_before_training(tiny_data, tmp_path, optim):
    config = tiny_config(tiny_data, tmp_path / "out", layer={**RELORA, "prune": 0.9}, optim=optim)
    with pytest.raises(UserError, match="layer.prune below 1 .* use layer.prune=1"):
        run(config)


# ------------------------------------------------------------------------------------------------ in runs


@pytest.mark.slow
@pytest.mark.parametrize("optim", [{"name": "adamw"}, {"name": "fira", "rank": 2, "gap": 5}], ids=lambda o: o["name"])
@pytest.mark.parametrize("at", [6, 8])
def test_stopped_and_resumed_is_unbroken(tiny_data, tmp_path, optim, at):
    """At a merge, which is taken by the process that goes on, and between two."""
    whole, broken = (
        tiny_config(tiny_data, tmp_path / name, layer=RELORA, optim=optim, **LONG) for name in ("whole", "broken")
    )
    run(whole)
    stop_at(broken, at)
    run(broken)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))
    entry = read_record(tmp_path / "whole" / "record.json")
    frozen = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert entry["model"]["parameters"] - entry["model"]["trained"] == frozen
    assert entry["memory"]["state_bytes"] == entry["memory"]["predicted_state_bytes"]
    assert entry["memory"]["parameter_bytes"] == 4 * entry["model"]["parameters"]


def merges(monkeypatch):
    """The steps before which the first layer is merged."""
    found, plain = [], ReLoRA.before_step

    def watched(self, step, draw):
        names = plain(self, step, draw)
        if names:
            found.append(step)
        return names

    monkeypatch.setattr(ReLoRA, "before_step", watched)
    return found


def test_merges_come_when_they_are_due(tiny_data, tmp_path, monkeypatch):
    """Never after the last step: nobody would train what comes then."""
    found = merges(monkeypatch)
    run(tiny_config(tiny_data, tmp_path / "out", layer={**RELORA, "merge_every": 2}))
    assert found == [step for step in (2, 4, 6) for _ in range(14)]


@pytest.mark.slow
def test_ways_of_training(tiny_data, tmp_path):
    given = {"layer": {**RELORA, "merge_every": 3}, "optim": {"name": "frugal", "gap": 2}}
    ways = {
        "plain": NORMAL,
        "layerwise": LAYERWISE,
        "checkpointing": {**NORMAL, "activation_checkpointing": True},
        "bf16": {**NORMAL, "precision": "bf16"},
    }
    loss = {way: ended(tiny_config(tiny_data, tmp_path / way, train=train, **given)) for way, train in ways.items()}
    assert loss["layerwise"] == loss["checkpointing"] == loss["plain"]
    assert 0 < abs(loss["bf16"] - loss["plain"]) < 2e-2
    once = ended(tiny_config(tiny_data, tmp_path / "once", train=NORMAL, **{**given, "layer": RELORA}))
    assert once != loss["plain"]


@pytest.mark.slow
@pytest.mark.parametrize("layer, backend", [("relora", "ddp"), ("relora", "owned"), ("lora", "owned")])
def test_two_ranks_are_one(tiny_data, tmp_path, layer, backend):
    """With the witness, whose probes are no steps."""
    prune = {"ddp": 1.0, "owned": 0.9}[backend]
    values = {**RELORA, "merge_every": 3, "prune": prune} if layer == "relora" else {"name": "lora", "rank": 4}
    one, two = (
        tiny_config(tiny_data, tmp_path / name, layer=values, backend=backend)
        for name, backend in (("one", {}), ("two", {"name": backend}))
    )
    run(one)
    assert gang.ranks(2, run_status, two.model_dump()) == ["done"] * 2
    ours, theirs = (traces(tmp_path / name) for name in ("two", "one"))
    for a, b in zip(ours[2], theirs[2], strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=2e-5)
    frozen = [name for name in theirs[1]["model"] if "attn.q.weight" in name]
    assert len(frozen) == 2
    for name in frozen:
        assert abs(ours[1]["model"][name] - theirs[1]["model"][name]).max() < 1e-4


@pytest.mark.slow
def test_several_ranks_stopped_at_a_merge(tiny_data, tmp_path):
    layer = {**RELORA, "merge_every": 3}
    whole, broken = (
        tiny_config(tiny_data, tmp_path / name, layer=layer, backend={"name": "owned"}) for name in ("whole", "broken")
    )
    assert gang.ranks(2, run_status, whole.model_dump()) == ["done"] * 2
    assert all("after step 6" in words for words in gang.ranks(2, stopped, broken.model_dump(), 6))
    assert gang.ranks(2, run_status, broken.model_dump()) == ["done"] * 2
    ours, theirs = (whole_run(tmp_path / name) for name in ("broken", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def stopped(tree, step):
    return stop_rank(tree, step) or ""


def whole_run(out):
    from thriftlab.train.checkpoints.reader import latest

    return {
        f"{group}/{key}": t for group, named in latest(out / "checkpoints").tensors.items() for key, t in named.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer, backend, words",
    [("relora", {"name": "deepspeed", "stage": 1}, "change whole weights between steps"),
     ("relora", {"name": "fsdp2"}, "change whole weights between steps"),
     ("lora", {"name": "deepspeed", "stage": 1}, "train every")],
)  # fmt: skip
def test_sharded_weights_are_refused_before_training(tiny_data, tmp_path, layer, backend, words):
    config = tiny_config(tiny_data, tmp_path / "out", layer={"name": layer, "rank": 4}, backend=backend)
    for message in gang.ranks(2, said, config.model_dump()):
        assert words in message and "use backend.name=ddp or backend.name=owned" in message and "\n" not in message
    assert not list((tmp_path / "out").glob("checkpoints/step-*"))


# ------------------------------------------------------------------------------------------------ the schedule


def test_the_jagged_cosine():
    """ReLoRA's: linear from 0 to where the cosine will be after the re-warm-up, and the cosine everywhere else."""
    steps, warm, every, again, final = 2000, 100, 500, 40, 0.1
    horizon = Horizon(steps=steps)
    options = dict(warmup=warm / steps, cycle=every / steps, rewarm=again / steps, final=final)

    def envelope(t):
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (t - warm) / (steps - warm)))

    for step in range(steps):
        t = step + 0.5
        number, since = divmod(t, every)
        if t < warm:
            expected = t / warm
        elif number and since < again:
            expected = since / again * envelope(number * every + again)
        else:
            expected = envelope(t)
        assert jagged(horizon.progress(step, 0.0), **options) == pytest.approx(expected, abs=1e-9), step


def test_without_a_second_cycle_it_is_the_cosine():
    assert all(jagged(p / 100, cycle=1.0) == cosine(p / 100) for p in range(100))


def test_merge_and_schedule_fall_together(tiny_data, tmp_path):
    """The rate of the step after a merge is the first of a rise."""
    schedule = {"name": "jagged", "warmup": 0.0, "cycle": 0.5, "rewarm": 0.25}
    config = tiny_config(tiny_data, tmp_path / "out", layer={**RELORA, "merge_every": 4}, schedule=schedule)
    run(config)
    rates = [line["lr"] for line in traces(tmp_path / "out")[2] if "lr" in line]
    assert rates[4] < rates[5] < rates[6] and rates[3] > rates[4]


def test_a_cycle_that_is_all_rise_is_refused():
    with pytest.raises(ValueError, match="rewarm 0.5 fills the cycle of 0.5"):
        jagged(0.3, cycle=0.5, rewarm=0.5)
