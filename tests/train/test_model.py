"""The model against slow float64 references, against Hugging Face's LLaMA, and against its own published sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.tools.transformer import reference_logits
from thriftlab.kernels.rms_norm import rms_norm
from thriftlab.kernels.swiglu import swiglu
from thriftlab.optim import split_groups
from thriftlab.train.config.schema import RunConfig, counted, fingerprint
from thriftlab.train.model import GPT, ModelConfig, document_mask, smear

TINY = dict(preset=None, dim=24, layers=2, heads=4, hidden=40, vocab_size=19)


def make(dtype=torch.float64, **changes):
    model = GPT(ModelConfig(**{**TINY, **changes})).to(dtype)
    model.init_weights(seed=3)
    return model


def tokens(batch=2, length=11, vocab=19, seed=0):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------- sizes

PUBLISHED = {  # GaLore's LLaMA configurations; Hugging Face's LlamaForCausalLM has the same counts
    "llama-60m": 58_073_600,
    "llama-130m": 134_105_856,
    "llama-350m": 367_969_280,
    "llama-1b": 1_339_082_752,
    "llama-7b": 6_738_415_616,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_parameter_counts(preset):
    with torch.device("meta"):
        model = GPT(ModelConfig(preset=preset))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[preset]


def test_nano_is_under_a_million_parameters_with_a_vocabulary_of_two_thousand():
    with torch.device("meta"):
        model = GPT(ModelConfig(preset="nano", vocab_size=1024))
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


def test_a_preset_is_a_start_and_a_given_value_wins():
    config = ModelConfig(preset="llama-60m", layers=2)
    assert (config.dim, config.layers, config.vocab_size) == (512, 2, 32000)
    written = config.model_dump()
    assert ModelConfig.model_validate(written) == config
    assert ModelConfig.model_validate({**written, "preset": "llama-7b"}).dim == 4096


@pytest.mark.parametrize(
    ("bad", "word"), [(dict(heads=5), "heads"), (dict(kv_heads=3), "kv_heads"), (dict(preset="nan"), "presets")]
)
def test_impossible_sizes_are_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        ModelConfig(**{**TINY, **bad})


# --------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("change", [{}, dict(kv_heads=2), dict(kv_heads=1, qk_norm=True), dict(tied=True, heads=2)])
def test_logits_follow_the_equations(change):
    model, x = make(init_std=0.2, **change), tokens()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:  # a weight of one cannot show that it is used
                p.copy_(torch.linspace(0.5, 1.5, p.numel()))
    # The angles are kept in complex64: 2**-24 relative, times a few dozen additions.
    torch.testing.assert_close(model(x), reference_logits(model, x), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------- smeared keys


def smeared(**changes):
    """A model whose heads smear their keys, each by another share."""
    model = make(init_std=0.2, smeared_keys=True, **changes)
    with torch.no_grad():
        for layer, block in enumerate(model.layers):
            block.attn.smear.copy_(torch.linspace(-2.0, 1.5, block.attn.kv_heads) + layer)
    return model


@pytest.mark.parametrize("change", [{}, dict(kv_heads=2), dict(kv_heads=2, qk_norm=True)])
@pytest.mark.parametrize("starts", [(0,), (0, 4, 5, 9)])
def test_smeared_keys_follow_the_equation_within_documents(change, starts):
    model, x = smeared(**change), tokens()
    documents = None
    if len(starts) > 1:
        documents = torch.bucketize(torch.arange(x.shape[1]), torch.tensor(starts[1:]), right=True).expand_as(x)
    expected = reference_logits(model, x, starts)
    torch.testing.assert_close(model(x, documents=documents), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, reference_logits(smeared_off(model), x, starts), atol=1e-2)


def smeared_off(model):
    """The same weights without the smear."""
    plain = make(**{**dict(model.config), "smeared_keys": False})
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if "smear" not in name})
    return plain


def test_a_first_key_is_kept_to_the_bit_and_a_smear_begins_half_and_half():
    k = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    mixed = smear(k, torch.tensor([-1.0, 0.0, 3.0]), document_mask(documents))
    first = torch.tensor([[True, False, True, False, False, False], [True] + [False] * 4 + [True]])
    assert torch.equal(mixed[first], k[first]) and (mixed[~first] != k[~first]).all()
    begin = smear(k, make(smeared_keys=True).layers[0].attn.smear[:3].float(), None)
    torch.testing.assert_close(begin[:, 1:], (k[:, 1:] + k[:, :-1]) / 2)


def test_a_smear_is_one_number_for_each_head_of_keys_and_off_it_is_nothing():
    names = {n: p.shape for n, p in make(smeared_keys=True, kv_heads=2).named_parameters() if "smear" in n}
    assert names == {f"layers.{layer}.attn.smear": (2,) for layer in range(2)}
    on, off = make(smeared_keys=True), make()
    assert on.flops_per_token(32) == off.flops_per_token(32)
    assert all(torch.equal(p, dict(on.named_parameters())[n]) for n, p in off.named_parameters())
    split, rest = split_groups(on, [r"\.(attn|mlp)\."])  # to an optimizer it is a vector, as a norm
    assert "layers.0.attn.smear" in rest["names"] and "layers.0.attn.q.weight" in split["names"]


def test_smeared_keys_change_no_fingerprint_and_no_file_where_they_are_off():
    on, off = RunConfig(model={"smeared_keys": True}), RunConfig()
    assert "smeared_keys" not in counted(off)["model"] and counted(on)["model"]["smeared_keys"] is True
    assert "smeared_keys" not in off.model_dump()["model"]
    assert RunConfig.model_validate(on.model_dump()) == on and fingerprint(on, "") != fingerprint(off, "")


@pytest.mark.slow
def test_logits_equal_hugging_face_llama():
    transformers = pytest.importorskip("transformers")
    model, x = make(torch.float32, kv_heads=2, init_std=0.2), tokens()
    c = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta,
        )
    )  # fmt: skip
    names = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
    attention = {"attn": "self_attn", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    state = {}
    for name, p in model.named_parameters():
        parts = name.split(".")
        if parts[0] != "layers":
            state[f"{names[parts[0]]}.weight"] = p.detach()
            continue
        parts[2] = attention.get(parts[2], parts[2])
        if len(parts) == 5:
            if parts[3] in ("q", "k"):  # they rotate (x[i], x[i + d/2]) where we rotate (x[2i], x[2i + 1])
                heads = c.heads if parts[3] == "q" else c.kv_heads
                p = p.detach().unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            parts[3] += "_proj"
        state["model." + ".".join(parts)] = p.detach()
    theirs.load_state_dict(state)
    torch.testing.assert_close(model(x), theirs(x).logits, rtol=1e-4, atol=1e-5)


def test_documents_see_themselves_only():
    model = make(init_std=0.2)
    x = tokens(batch=1, length=12)
    documents = torch.tensor([[1] * 5 + [2] * 4 + [3] * 3])
    whole = model(x, documents=documents)
    for piece in (slice(0, 5), slice(5, 9), slice(9, 12)):
        torch.testing.assert_close(whole[:, piece], model(x[:, piece]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole[:, 5:], model(x)[:, 5:], atol=1e-3)


# ------------------------------------------------------------------------------------------ initial weights


def test_weights_are_a_function_of_seed_and_name():
    a, b = make(layers=2), make(layers=3)
    shared = dict(b.named_parameters())
    same = [n for n, p in a.named_parameters() if not n.endswith(("o.weight", "down.weight"))]  # scaled by the depth
    assert all(torch.equal(p, shared[n]) for n, p in a.named_parameters() if n in same)
    b.init_weights(seed=4)
    assert not torch.equal(a.embed.weight, b.embed.weight)
    assert not torch.equal(a.layers[0].attn.q.weight, a.layers[1].attn.q.weight)


def test_tied_weights_stay_one_tensor_off_meta():
    with torch.device("meta"):
        model = GPT(ModelConfig(**TINY, tied=True))
    model.to_empty(device="cpu")
    model.init_weights(0)
    assert model.lm_head.weight is model.embed.weight


def test_residual_projections_start_smaller():
    model = make(torch.float32, dim=128, heads=4, hidden=256, layers=8)
    assert model.layers[0].attn.q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[0].mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


# --------------------------------------------------------------------------------------------------- compute


def test_flops_are_those_that_torch_counts():
    model, x = make(torch.float32, dim=64, heads=2, hidden=96), tokens(batch=3, length=32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, x)
    # The backward is twice the forward; torch's plain attention computes the masked half too, as the convention counts.
    assert 3 * counter.get_total_flops() == model.flops_per_token(32) * x.numel()


@pytest.mark.parametrize("documents", [None, torch.arange(11).expand(2, 11) // 4])
def test_checkpointed_activations_give_the_same_gradients(documents):
    x, gradients = tokens(), []
    for recompute in (False, True):
        model = GPT(ModelConfig(**TINY, smeared_keys=True), activation_checkpointing=recompute)
        model.init_weights(0)
        model(x, x, documents).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_compiled_model_gives_the_same_gradients():
    torch._dynamo.reset()  # what the compiler has learnt of sizes in other tests
    x, gradients = tokens(), []
    for compiled in (False, True):
        model = make(torch.float32)
        (torch.compile(model, backend="aot_eager") if compiled else model)(x, x).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_keeps_losses_and_gradients_in_fp32():
    model, x = make(torch.float32), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(x, x)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in model.parameters())
    exact = make(torch.float32)
    torch.testing.assert_close(losses, exact(x, x), rtol=2e-2, atol=2e-2)


# --------------------------------------------------------------------------------------------------- kernels


def test_rms_norm_and_its_gradient():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 6, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 6, generator=g, dtype=torch.float64)
    ours, theirs = rms_norm(x, weight, 1e-3), F.rms_norm(x, (6,), weight, 1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), upstream) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_swiglu_and_its_gradient():
    g = torch.Generator().manual_seed(1)
    gate, up, upstream = torch.randn(3, 7, 6, generator=g, dtype=torch.float64)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    ours, theirs = swiglu(gate, up), gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y, (gate, up), upstream) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
