"""Causal attention, within documents or not, and the mask that keeps documents apart.

On a CPU the mask is dense, and one call of torch's attention takes it: this is the reference. On a GPU a dense mask
would keep attention from its fast kernels and be as large as the scores. There the mask is a table of blocks for
`flex_attention`, made once a micro-batch: which pairs of blocks have nothing in common, which everything, and which are
looked at entry by entry. flex_attention is compiled by torch, which needs a C compiler.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from thriftlab.optim.state.keys import has_data

BLOCK = 128  # rows and columns of a block
Mask = Tensor | BlockMask
NOWHERE = 2**62  # the document of what is filled up
FLASH_HEAD_DIM = 256  # the largest that torch's flash kernel takes


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """Causal grouped-query attention, [batch, head, seq, head_dim]; without a mask every position sees all before it.

    Args:
        k, v: with as many heads as q, or a divisor of that number.
        mask: of `document_mask`.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        if torch.compiler.is_compiling():  # which compiles this too
            return flex_attention(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, enable_gqa=grouped)
        if has_data(q):
            return compiled_flex()(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, enable_gqa=grouped)
        mask = None  # fake tensors have shapes alone, and without a mask they are the same
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """Attention that reads a block mask. As it is, not compiled, it would hold all scores."""
    return torch.compile(flex_attention)  # type: ignore[return-value]


def document_mask(documents: Tensor) -> Mask:
    """Who may see whom: the same document, and not later.

    Args:
        documents: [batch, seq] int64, the number of each token's document, ascending.
    """
    return dense_mask(documents) if documents.device.type == "cpu" else block_mask(documents)


def continued(mask: Mask) -> Tensor:
    """Whether a token has its document in common with the one before it, [batch, seq - 1]."""
    if not isinstance(mask, BlockMask):
        return mask.diagonal(-1, -2, -1)[:, 0]
    rows, places = rows_and_places(mask)
    return mask.mask_mod(rows[:, None], rows[:1], places[1:], places[:-1])


def as_dense(mask: Mask | None) -> Tensor | None:
    """True where query may see key, [batch, 1, seq, seq], of any mask; for those who look at every pair."""
    if not isinstance(mask, BlockMask):
        return mask
    rows, places = rows_and_places(mask)
    return mask.mask_mod(rows[:, None, None, None], rows[:1], places[:, None], places)


def rows_and_places(mask: BlockMask) -> tuple[Tensor, Tensor]:
    device = mask.kv_indices.device
    return torch.arange(mask.shape[0], device=device), torch.arange(mask.shape[-1], device=device)


def dense_mask(documents: Tensor) -> Tensor:
    """True where query may see key, [batch, 1, seq, seq]."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


def block_mask(documents: Tensor) -> BlockMask:
    """The same as blocks, found from the first and the last document of each."""
    length = documents.shape[1]
    blocks = -(-length // BLOCK)
    padded = F.pad(documents, (0, blocks * BLOCK - length), value=NOWHERE).unflatten(1, (blocks, BLOCK))
    first, last = padded[:, :, 0], padded[:, :, -1]  # [batch, blocks], as documents are ascending
    order = torch.arange(blocks, device=documents.device)
    earlier, diagonal = order[:, None] > order, order[:, None] == order  # [query blocks, key blocks]
    meets = last[:, None, :] >= first[:, :, None]  # the last document of the keys reaches into the queries
    one = (first == last)[:, :, None] & (first == last)[:, None, :] & (first[:, :, None] == first[:, None, :])
    whole = one & earlier
    part = meets & (earlier | diagonal) & ~whole

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    return BlockMask.from_kv_blocks(
        *ordered(part), *ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, [batch, 1, blocks], and which: they come first in [..., blocks]."""
    counts = blocks.sum(-1, dtype=torch.int32)
    places = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[:, None], places[:, None]


def why_no_flash(dtype: torch.dtype, head_dim: int) -> str:
    """Why attention on a GPU would not take the flash kernel, or nothing. Without a mask that is all it asks for."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in {str(dtype).removeprefix('torch.')}; use train.precision=bf16"
    if head_dim % 8 or head_dim > FLASH_HEAD_DIM:
        return f"heads of {head_dim} are no multiple of 8 up to {FLASH_HEAD_DIM}; change model.heads"
    return ""
