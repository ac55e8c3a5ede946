"""GPT: a decoder-only transformer with RMSNorm, RoPE, SwiGLU and grouped-query attention (the LLaMA block, 2302.13971).

Parameter names are public API: groups of an optimizer are chosen by them. The model builds on `meta`
(`with torch.device("meta"): GPT(config)`) and is filled afterwards by `init_weights`, where every tensor is a function
of (seed, its own name), so that two models with the same seed agree wherever they have a parameter in common.
One surprise: positions are not reset at document borders. RoPE sees differences of positions only, so under the
document mask the logits of a document are those of the document alone.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thriftlab.kernels.embedding import embedding
from thriftlab.kernels.linear_cross_entropy import KEEP_BYTES, linear_cross_entropy
from thriftlab.kernels.rms_norm import rms_norm
from thriftlab.kernels.swiglu import swiglu
from thriftlab.optim.core.hyper import Count
from thriftlab.optim.layers.base import Layer
from thriftlab.optim.state.keys import keyed_generator
from thriftlab.train.attention import Mask, as_dense, attend, continued, document_mask
from thriftlab.train.dropout import dropout

OFF = {"smeared_keys": False}  # written only where it is on: so fingerprints stay what they were before there was one

# LLaMA sizes of the memory-efficient papers (GaLore 2403.03507 and after): 32,000 tokens, no ties, no biases.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": dict(dim=128, layers=4, heads=4, hidden=352, tied=True),
    "micro": dict(dim=256, layers=6, heads=4, kv_heads=2, hidden=704, tied=True, qk_norm=True),
    "llama-60m": dict(dim=512, layers=8, heads=8, hidden=1376, vocab_size=32000),
    "llama-130m": dict(dim=768, layers=12, heads=12, hidden=2048, vocab_size=32000),
    "llama-350m": dict(dim=1024, layers=24, heads=16, hidden=2736, vocab_size=32000),
    "llama-1b": dict(dim=2048, layers=24, heads=32, hidden=5461, vocab_size=32000),
    "llama-7b": dict(dim=4096, layers=32, heads=32, hidden=11008, vocab_size=32000),
}


class ModelConfig(BaseModel):
    """Sizes of one GPT. A preset fills what is not given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str | None = Field("nano", description=f"sizes to start from: {', '.join(PRESETS)}; null: none")
    dim: Count = Field(128, description="width of the residual stream")
    layers: Count = Field(4, description="transformer blocks")
    heads: Count = Field(4, description="query heads; they divide dim")
    kv_heads: Count | None = Field(None, description="key and value heads; they divide heads; null: as many as heads")
    hidden: Count = Field(352, description="width of the SwiGLU layer")
    gate: Literal["silu", "none"] = Field(
        "silu", description="activation of SwiGLU's gate; none, as CoLA has it from 350M on: gate * up"
    )
    vocab_size: Count | None = Field(None, description="rows of the embedding; null: the tokenizer's")
    rope_theta: float = Field(10000.0, gt=1, description="base of the rotary frequencies")
    tied: bool = Field(False, description="embedding and head share one tensor")
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys, per head")
    smeared_keys: bool = Field(False, description="each key mixed with the key before it, by a learned share per head")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon inside RMSNorm")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="before")
    @classmethod
    def fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("preset", "nano")
        if name is not None and name not in list(PRESETS):  # it may be anything, a list too
            raise ValueError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
        return {**(PRESETS[name] if name else {}), **values}

    @model_serializer(mode="wrap")
    def without_the_preset(self, full: Callable[["ModelConfig"], dict[str, Any]]) -> dict[str, Any]:
        """What is not the preset's own, so that a file that was written can be read with another preset."""
        given = OFF | PRESETS.get(self.preset or "", {})
        return {key: value for key, value in full(self).items() if key not in given or given[key] != value}

    def sizes(self) -> dict[str, Any]:
        """All that determines a model, whatever its preset has of it."""
        return {key: value for key, value in self if key not in OFF or value != OFF[key]}

    @model_validator(mode="after")
    def heads_fit(self) -> "ModelConfig":
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} is not an even multiple of heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        return self


class RMSNorm(nn.Module):
    """The scale and epsilon of one `rms_norm`."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Embedding(nn.Embedding):
    """A table whose gradients are summed in fp32, see kernels/embedding.py; of bf16 its rows are fp32 under autocast,
    as all that is no product."""

    def forward(self, input: Tensor) -> Tensor:
        rows = embedding(input, self.weight)
        return rows if torch.is_autocast_enabled(rows.device.type) else rows.to(self.weight.dtype)


def rotary(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """The rotations of all positions, made once for all layers: on a CPU the unit complex numbers
    exp(i * position * frequency), complex64 [length, 1, head_dim / 2]; elsewhere their cosines and sines for every
    channel, fp32 [length, 2, 1, head_dim], the sines with the sign with which a channel takes its neighbour."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device).double() / head_dim)
    angle = torch.outer(torch.arange(length, device=device).double(), frequency)
    if device.type == "cpu":
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None]
    cos, sin = angle.cos(), angle.sin()
    both = torch.stack([torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)], 1)
    return both.float()[:, :, None]


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE (2104.09864): rotate the pairs (x[2i], x[2i + 1]) of x, [batch, seq, head, head_dim].

    A pair is a complex number and a rotation one complex product, on a CPU several times faster than sines and cosines.
    On a GPU compilers fuse no complex numbers, and real ones need no cast of x.
    """
    if rope.is_complex():
        pairs = torch.view_as_complex((x if x.dtype == torch.float64 else x.float()).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)
    neighbours = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * rope[:, 0], neighbours, rope[:, 1]).to(x.dtype)


def smear(k: Tensor, a: Tensor, mask: Mask | None) -> Tensor:
    """Smeared keys (Olsson et al. 2022, 2209.11895): sigmoid(a) k_j + (1 - sigmoid(a)) k_{j-1} for each head.

    The first key stays, and under `mask` the first of each document. Keys are smeared as they are projected, before
    norm and rotation: so a mixed key stands at position j, and scores still depend on differences of positions only.

    Args:
        k: [batch, seq, head, head_dim].
        a: [head].
    """
    back = k[:, :-1] - k[:, 1:]  # [batch, seq - 1, head, head_dim]
    if mask is not None:
        back = back * continued(mask)[:, :, None, None]
    return k + F.pad(back * torch.sigmoid(-a).to(k.dtype)[:, None], (0, 0, 0, 0, 1, 0))


class Attention(nn.Module):
    """Causal grouped-query attention (2305.13245)."""

    watch: Callable[[Tensor, Tensor, Tensor | None], None] | None = None  # is shown queries, keys and mask

    def __init__(self, c: ModelConfig):
        super().__init__()
        kv_heads, head_dim = c.kv_heads or c.heads, c.dim // c.heads
        self.heads, self.kv_heads, self.head_dim = c.heads, kv_heads, head_dim
        self.q = nn.Linear(c.dim, c.heads * head_dim, bias=False)
        self.k = nn.Linear(c.dim, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(c.dim, kv_heads * head_dim, bias=False)
        self.o = nn.Linear(c.heads * head_dim, c.dim, bias=False)
        self.q_norm = RMSNorm(head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.smear = nn.Parameter(torch.empty(kv_heads)) if c.smeared_keys else None

    def forward(self, x: Tensor, rope: Tensor, mask: Mask | None) -> Tensor:  # [batch * seq, dim]
        q = self.q(x).view(-1, len(rope), self.heads, self.head_dim)
        k = self.k(x).view(-1, len(rope), self.kv_heads, self.head_dim)
        v = self.v(x).view(-1, len(rope), self.kv_heads, self.head_dim)
        if self.smear is not None:
            k = smear(k, self.smear, mask)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [batch, head, seq, head_dim]
        if self.watch is not None:
            self.watch(q, k, as_dense(mask))
        return self.o(rearrange(attend(q, k, v, mask), "b h s d -> (b s) (h d)"))


class MLP(nn.Module):
    """SwiGLU (2002.05202), or with `gate="none"` its bilinear relative."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(c.dim, c.hidden, bias=False)
        self.up = nn.Linear(c.dim, c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.dim, bias=False)
        self.product = swiglu if c.gate == "silu" else torch.mul

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.product(self.gate(x), self.up(x)))


class Block(nn.Module):
    """Block `number` of a model, from 0."""

    def __init__(self, c: ModelConfig, number: int, dropout: float):
        super().__init__()
        self.dropout, self.places = dropout, (1 + 2 * number, 2 + 2 * number)
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.attn = Attention(c)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope: Tensor, mask: Mask | None, row_keys: Tensor | None) -> Tensor:
        after_attn, after_mlp = self.places
        x = x + dropout(self.attn(self.attn_norm(x), rope, mask), self.dropout, row_keys, after_attn)
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout, row_keys, after_mlp)


class GPT(nn.Module):
    """The model. `config.vocab_size` must be set."""

    def __init__(
        self,
        config: ModelConfig,
        activation_checkpointing: bool = False,
        loss_keep_bytes: int | None = KEEP_BYTES,
        dropout: float = 0.0,
    ):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set; take it from the tokenizer")
        self.config, self.activation_checkpointing = config, activation_checkpointing
        self.loss_keep_bytes, self.dropout = loss_keep_bytes, dropout
        self.embed = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, number, dropout) for number in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """One tensor for embedding and head, where they are tied; moving a model off `meta` makes two of it."""
        if self.config.tied:
            self.lm_head.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        row_keys: Tensor | None = None,
    ) -> Tensor:
        """Logits, or the loss of every token.

        Args:
            tokens: [batch, seq] int64.
            targets: [batch, seq] int64, negative where nothing is predicted.
            documents: [batch, seq] int64, constant within a document and ascending: tokens see their own document only.
            row_keys: [batch] int64, keys of the dropout of each row, see dropout.py; None: nothing is dropped.

        Returns:
            Without targets logits [batch, seq, vocab]; with them losses in nats, [batch, seq] fp32.
        """
        x = self.embed(tokens.flatten())  # [batch * seq, dim]: of a matrix a Linear is one product and no view
        x = dropout(x, self.dropout, row_keys, place=0)
        rope = rotary(tokens.shape[1], self.config.dim // self.config.heads, self.config.rope_theta, x.device)
        mask = None if documents is None else document_mask(documents)
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, mask, row_keys, use_reentrant=False)
            else:
                x = layer(x, rope, mask, row_keys)
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x).view(*tokens.shape, -1)
        losses = linear_cross_entropy(x, self.lm_head.weight, targets.flatten(), self.loss_keep_bytes)
        return losses.view(tokens.shape)

    @torch.no_grad()
    def init_weights(self, seed: int, share: slice = slice(None)) -> None:
        """Norms 1; smears 0, half and half; all else normal(0, init_std), the two projections back into the residual
        stream / sqrt(2 layers).

        A layer in the place of a Linear starts from the weight that the Linear would have. That can be much work, so of
        these layers only a share is filled where ranks divide them.
        """
        self.tie()
        layers = self.replaced()
        for name, layer in list(layers.items())[share]:
            shape = torch.Size((layer.out_features, layer.in_features))
            weight = self.first_weight(f"{name}.weight", shape, seed)
            weight = weight.to(next(layer.parameters()).device)  # drawn on the CPU, decomposed where the layer is
            layer.load_dense(weight, keyed_generator(seed, f"{name}.weight", 1))
        for name, p in self.named_parameters():
            if name.rpartition(".")[0] not in layers:
                p.copy_(self.first_weight(name, p.shape, seed))

    def replaced(self) -> dict[str, Layer]:
        """The layers in the place of Linears, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Layer)}

    def first_weight(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("attn.smear") else 1.0)
        into_residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
        std = self.config.init_std / (math.sqrt(2 * self.config.layers) if into_residual else 1.0)
        return torch.randn(shape, generator=keyed_generator(seed, name, 0)) * std

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs of one token, forward and backward, counted from the modules (2204.02311, appendix B).

        Six per weight of every Linear (an embedding is a look-up) and twelve per attended position and channel. By that
        paper's convention all `sequence_length` positions count, though the causal mask leaves half of them out, and
        what is no product of matrices, as norms and smeared keys, does not.
        """
        linear = sum(6 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        replaced = sum(layer.flops_per_token() for layer in self.replaced().values())
        return linear + replaced + 12 * self.config.layers * self.config.dim * sequence_length
