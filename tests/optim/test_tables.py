"""A rule for embedding and head under every method: Ember against float64, AdamW, the method itself; and FRUGAL's rest.

What is held of every method (resuming, dtypes of the state, refused steps, ranks) is held of these with the makers of
tests/tools/methods.py.
"""

import re

import numpy as np
import pytest
import torch
from torch import nn

from tests.tools.manners import choices
from tests.tools.methods import same, through_a_file
from tests.tools.peers import farthest, groups_of
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import ConfigError
from thriftlab.launch.studies import compare
from thriftlab.optim import METHODS, AdamW, Frugal, Method, Muon, Scale, SignSGD, SinkGD, split_groups, state_bytes
from thriftlab.optim import predicted_state_bytes as predicted
from thriftlab.optim.core.hyper import hyperparameters
from thriftlab.optim.core.listing import listing
from thriftlab.optim.core.tables import Tables
from thriftlab.train.config import parse as settings
from thriftlab.train.config.schema import RunConfig, fingerprint
from thriftlab.train.loop import run
from thriftlab.train.model import GPT, ModelConfig

SHAPES = {"embed": (17, 6), "q": (6, 6), "up": (9, 6), "down": (6, 9), "norm": (6,), "head": (17, 6)}
TABLES = ("embed", "head")
LR, DECAY = 0.02, 0.1
OWN = {name: cls for name, cls in METHODS.items() if cls.__module__.startswith("thriftlab.")}
every_method = pytest.mark.parametrize("name", OWN)
every_rule = pytest.mark.parametrize("tables", Tables.__args__)


def gradient(name, step, dtype=torch.float64):
    rng = np.random.default_rng(100 * step + list(SHAPES).index(name))
    grad = rng.normal(size=SHAPES[name]) * 10.0 ** rng.integers(-2, 2)
    if name == "embed":
        grad[rng.permutation(len(grad))[:9]] = 0.0
    return torch.tensor(grad, dtype=dtype)


def parameters(dtype=torch.float64):
    return {name: nn.Parameter(gradient(name, 99, dtype)) for name in SHAPES}


def train(params, optimizer, steps):
    for step in steps:
        for name, p in params.items():
            p.grad = gradient(name, step, p.dtype)
        optimizer.step()
    return {name: p.detach().clone() for name, p in params.items()}


def made(name, params, groups=None, **hyper):
    """A method by which these small matrices are split."""
    small = {"lr": LR, "rank": 2, "gap": 3, "density": 0.5, "weight_decay": DECAY, "iteration": "fp32"}
    known = {key: value for key, value in small.items() if key in hyperparameters(OWN[name])}
    return OWN[name](groups or groups_of(params), **{**known, **hyper})


def ember(w, grads, *, lr, floor=0.0, b2=0.999, eps=1e-8):
    """The weight after each step, entry by entry; a mean of its own for all."""
    r, c, a, found = np.zeros(len(w)), np.zeros(w.shape[1]), 0.0, []
    for t, g in enumerate(grads, 1):
        r = b2 * r + (1 - b2) * (g**2).mean(1)
        c = b2 * c + (1 - b2) * (g**2).mean(0)
        a = b2 * a + (1 - b2) * (g**2).mean()
        w = (1 - LR * DECAY) * w
        for i in range(len(w)):
            for j in range(w.shape[1]):
                square = max(r[i], floor * a) * c[j] / (max(a, 1e-30) * (1 - b2**t))
                w[i, j] -= lr * g[i, j] / (np.sqrt(square) + eps)
        found.append(w.copy())
    return found


@pytest.mark.parametrize("floor", [0.0, 0.3])
@every_method
def test_ember_is_its_equations_in_float64_under_every_method(name, floor):
    params = parameters()
    optimizer = made(name, params, tables="ember", row_floor=floor)
    group = {"betas": (0.9, 0.999), "eps": 1e-8, **optimizer.param_groups[0]}
    known = dict(floor=floor, b2=group["betas"][1], eps=group.get("adam_eps", group["eps"]))
    grads = {table: [gradient(table, step).numpy() for step in range(12)] for table in TABLES}
    want = {table: ember(params[table].detach().numpy().copy(), grads[table], lr=LR, **known) for table in TABLES}
    for step in range(12):
        train(params, optimizer, [step])
        for table in TABLES:
            assert np.allclose(params[table].detach().numpy(), want[table][step], rtol=1e-12, atol=1e-12), (step, table)
    assert sorted(optimizer.state[params["embed"]]) == ["column_sq", "row_sq", "step"]


def test_plain_lr_scale_is_of_tables_by_another_rule():
    params = parameters()
    optimizer = made("scale", params, tables="ember", plain_lr_scale=3.0)
    w = params["head"].detach().numpy().copy()
    want = ember(w, [gradient("head", step).numpy() for step in range(4)], lr=3 * LR)
    assert np.allclose(train(params, optimizer, range(4))["head"], want[-1], rtol=1e-12, atol=1e-12)


def test_the_trajectory_of_the_published_code():
    far = farthest("ember", lambda params: AdamW(groups_of(params), lr=1e-3, tables="ember"), lr=1e-3)
    assert max(far.values()) <= 5e-4, far


def test_on_squares_of_rank_one_ember_is_rmsprop():
    """W <- W - lr G / (sqrt(V^) + eps), V the mean of G^2: where G^2 = x y^T in every step."""
    p = nn.Parameter(torch.zeros(9, 6, dtype=torch.float64))
    optimizer, v, w = SignSGD([{"params": [p], "role": "input"}], lr=LR, tables="ember"), 0.0, torch.zeros_like(p)
    x, y = (torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) + 0.1 for n in (9, 6))
    for step in range(8):
        signs = torch.randn(9, 6, generator=torch.Generator().manual_seed(step)).sign()
        p.grad = 3.0**step * torch.outer(x, y).sqrt() * signs
        optimizer.step()
        v = 0.999 * v + 0.001 * p.grad.square()
        w = w - LR * p.grad / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        assert torch.allclose(p, w, rtol=1e-12, atol=1e-12)


@every_method
def test_other_tensors_do_not_know_who_steps_the_tables(name):
    ends = []
    for tables in (None, *Tables.__args__):
        params = parameters(torch.float32)
        ends.append(train(params, made(name, params, **{"tables": tables} if tables else {}), range(7)))
    for end in ends[1:]:
        assert all(torch.equal(end[key], ends[0][key]) for key in SHAPES if key not in TABLES)


@pytest.mark.parametrize(("tables", "kept"), [("adamw", "fp32"), ("8bit", "8bit")])
@every_method
def test_adamw_is_that_of_the_rest_or_of_torch_in_8_bits_or_not(name, tables, kept):
    params, others = parameters(torch.float32), parameters(torch.float32)
    optimizer = made(name, params, tables=tables)
    if "split" in optimizer.defaults:  # what is in no role is as the rest
        groups = [{key: value for key, value in group.items() if key != "role"} for group in groups_of(others)]
        other = made(name, others, groups=[{**group, "state_dtype": kept} for group in groups])
    else:
        hyper = {key: value for key, value in optimizer.defaults.items() if key in ("betas", "eps")}
        other = AdamW(groups_of(others), lr=LR, weight_decay=DECAY, state_dtype=kept, **hyper)
    got, want = train(params, optimizer, range(7)), train(others, other, range(7))
    for table in TABLES:
        assert torch.equal(got[table], want[table])
        assert same(optimizer.state[params[table]], other.state[others[table]])


@every_method
def test_own_is_the_method_as_it_steps_matrices(name):
    """SCALE has a step of its own for each of the two, and needs to know which is which."""
    params, others = parameters(torch.float32), parameters(torch.float32)
    got = train(params, made(name, params, tables="own"), range(7))
    groups = groups_of(others)
    if name != "scale":
        groups = [{**g, "role": "matrix", "split": True} if g["role"] in ("input", "output") else g for g in groups]
    want = train(others, made(name, others, groups=groups), range(7))
    assert same(got, want)


@every_rule
@every_method
def test_state_is_as_declared_and_comes_back_through_a_file_to_the_bit(name, tables):
    for setting in choices(OWN[name], "state_dtype")[:: 1 if tables == "ember" else 2]:
        params, others = parameters(torch.float32), parameters(torch.float32)
        optimizer = made(name, params, tables=tables, **setting)
        train(params, optimizer, range(4))
        assert state_bytes(optimizer) == predicted(optimizer)
        kept = sum(t.nbytes for t in optimizer.state[params["embed"]].values() if t.ndim)
        full = {"bf16": 2 * 2 * 102, "8bit": 2 * (102 + 4)}.get(setting.get("state_dtype"), 2 * 4 * 102)
        assert kept == {"adamw": full, "8bit": 2 * (102 + 4), "ember": 4 * (17 + 6)}.get(tables, kept)
        saved = through_a_file(optimizer.state_dict())
        with torch.no_grad():
            for key, p in others.items():
                p.copy_(params[key])
        again = made(name, others, tables=tables, **setting)
        again.load_state_dict(saved)
        assert same(train(params, optimizer, range(4, 9)), train(others, again, range(4, 9)))


def test_a_file_from_before_there_was_a_choice_does_not_decide_who_is_split():
    params = parameters(torch.float32)
    optimizer = made("muon", params, tables="own")
    optimizer.load_state_dict(made("muon", params).state_dict())
    assert [group["split"] for group in optimizer.param_groups if group["role"] != "vector"] == [True] * 3
    train(params, optimizer, range(1))
    assert "momentum_buffer" in optimizer.state[params["embed"]]


@every_rule
def test_a_state_from_before_there_was_a_choice_is_read(tables):
    """Where it is AdamW's it goes on, in 8 bits from then on if so asked; where it is not what is asked for, it is
    refused by name."""
    params = parameters(torch.float32)
    before = made("muon", params)
    train(params, before, range(3))
    saved = before.state_dict()
    assert "tables" not in saved["param_groups"][0]
    after = made("muon", params, tables=tables)
    if tables in ("ember", "own"):
        with pytest.raises(ValueError, match="embed.weight"):
            after.load_state_dict(saved)
    else:
        after.load_state_dict(saved)
        assert after.state[params["embed"]]["exp_avg"].dtype == (torch.uint8 if tables == "8bit" else torch.float32)
        train(params, after, range(3, 5))


HOSTILE = [(1, 7), (7, 1), (1, 1), (5, 3), (4000, 1), (0, 4), (4, 0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", HOSTILE)
def test_ember_on_hostile_shapes_and_rows(shape, dtype):
    """Zeros stay, one-hot rows and sizes from 1e-18 to what overflows stay finite."""
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = SignSGD([{"params": [p], "role": "output"}], lr=0.5, tables="ember")
    for step, size in enumerate((0.0, 1e-18, 1.0, 1e15, 1e25, 1.0)):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype) * size
        if min(shape) > 1:
            grad[0] = 0.0
            grad[1, 1:] = 0.0
        p.grad = grad
        optimizer.step()
        assert p.isfinite().all(), size
    if min(shape) > 1:
        assert not p[0].any()


def test_rows_of_a_table_that_is_stepped_in_pieces():
    draw = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(5000, 70))
    p.grad = torch.randn(5000, 70, generator=draw)
    SignSGD([{"params": [p], "role": "input"}], lr=0.5, tables="ember").step()
    square = p.grad.double().square()
    want = -0.5 * p.grad / (square.mean(1, keepdim=True) * square.mean(0) / square.mean()).sqrt()
    assert torch.allclose(p.double(), want, rtol=1e-5, atol=0)


def test_a_rare_row_does_not_step_far_with_a_floor():
    """First seen at step 100, when its mean square is a hundredth of the others'."""
    steps = []
    for floor in (0.0, 1.0):
        p, hyper = nn.Parameter(torch.zeros(8, 4)), dict(lr=1.0, betas=(0.9, 0.99), row_floor=floor)
        optimizer = AdamW([{"params": [p], "role": "input"}], tables="ember", **hyper)
        for step in range(101):
            p.grad = torch.ones(8, 4)
            p.grad[0] = float(step == 100)
            optimizer.step()
        steps.append(-p[0, 0].item())
    assert steps[0] > 7 and steps[1] < 1.1


@pytest.mark.parametrize("rule", ["lion", "sgdm", "adam"])
def test_frugals_rule_for_the_rest_is_the_rule(rule):
    """Equal to its matrices when all of a matrix is state-full; Adam's is AdamW's step to the bit."""
    params, others = parameters(), parameters()
    hyper = dict(lr=LR, weight_decay=DECAY, rule=rule, betas=(0.8, 0.95))
    got = train(params, Frugal(groups_of(params), plain="rule", split_lr_scale=0.5, **hyper), range(9))
    whole = [{**group, "split": True} for group in groups_of(others)]
    want = train(others, Frugal(whole, subspace="columns", density=1.0, gap=1000, **hyper), range(9))
    for table in TABLES:
        assert torch.allclose(got[table], want[table], rtol=1e-13, atol=1e-13)
    if rule == "adam":
        params, others = parameters(torch.float32), parameters(torch.float32)
        got = train(params, Frugal(groups_of(params), plain="rule", **hyper), range(5))
        assert same(got, train(others, Frugal(groups_of(others), **hyper), range(5)))


def test_frugals_rule_for_the_rest_gives_way_to_one_for_tables():
    params = parameters(torch.float32)
    optimizer = Frugal(groups_of(params), rule="lion", plain="rule", tables="adamw")
    train(params, optimizer, range(2))
    assert sorted(k for k, t in optimizer.state[params["head"]].items() if t.ndim) == ["exp_avg", "exp_avg_sq"]
    assert [k for k, t in optimizer.state[params["norm"]].items() if t.ndim] == ["exp_avg"]
    with pytest.raises(ValueError, match="embed.weight: plain='rule' of rule='lion', and the state is AdamW's"):
        saved = Frugal(groups_of(params), rule="lion")
        train(params, saved, range(1))
        Frugal(groups_of(params), rule="lion", plain="rule").load_state_dict(without_plain(saved.state_dict()))


def without_plain(saved):
    for group in saved["param_groups"]:
        del group["plain"]
    return saved


@pytest.mark.parametrize(("hyper", "said"), [
    ({"tables": "adam"}, "tables='adam': embedding and head have one of adamw, ember, own, 8bit"),
    ({"tables": "own", "row_floor": 0.1}, "row_floor=0.1"),
    ({"tables": "ember", "row_floor": 1.5}, "row_floor=1.5"),
])  # fmt: skip
def test_what_has_no_meaning_is_one_line(hyper, said):
    with pytest.raises(ValueError, match=said):
        Muon(groups_of(parameters()), **hyper)


def model(tied=False):
    made = GPT(ModelConfig(preset=None, dim=8, layers=2, heads=2, hidden=12, vocab_size=19, tied=tied))
    made.init_weights(0)
    return made


def test_a_tied_table_is_one_and_what_is_chosen_is_said():
    groups = split_groups(model(tied=True), ["attn|mlp"], roles=True)
    assert [group["role"] for group in groups] == ["matrix", "output", "vector"]
    said = listing(Muon(groups, tables="ember"))
    assert "tables=ember: embed.weight (12% of the parameters)" in said and "full AdamW for 5 of 20" in said
    scale = Scale(split_groups(model(), ["attn"], roles=True), tables="8bit")
    assert "tables=8bit: embed.weight, lm_head.weight" in listing(scale)
    assert "tables=adamw: embed" in listing(SignSGD(split_groups(model(), ["attn"], roles=True), tables="adamw"))
    assert "tables" not in listing(SinkGD(split_groups(model(), ["attn"], roles=True), tables="adamw"))
    assert "no effect: no group says whether" in listing(Muon(split_groups(model(), ["attn"]), tables="ember"))


def test_a_method_of_ones_own_has_the_choice():
    class Walk(Method):
        def __init__(self, params, lr=0.1):
            super().__init__(params, lr=lr)

        def update(self, names, weights, grads, states, group):
            torch._foreach_add_(weights, grads, alpha=-group["lr"])

        def spec(self, shape, dtype, **overrides):
            return {}

    params = parameters()
    optimizer = Walk(groups_of(params), tables="ember")
    train(params, optimizer, range(2))
    assert state_bytes(optimizer) == predicted(optimizer) == 2 * 8 * (17 + 6)


# ------------------------------------------------------------------------------------------------------------- a run


def test_fingerprints_are_those_of_before_unless_a_rule_is_chosen():
    for name in OWN:
        plain = RunConfig(optim={"name": name})
        written = plain.model_dump(mode="json")["optim"]
        assert not {"row_floor", "plain"} & written.keys() and ("tables" in written) == (name == "rmnp")
        chosen = RunConfig(optim={"name": name, "tables": "ember"})
        assert RunConfig(**chosen.model_dump(mode="json")) == chosen
        assert fingerprint(chosen, "data") != fingerprint(plain, "data")


@pytest.mark.parametrize(("optim", "words"), [
    ({"name": "muon", "tables": "ember"}, "tables=ember: embed.weight"),
    ({"name": "muon", "tables": "own"}, "full AdamW for 5 of"),
    ({"name": "frugal", "tables": "own", "rule": "lion", "plain": "rule"}, ""),
    ({"name": "rmnp", "tables": "8bit"}, "tables=8bit"),
])  # fmt: skip
def test_a_run_by_its_configuration(tiny_data, tmp_path, capsys, optim, words):
    memory = run(tiny_config(tiny_data, tmp_path / "out", optim=optim))["memory"]
    assert memory["state_bytes"] == memory["predicted_state_bytes"]
    assert words in capsys.readouterr().err


def test_a_comparison_gives_each_method_its_own_rule():
    words = ["adamw", "muon", "rmnp", "frugal", "--budget", "tokens=1e5"]
    given = ["optim.tables=8bit", "muon.tables=ember", "muon.row_floor=0.1", "rmnp.tables=own", "frugal.plain=rule"]
    arms = {arm.name: arm.tree["optim"] for arm in compare.make_request(settings.read([*words, *given])).arms}
    assert arms["adamw"] == {"name": "adamw", "tables": "8bit"} and arms["rmnp"]["tables"] == "own"
    assert arms["muon"] == {"name": "muon", "tables": "ember", "row_floor": 0.1} and arms["frugal"]["plain"] == "rule"
    for wrong, said in (
        ("muon.plain=rule", "unknown key 'muon.plain'"),
        ("muon.tables=adam", "it takes adamw | ember"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            compare.make_request(settings.read([*words, wrong]))


def test_a_floor_without_ember_is_one_line(tiny_data, tmp_path):
    with pytest.raises(ConfigError, match="row_floor=0.1: a number from 0 to 1, and of tables='ember' alone"):
        run(tiny_config(tiny_data, tmp_path / "out", optim={"name": "muon", "row_floor": 0.1}))
