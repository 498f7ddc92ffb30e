"""`rotary_write` in Triton: one program rotates and writes a few heads of a tile of tokens.

A rotated feature needs its partner, half a head away. Both are loaded, because a second load of the same lines takes less time than
an exchange between threads. Only what the adapter adds is computed once and exchanged.
"""

import torch
import triton
import triton.language as tl

from granite_kernels.errors import KernelError
from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.op import CHOICE
from granite_kernels.primitives import await_inputs, dot, rounded
from granite_kernels.tiles import TileTable, predicted

MAX_HEAD_DIM = 128
# Programs that fill the chip, four per multiprocessor, and the most heads of a program: each reads cosine and sine once.
_FILL = {80: 432, 90: 528, 100: 592}
_MOST_HEADS = 8
# By architecture and bytes per element. Tensor cores need 16 tokens.
_TILES = TileTable(
    "rotary_write",
    "forward",
    {(chip, width): predicted(Tile({"BLOCK_T": 16}, 4), "2026-11-27") for chip in ARCHITECTURES for width in (2, 4)},
    candidates=lambda key: [Tile({"BLOCK_T": tokens}, warps) for tokens in (16, 32) for warps in (2, 4, 8)],
)
_SIZES = ["tokens", "num_heads", "num_kv_heads", "heads", "page_size", "scaling_q", "scaling_k", "scaling_v"]


@triton.jit
def partner_of(d, HEAD_DIM: tl.constexpr):
    """The feature that d is rotated with; past HEAD_DIM, any feature that exists."""
    # A remainder, because Triton knows where it is contiguous, and so loads 128 bits at once.
    return (d + HEAD_DIM // 2) % HEAD_DIM


@triton.jit
def rotation(x, partner, cos, sin):
    """The rotated x, not yet rounded. Explicit fma, so that every kernel rounds alike."""
    return tl.fma(x, cos.to(tl.float32), partner * sin.to(tl.float32))


@triton.jit
def exchanged(x, HEAD_DIM: tl.constexpr):
    """Each row of x (rows, features) with every feature replaced by its partner."""
    d = tl.arange(0, x.shape[1])
    return tl.gather(x, tl.broadcast_to(partner_of(d, HEAD_DIM)[None, :], x.shape), axis=1)


@triton.jit
def _move_heads(
    x_ptr, out_ptrs, stride_out, first, end, cos, sin, low_ptrs, b_ptr, rank, stride_b, scaling, adapted, exists,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Heads `first` to `end` of a tile of tokens. x_ptr and out_ptrs (tokens,) are at the first of all heads of this kind.

    b (heads · HEAD_DIM, rank) or None; low_ptrs (tokens,) at this kind's columns; `adapted` tokens use them.
    """
    BLOCK_T: tl.constexpr = out_ptrs.shape[0]
    d = tl.arange(0, BLOCK_D)
    here = exists[:, None] & (d < HEAD_DIM)[None, :]
    for head in range(first, end):
        delta = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        if b_ptr is not None and tl.max(adapted.to(tl.int32), axis=0) > 0:
            for start in range(0, rank, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                low = tl.load(low_ptrs[:, None] + r[None, :], mask=adapted[:, None] & (r < rank)[None, :], other=0.0)
                b_ptrs = b_ptr + (head * HEAD_DIM + d).to(tl.int64)[None, :] * stride_b + r[:, None]
                delta = dot(low, tl.load(b_ptrs, mask=(d < HEAD_DIM)[None, :] & (r < rank)[:, None], other=0.0), delta)
            # Selects, because 0 · infinity in the adapter would be NaN.
            delta = tl.where(adapted[:, None], delta * scaling, 0.0)
        x = tl.load(x_ptr[:, None] + (head * HEAD_DIM + d)[None, :], mask=here, other=0.0).to(tl.float32) + delta
        if ROTATE:
            partner = tl.load(x_ptr[:, None] + (head * HEAD_DIM + partner_of(d, HEAD_DIM))[None, :], mask=here, other=0.0).to(tl.float32)
            if b_ptr is not None:
                partner += exchanged(delta, HEAD_DIM)
            x = rotation(x, partner, cos, sin)
        tl.store(out_ptrs[:, None] + head * stride_out + d[None, :], rounded(x, out_ptrs.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=_SIZES)
def _rotary_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, k_ptr, v_ptr, low_ptr, lora_q_ptr, lora_k_ptr, lora_v_ptr, adapter_index_ptr, out_ptr,
    tokens, num_heads, num_kv_heads, heads, page_size, rank_q, rank_k, rank_v, scaling_q, scaling_k, scaling_v,
    stride_qkv, stride_cos, stride_sin, stride_low, stride_lora_q, stride_lora_k, stride_lora_v,
    stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_T tokens, and up to `heads` neighbouring query, key or value heads.

    Grid: (⌈tokens / BLOCK_T⌉, ⌈num_heads / heads⌉ + 2 · ⌈num_kv_heads / heads⌉). qkv (tokens, (num_heads + 2 num_kv_heads) · HEAD_DIM),
    cos and sin (tokens, HEAD_DIM), slots (tokens,) int64, caches (pages, page_size, num_kv_heads, HEAD_DIM), low (tokens, ranks) or
    None, lora_q, lora_k and lora_v (heads · HEAD_DIM, rank) or None, adapter_index (tokens,) or None, out contiguous.
    """
    chunk, query_chunks, key_chunks = tl.program_id(1), tl.cdiv(num_heads, heads), tl.cdiv(num_kv_heads, heads)
    t, d = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    exists = t < tokens
    row = t.to(tl.int64)
    await_inputs(PDL)
    adapted = exists
    if adapter_index_ptr is not None:
        adapted = exists & (tl.load(adapter_index_ptr + t, mask=exists, other=-1) >= 0)
    x_ptr = qkv_ptr + row * stride_qkv
    # Without an adapter these pointers are not used.
    low_ptrs = qkv_ptr + row
    if low_ptr is not None:
        low_ptrs = low_ptr + row * stride_low
    here = exists[:, None] & (d < HEAD_DIM)[None, :]
    if chunk < query_chunks + key_chunks:
        cos = tl.load(cos_ptr + row[:, None] * stride_cos + d[None, :], mask=here, other=0.0)
        sin = tl.load(sin_ptr + row[:, None] * stride_sin + d[None, :], mask=here, other=0.0)
        if chunk < query_chunks:
            first = chunk * heads
            _move_heads(
                x_ptr, out_ptr + row * num_heads * HEAD_DIM, HEAD_DIM, first, tl.minimum(first + heads, num_heads), cos, sin, low_ptrs,
                lora_q_ptr, rank_q, stride_lora_q, scaling_q, adapted, exists, HEAD_DIM, BLOCK_D, BLOCK_R, True,
            )  # fmt: skip
        else:
            slot = tl.load(slots_ptr + t, mask=exists, other=0)
            first = (chunk - query_chunks) * heads
            _move_heads(
                x_ptr + num_heads * HEAD_DIM, k_ptr + slot // page_size * stride_kp + slot % page_size * stride_ks, stride_kh, first,
                tl.minimum(first + heads, num_kv_heads), cos, sin, low_ptrs + rank_q, lora_k_ptr, rank_k, stride_lora_k, scaling_k,
                adapted, exists, HEAD_DIM, BLOCK_D, BLOCK_R, True,
            )  # fmt: skip
    else:
        slot = tl.load(slots_ptr + t, mask=exists, other=0)
        first = (chunk - query_chunks - key_chunks) * heads
        _move_heads(
            x_ptr + (num_heads + num_kv_heads) * HEAD_DIM, v_ptr + slot // page_size * stride_vp + slot % page_size * stride_vs, stride_vh,
            first, tl.minimum(first + heads, num_kv_heads), None, None, low_ptrs + (rank_q + rank_k), lora_v_ptr, rank_v, stride_lora_v,
            scaling_v, adapted, exists, HEAD_DIM, BLOCK_D, BLOCK_R, False,
        )  # fmt: skip


def _rotary_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    low: torch.Tensor | None = None,
    lora_q: torch.Tensor | None = None,
    lora_k: torch.Tensor | None = None,
    lora_v: torch.Tensor | None = None,
    adapter_index: torch.Tensor | None = None,
    *,
    num_heads: int,
    scaling_q: float = 1.0,
    scaling_k: float = 1.0,
    scaling_v: float = 1.0,
) -> torch.Tensor:
    """`rotary_write` by the Triton kernel.

    Raises:
        KernelError: head_dim is above 128.
    """
    tokens, (page_size, num_kv_heads, head_dim) = qkv.shape[0], k_cache.shape[1:]
    blocks = projection_blocks("rotary_write", qkv, head_dim, lora_q, lora_k, lora_v)
    out = qkv.new_empty(tokens, num_heads, head_dim)
    if not launching(qkv) or out.numel() == 0:
        return out
    tile = _TILES[architecture(qkv.device), qkv.element_size()]
    tile = Tile({**blocks, **tile.blocks}, tile.num_warps)
    tiles = triton.cdiv(tokens, tile.blocks["BLOCK_T"])
    heads = max(1, min(_MOST_HEADS, tiles * (num_heads + 2 * num_kv_heads) // _FILL[architecture(qkv.device)]))
    launch(
        _rotary_write_kernel, (tiles, triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)), tile,
        **projection_arguments(qkv, cos, sin, k_cache, v_cache, low, lora_q, lora_k, lora_v, adapter_index), slots_ptr=slots, out_ptr=out,
        tokens=tokens, num_heads=num_heads, num_kv_heads=num_kv_heads, heads=heads, page_size=page_size, scaling_q=scaling_q,
        scaling_k=scaling_k, scaling_v=scaling_v,
    )  # fmt: skip
    return out


def projection_blocks(operation: str, qkv: torch.Tensor, head_dim: int, *adapters: torch.Tensor | None) -> dict[str, int]:
    """The constants that a head and the adapters' ranks determine.

    Raises:
        KernelError: head_dim is above 128.
    """
    if head_dim > MAX_HEAD_DIM:
        remedy = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
        raise KernelError(got=f"{operation}: head_dim {head_dim}", expected=f"at most {MAX_HEAD_DIM}", remedy=remedy)
    rank = max((one.shape[1] for one in adapters if one is not None), default=0)
    # In float32, products are split in three, and a tile of 64 would spill.
    BLOCK_R = min(128 // qkv.element_size(), max(16, triton.next_power_of_2(rank)))
    return {"HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BLOCK_R": BLOCK_R}


def projection_arguments(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    low: torch.Tensor | None,
    lora_q: torch.Tensor | None,
    lora_k: torch.Tensor | None,
    lora_v: torch.Tensor | None,
    adapter_index: torch.Tensor | None,
) -> dict[str, object]:
    """Pointers and strides that both kernels have."""
    given = {"qkv_ptr": qkv, "cos_ptr": cos, "sin_ptr": sin, "k_ptr": k_cache, "v_ptr": v_cache, "low_ptr": low}
    given |= {"adapter_index_ptr": adapter_index, "stride_low": 0 if low is None else low.stride(0)}
    given |= {f"stride_{name}": one.stride(0) for name, one in (("qkv", qkv), ("cos", cos), ("sin", sin))}
    for name, one in (("q", lora_q), ("k", lora_k), ("v", lora_v)):
        rank, stride = (0, 0) if one is None else (one.shape[1], one.stride(0))
        given |= {f"lora_{name}_ptr": one, f"rank_{name}": rank, f"stride_lora_{name}": stride}
    for name, cache in (("k", k_cache), ("v", v_cache)):
        given |= {f"stride_{name}{dim}": cache.stride(index) for index, dim in enumerate("psh")}
    return given


rotary_write_triton = register(_rotary_write, mutates=("k_cache", "v_cache"))
