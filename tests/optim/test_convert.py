"""Whole models with layers in the place of Linears: which, how many parameters, rebuilt, exported, Hugging Face's."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tools.layers import BLOCKS, RANKS, as_printed, on_meta, parameters, tiny, tokens
from thriftlab.optim import LAYERS, AdamW, CoLA, LowRank, convert, convert_lost, split_groups
from thriftlab.optim.core.hyper import hyperparameters
from thriftlab.optim.layers.base import describe, export, rebuild
from thriftlab.optim.layers.factored import Folded
from thriftlab.optim.layers.lost import LostLinear, activation_score
from thriftlab.train.model import GPT, PRESETS, ModelConfig

PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")


class Pair(nn.Module):
    """Two Linears of one shape, in a row."""

    def __init__(self, **kwargs):
        super().__init__()
        self.first, self.second = (nn.Linear(24, 24, bias=False, **kwargs) for _ in range(2))

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


# ------------------------------------------------------------------------------------------------ counts of LLaMA


METHODS = {"full": None, "cola": CoLA, "lowrank": LowRank, "lost": LostLinear}
# millions of parameters, and GB of six bytes each (bf16 weight and two moments), as printed; what the papers' tables
# have (full, low-rank, CoLA) agrees after rounding
PRINTED = {
    "full": ["58.07 0.35", "134.11 0.80", "367.97 2.21", "1339.08 8.03", "6738.4 40.4"],
    "lowrank": ["42.77 0.26", "94.00 0.56", "185.22 1.11", "609.31 3.66", "2820.9 16.9"],
    "cola": ["42.77 0.26", "94.00 0.56", "185.22 1.11", "609.31 3.66", "2820.9 16.9"],
    "lost": ["43.016 0.258", "94.784 0.569", "188.182 1.129", "621.140 3.727", "2884.5 17.31"],
}
SMALLER = {"llama-60m": 124, "llama-130m": 251, "llama-350m": 249, "llama-1b": 499, "llama-7b": 998}


@pytest.mark.parametrize("preset", RANKS)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_memory_of_llama(method, preset):
    model = on_meta(preset)
    if method != "full":
        converted = convert(model, METHODS[method], BLOCKS, rank=RANKS[preset]).converted
        assert converted == [f"layers.{i}.{name}" for i in range(model.config.layers) for name in PROJECTIONS]
    count, gigabytes = PRINTED[method][list(RANKS).index(preset)].split()
    assert as_printed(parameters(model) / 1e6, count) == count
    assert as_printed(6 * parameters(model) / 1e9, gigabytes) == gigabytes


def test_parameters_of_60m_to_the_digit():
    model = on_meta("llama-60m")
    convert_lost(model, rank=128)
    assert parameters(model) == 43_016_192


@pytest.mark.slow
@pytest.mark.parametrize("preset", RANKS)
def test_the_rank_at_which_lost_is_no_larger_than_cola(preset):
    cola = on_meta(preset)
    convert(cola, CoLA, BLOCKS, rank=RANKS[preset])
    larger = []
    for rank in (SMALLER[preset], SMALLER[preset] + 1):
        model = on_meta(preset)
        convert_lost(model, rank)
        larger.append(parameters(model) > parameters(cola))
    assert larger == [False, True]


@pytest.mark.parametrize(
    "preset, linears, whole",
    [("llama-60m", 0.405, 0.656), ("llama-130m", 0.537, 0.656), ("llama-350m", 0.405, 0.483),
     ("llama-1b", 0.406, 0.447), ("llama-7b", 0.405, 0.423)],
)  # fmt: skip
def test_flops_of_llama(preset, linears, whole):
    """LOST's over the dense model's: of the replaced layers, and of all, with head and attention at 256 tokens."""
    dense, lost = on_meta(preset), on_meta(preset)
    convert_lost(lost, rank=RANKS[preset])
    replaced = [m for m in lost.modules() if isinstance(m, LostLinear)]
    ours = sum(m.flops_per_token() for m in replaced)
    assert ours == sum(6 * (m.rank * (m.in_features + m.out_features) + m.channels * m.out_features) for m in replaced)
    assert round(ours / sum(6 * m.in_features * m.out_features for m in replaced), 3) == linears
    assert round(lost.flops_per_token(256) / dense.flops_per_token(256), 3) == whole


# ------------------------------------------------------------------------------------------------ what is converted


def test_names_order_mode_and_what_is_not_meant_stay():
    model = tiny().eval()
    names = [name for name, _ in model.named_modules()]
    head, embedding = model.lm_head, model.embed
    done = convert_lost(model, rank=4)
    assert done.converted == [f"layers.{i}.{name}" for i in (0, 1) for name in PROJECTIONS] and not done.left
    assert [name for name, _ in model.named_modules()] == names
    assert model.lm_head is head and model.embed is embedding
    assert not any(m.training for m in model.modules())
    logits = model(tokens())
    logits.sum().backward()
    assert logits.shape == (2, 9, 19)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_second_conversion_changes_nothing():
    model = tiny()
    convert_lost(model, rank=4, include=BLOCKS)
    layers = [m for m in model.modules() if isinstance(m, LostLinear)]
    again = convert_lost(model, rank=4, include=BLOCKS)
    assert not again.converted and not again.left
    assert all(a is b for a, b in zip(layers, (m for m in model.modules() if isinstance(m, LostLinear)), strict=True))


def test_what_is_left_says_why():
    tied = tiny(tied=True)
    assert convert_lost(tied, rank=4, exclude=()).left == {"lm_head": "its weight is tied"}
    model = nn.ModuleDict(
        {"good": nn.Linear(24, 24), "small": nn.Linear(24, 4), "hooked": nn.Linear(24, 24), "other": Pair()}
    )
    model["shared"] = model["other"].first
    model["hooked"].register_forward_hook(lambda *args: None)
    model["attention"] = nn.MultiheadAttention(24, 2)
    done = convert_lost(model, rank=4)
    assert done.converted == ["good", "other.second"]
    assert done.left == {
        "small": "120 parameters are not fewer than 100",
        "hooked": "it has hooks, which would be lost",
        "other.first": "its weight is tied",
        "attention.out_proj": "it is a NonDynamicallyQuantizableLinear",
    }
    assert all(model.get_submodule(name).weight is not None for name in done.left)


def test_a_layer_of_equal_size_is_left():
    """12 (24 + 24) = 24 * 24."""
    assert "576 parameters are not fewer than 576" in convert(Pair(), LowRank, rank=12).left["first"]
    assert convert(Pair(), LowRank, rank=11).converted == ["first", "second"]


@pytest.mark.parametrize(
    "arguments", [{"include": ("atn",)}, {"include": ("attn", "mpl")}, {"gamma": {"atn": 0.5, "": 0.7}}]
)
def test_a_pattern_that_is_found_nowhere_is_refused(arguments):
    with pytest.raises(ValueError, match="matches no Linear; near: "):
        convert_lost(tiny(), rank=4, **arguments)


def test_hyperparameters_by_name():
    model = tiny()
    convert_lost(
        model, rank=lambda name, linear: min(linear.weight.shape) // (4 if "attn" in name else 8),
        gamma={r"attn\.": 0.5, "": 0.9}, act={"mlp": "silu", "": "none"},
    )  # fmt: skip
    attention, mlp = model.layers[1].attn, model.layers[1].mlp
    assert (attention.q.rank, attention.q.gamma, attention.q.act) == (8, 0.5, "none")
    assert (mlp.down.rank, mlp.down.gamma, mlp.down.act) == (4, 0.9, "silu")
    with pytest.raises(ValueError, match="gamma: none of its patterns is found in 'layers.0.mlp.gate'"):
        convert_lost(tiny(), rank=4, gamma={"attn": 0.5})


def test_channels_by_a_function_of_data():
    """E x_j^2 |W_:j|^2, of the inputs that a layer sees in the model."""
    model = Pair()
    batches = [torch.randn(5, 3, 24) * torch.arange(24.0).roll(7) for _ in range(3)]
    expected = {}
    x = torch.cat(batches).flatten(0, -2).double()
    for name, inputs in (("first", x), ("second", F.relu(x @ model.first.weight.T.double()))):
        weight = model.get_submodule(name).weight.detach().double()
        expected[name] = (inputs.square().sum(0) * weight.square().sum(0)).argsort(descending=True)[:6].sort().values
    done = convert_lost(model, rank=4, density=0.25, score=activation_score(model, batches))
    assert done.converted == ["first", "second"], "no hook is left behind"
    assert torch.equal(model.first.sp_index, expected["first"]) and not torch.equal(*expected.values())
    assert torch.equal(model.second.sp_index, expected["second"])


@pytest.mark.parametrize("options", [{}, {"score": "random", "init_gain": "dense"}])
def test_a_layer_is_a_function_of_seed_and_name(options):
    """Not of the order of conversion, nor of what else is converted."""
    whole, parts, other = tiny(), tiny(), tiny()
    convert_lost(whole, rank=4, density=0.2, **options)
    for pattern in (r"mlp\.down", "attn", "mlp"):
        convert_lost(parts, rank=4, density=0.2, include=(pattern,), **options)
    assert all(torch.equal(a, parts.state_dict()[name]) for name, a in whole.state_dict().items())
    convert_lost(other, rank=4, density=0.2, seed=1, **options)
    same = torch.equal(whole.layers[0].attn.q.sp_index, other.layers[0].attn.q.sp_index)
    assert same == (not options)


def test_a_built_model_is_a_converted_one():
    """`init_weights` fills empty layers as `convert` fills them from the Linears of the same seed."""
    built, converted = tiny(), tiny()
    with torch.device("meta"):
        built = GPT(built.config)
    options = dict(rank=4, density=0.2, score="random", init_gain="dense")
    for model in (built, converted):
        convert_lost(model, **options)
    built.to_empty(device="cpu")
    built.init_weights(0)
    assert all(torch.equal(a, converted.state_dict()[name]) for name, a in built.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_bias_and_the_need_of_gradients_are_kept(dtype):
    model = nn.Sequential(nn.Linear(24, 24, dtype=dtype), nn.Linear(24, 24, bias=False, dtype=dtype))
    model[0].requires_grad_(False)
    bias = model[0].bias.clone()
    convert_lost(model, rank=4)
    assert {p.dtype for p in model.parameters()} == {dtype} and torch.equal(model[0].bias, bias)
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[1].parameters()) and model[1].bias is None


# ------------------------------------------------------------------------------------------------ saved and rebuilt


@pytest.mark.parametrize("method", ["lost", "cola", "lowrank"])
def test_every_hyperparameter_is_an_attribute_of_its_layer(method):
    """Which `describe` relies upon."""
    layer = LAYERS[method](32, 24)
    assert all(hasattr(layer, key) for key in hyperparameters(type(layer)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_described_model_is_rebuilt_and_loaded(device, tmp_path):
    model = tiny()
    options = dict(gamma={"attn": 0.5, "": 0.9}, act={"mlp": "silu", "": "none"}, init_gain="dense", multiple=2)
    options["score"] = {"attn": torch.arange(32), "": "random"}
    convert_lost(model, rank={"attn": 4, "": 0.2}, density=0.2, include=BLOCKS, **options)
    (tmp_path / "layers.json").write_text(json.dumps(describe(model)))
    torch.save(model.state_dict(), tmp_path / "model.pt")

    with torch.device(device):
        fresh = GPT(model.config)
    rebuild(fresh, json.loads((tmp_path / "layers.json").read_text()))
    assert {t.device.type for t in (*fresh.parameters(), *fresh.buffers())} == {device}
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    fresh.load_state_dict(state, assign=device == "meta")
    assert torch.equal(fresh(tokens()), model(tokens()))
    for name, entry in describe(model).items():  # a tensor is left out
        assert describe(fresh)[name] == {"score": "rest_l2"} | entry
    assert fresh.layers[0].attn.q.sp_index.tolist() == list(range(26, 32)), "the channels came with the state"


def test_what_cannot_be_rebuilt_is_named():
    entry = {"layer": "lost", "rank": 4}
    with pytest.raises(ValueError, match="'layers.7.attn.q' is no Linear of this model"):
        rebuild(tiny(), {"layers.7.attn.q": entry})
    with pytest.raises(ValueError, match="layers.0.attn.q: there is no layer method 'found'; there are"):
        rebuild(tiny(), {"layers.0.attn.q": entry | {"layer": "found"}})


# ------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("act", ["silu", "gelu", "relu2", "none"])
@pytest.mark.parametrize("method", ["lost", "cola"])
def test_an_exported_layer_is_plain_torch_with_the_same_output(method, act):
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24, bias=False))
    convert(model, LAYERS[method], rank=5, act=act)
    x = torch.randn(7, 24)
    before = model(x)
    export(model)
    assert all(type(layer) is Folded for layer in model)
    torch.testing.assert_close(model(x), before)
    rows = torch.export.Dim("rows")
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: rows},))
    operations = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert {"aten"} == operations, "nothing of this package is in the graph"
    torch.testing.assert_close(program.module()(x[:4]), before[:4])


def test_an_exported_layer_is_pickled(tmp_path):
    layer = LostLinear(24, 32, rank=5, act="relu2")
    layer.load_dense(torch.randn(32, 24), torch.Generator())
    torch.save(layer.export(), tmp_path / "layer.pt")
    x = torch.randn(3, 24)
    torch.testing.assert_close(torch.load(tmp_path / "layer.pt", weights_only=False)(x), layer(x))


# ------------------------------------------------------------------------------------------------ with the rest


@pytest.mark.slow
def test_a_converted_model_compiles_as_one_graph():
    model = tiny()
    convert_lost(model, rank=4)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (model, compiled):
        call(tokens(), tokens()).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gate_without_an_activation_is_a_product():
    """CoLA's SwiGLU from 350M on."""
    plain, gated = tiny(gate="none"), tiny()
    for model, expected in ((plain, lambda g: g), (gated, F.silu)):
        mlp, x = model.layers[0].mlp, torch.randn(5, 32, requires_grad=True)
        reference = (expected(x @ mlp.gate.weight.T) * (x @ mlp.up.weight.T)) @ mlp.down.weight.T
        torch.testing.assert_close(mlp(x), reference)
        leaves = (x, *mlp.parameters())
        for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (mlp(x), reference)), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="gate"):
        ModelConfig(gate="relu")


# ------------------------------------------------------------------------------------------------ Hugging Face


def llama(**kwargs):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **kwargs,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_of_hugging_face(tied, tmp_path):
    model = llama(tie_word_embeddings=tied)
    done = convert_lost(model, rank=4)
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert sorted(done.converted) == sorted(f"model.layers.{i}.{name}" for i in (0, 1) for name in projections)
    assert not done.left and type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    ids = tokens(vocab=61)
    optimizer = AdamW(split_groups(model, include=[r"_proj\."], exclude=[]), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]

    model.save_pretrained(tmp_path)
    fresh = llama(tie_word_embeddings=tied)
    rebuild(fresh, describe(model))
    from safetensors.torch import load_file

    missing, unexpected = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert missing == (["lm_head.weight"] if tied else []) and not unexpected
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert sum("sp_index" in name for name in fresh.state_dict()) == 14


@pytest.mark.slow
def test_an_exported_llama_generates_the_same():
    model = llama()
    convert_lost(model, rank=4)
    ids = tokens(vocab=61)
    with torch.no_grad():
        before = model(ids).logits
        export(model)
        torch.testing.assert_close(model(ids).logits, before)
    assert not any(re.search("sp_|lr_", name) for name in model.state_dict())


def test_presets_are_those_that_are_counted():
    assert {name for name in PRESETS if name.startswith("llama")} == set(RANKS)
