"""A decode step's attention in one call: LoRA, rotary positions, the write of the new key and value, and attention to all keys."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from granite_kernels.errors import KernelError
from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, called_with, nbytes, triton_backend
from granite_kernels.paged_attention import PAGE_SIZE, LastPlan, paged_attention_library, paged_attention_reference
from granite_kernels.rotary_write import adapter_cost, check_projections, draw_projections, rotated_heads, write


class DecodeAttentionInputs(NamedTuple):
    """The arguments of `decode_attention` except `impl`. num_heads and scale are always given: a field before them has a default."""

    qkv: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    kv_lens: torch.Tensor
    counters: torch.Tensor
    low: torch.Tensor | None = None
    lora_q: torch.Tensor | None = None
    lora_k: torch.Tensor | None = None
    lora_v: torch.Tensor | None = None
    adapter_index: torch.Tensor | None = None
    num_heads: int = 0
    scale: float = 0.0
    scaling_q: float = 1.0
    scaling_k: float = 1.0
    scaling_v: float = 1.0


def decode_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    counters: torch.Tensor,
    low: torch.Tensor | None = None,
    lora_q: torch.Tensor | None = None,
    lora_k: torch.Tensor | None = None,
    lora_v: torch.Tensor | None = None,
    adapter_index: torch.Tensor | None = None,
    *,
    num_heads: int,
    scale: float,
    scaling_q: float = 1.0,
    scaling_k: float = 1.0,
    scaling_v: float = 1.0,
    impl: str | None = None,
) -> torch.Tensor:
    """Rotate the query and key of one new token per row, write its key and value at position kv_len − 1, and attend to all keys.

    ::

        q, k, v = the row's heads, adapted and rotated as in `rotary_write`
        out = Σ_j softmax_j(scale · q·k_j) v_j     over j < kv_len, the new key included

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | qkv, cos, sin, low, lora_q, lora_k, lora_v, adapter_index | as in `rotary_write`, with rows for tokens | | |
    | k_cache, v_cache | (num_pages, page_size, num_kv_heads, head_dim) | last 1, others free | as qkv |
    | block_table | (rows, max_pages) | last 1, first free | int32 |
    | kv_lens | (rows,): keys of the row, the new one included | 1 | int32 |
    | counters | (rows · num_heads,) or longer: zero before the call and after it | 1 | int32 |
    | returns | (rows, num_heads, head_dim) | contiguous | as qkv |

    Writes to k_cache and v_cache; counters are scratch, in which the programs of a row find out which of them is the last. A row
    with kv_len 0 writes nothing, its result is zero, and its qkv may hold NaN. Entries of block_table and rows of a page past a
    row's keys are not read. Scores, softmax and sums are float32 (float64 for float64), and the result is rounded once.

    Args:
        num_heads: query heads; head h reads key head h // (num_heads // num_kv_heads).
        scale: factor on the scores; attention_multiplier in Granite.
        scaling_q, scaling_k, scaling_v: factors of the adapter.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, a tensor that needs a gradient, or in Triton a head_dim above 128.
            "torch" also refuses a kv_len beyond its row of block_table, which "triton" cannot check.

    The kernel reads k_cache, v_cache, block_table, kv_lens, adapter_index and the B of the adapters before earlier launches of
    the same `early_launches` block have ended, so these must not write to them, except for the keys and values of other layers.

    Attention is that of `paged_attention` with one query per row. Sharing a row's keys between programs is flash decoding (Dao et
    al., 2023).
    """
    inputs = DecodeAttentionInputs(
        qkv, cos, sin, k_cache, v_cache, block_table, kv_lens, counters, low, lora_q, lora_k, lora_v, adapter_index,
        num_heads, scale, scaling_q, scaling_k, scaling_v,
    )  # fmt: skip
    _check(inputs)
    return OPERATION.select(impl, qkv)(**inputs._asdict())


def _check(inputs: DecodeAttentionInputs) -> None:
    arguments = Arguments("decode_attention")
    check_projections(arguments, inputs)
    arguments.index("block_table", inputs.block_table, "rows max_pages")
    arguments.index("kv_lens", inputs.kv_lens, "rows")
    arguments.index("counters", inputs.counters, "counters")
    rows, available = inputs.qkv.shape[0], inputs.counters.shape[0]
    if available < rows * inputs.num_heads:
        arguments.refuse(
            f"counters has {available} entries", f"at least rows * num_heads = {rows * inputs.num_heads}", "Allocate them once, with zeros"
        )


@called_with(DecodeAttentionInputs)
def decode_attention_reference(inputs: DecodeAttentionInputs) -> torch.Tensor:
    """`decode_attention` in PyTorch: the reference of `rotary_write`, then that of `paged_attention`."""
    q, k, v = rotated_heads(inputs)
    index, page_size = (inputs.block_table, inputs.kv_lens), inputs.k_cache.shape[1]
    new: _NewTokens = _LAST_PLAN.of(index, (page_size,), partial(_new_tokens, *index, page_size))
    if new.rows is not None:
        k, v = k.index_select(0, new.rows), v.index_select(0, new.rows)
    write(new.slots, (inputs.k_cache, k), (inputs.v_cache, v))
    return paged_attention_reference(q, inputs.k_cache, inputs.v_cache, *index, new.cu_seqlens, 1, inputs.scale)


class _NewTokens(NamedTuple):
    """Where the keys and values of a step go."""

    rows: torch.Tensor | None  # the rows with a token, int64, if those are not all
    slots: torch.Tensor  # of these rows in a cache whose pages are joined, int64
    cu_seqlens: torch.Tensor  # one query per row


_LAST_PLAN = LastPlan()


def _new_tokens(block_table: torch.Tensor, kv_lens: torch.Tensor, page_size: int) -> _NewTokens:
    capacity, lengths = block_table.shape[1] * page_size, kv_lens.tolist()
    for row, kv_len in enumerate(lengths):
        if not 0 <= kv_len <= capacity:
            raise KernelError(
                got=f"decode_attention: kv_lens[{row}] = {kv_len}",
                expected=f"0 to {capacity}, the capacity of a row of block_table",
                remedy="Give the row more pages before the step",
            )
    present = [row for row, kv_len in enumerate(lengths) if kv_len]
    rows = torch.tensor(present, dtype=torch.int64, device=kv_lens.device)
    position = kv_lens.index_select(0, rows).long() - 1
    slots = block_table[rows, position // page_size].long() * page_size + position % page_size
    cu_seqlens = torch.arange(len(lengths) + 1, dtype=torch.int32, device=kv_lens.device)
    return _NewTokens(rows if len(present) < len(lengths) else None, slots, cu_seqlens)


@called_with(DecodeAttentionInputs)
def decode_attention_cost(inputs: DecodeAttentionInputs) -> Cost:
    """FLOPs: two products for each key of a query head, the adapter's products, and three per rotated feature. Bytes: every tensor
    once; of the caches the keys and values of the rows, whether read or written, and of block_table the entries that are needed."""
    lengths, (page_size, num_kv_heads, head_dim) = inputs.kv_lens.tolist(), inputs.k_cache.shape[1:]
    present, keys, itemsize = [row for row, kv_len in enumerate(lengths) if kv_len], sum(lengths), inputs.qkv.element_size()
    flops, moved = adapter_cost(inputs, present)
    flops += 4 * keys * inputs.num_heads * head_dim + 3 * len(present) * (inputs.num_heads + num_kv_heads) * head_dim
    elements = len(present) * (inputs.qkv.shape[1] + 2 * head_dim) + 2 * keys * num_kv_heads * head_dim
    elements += len(lengths) * inputs.num_heads * head_dim
    pages = sum(-(-kv_len // page_size) for kv_len in lengths) * inputs.block_table.element_size()
    return Cost(flops=flops, bytes=moved + elements * itemsize + pages + nbytes(inputs.kv_lens))


@called_with(DecodeAttentionInputs)
def decode_attention_library(inputs: DecodeAttentionInputs) -> Callable[[], torch.Tensor]:
    """SDPA without a mask over keys that are already gathered and padded to the longest row."""
    head_dim = inputs.k_cache.shape[3]
    q = inputs.qkv[:, : inputs.num_heads * head_dim].unflatten(1, (-1, head_dim))
    caches, index = (inputs.k_cache, inputs.v_cache), (inputs.block_table, inputs.kv_lens, inputs.kv_lens)
    return paged_attention_library(q, *caches, *index, 1, inputs.scale)


def _make(
    draw: Draw,
    *,
    kv_lens: tuple[int, ...],
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    ranks: tuple[int, int, int] = (0, 0, 0),
    adapters: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    rows = len(kv_lens)
    given = draw_projections(draw, rows=rows, heads=heads, head_dim=head_dim, ranks=ranks, adapters=adapters)
    given["qkv"][[row for row, kv_len in enumerate(kv_lens) if kv_len == 0]] = torch.nan
    counts = [-(-kv_len // page_size) for kv_len in kv_lens]
    # Page 0 holds NaN, and unused entries of the table refer to it. Pages are in random order; keys and values interleave.
    pages = [1 + page for page in draw.permutation(sum(counts))]
    cache = draw.normal(1 + len(pages), page_size, 2, heads[1], head_dim)
    cache[0] = torch.nan
    table = []
    for kv_len, count in zip(kv_lens, counts, strict=True):
        own, pages = pages[:count], pages[count:]
        if kv_len:
            cache[own[-1], (kv_len - 1) % page_size :] = torch.nan
        table.append(own + [0] * (max(counts) + 2 - count))
    given |= {
        "k_cache": cache[:, :, 0],
        "v_cache": cache[:, :, 1],
        "block_table": draw.int32(table).reshape(rows, -1 if rows else 0),
        "kv_lens": draw.int32(list(kv_lens)),
        "counters": draw.int32([0] * (rows * heads[0] + 3)),
        "scale": head_dim**-0.5,
    }
    return {name: given[name] for name in DecodeAttentionInputs._fields}


def _case(
    name: str,
    kv_lens: tuple[int, ...],
    heads: tuple[int, int],
    head_dim: int,
    page_size: int = PAGE_SIZE,
    *,
    released: bool = False,
    **more,
) -> Case:
    """`heads` are (num_heads, num_kv_heads)."""
    return Case(name, _make, {"kv_lens": kv_lens, "heads": heads, "head_dim": head_dim, "page_size": page_size, **more}, released)


CASES = (
    _case("4.1-2b, 1 row", (300,), (16, 4), 128, released=True),
    _case("4.1-2b, 8 rows", (300,) * 8, (16, 4), 128, released=True),
    _case("4.1-2b, 128 rows", (200,) * 128, (16, 4), 128, released=True),
    _case("4.1-2b, long context", (16384,), (16, 4), 128, released=True),
    _case("3.3-2b, 1 row with adapter", (300,), (32, 8), 64, ranks=(64, 0, 64), released=True),
    _case("3.3-2b, 128 rows, half with adapter", (200,) * 128, (32, 8), 64, ranks=(64, 0, 64), adapters=(0, -1), released=True),
    _case("3.3-8b, 8 rows with adapter", (300,) * 8, (32, 8), 128, ranks=(64, 0, 64), adapters=(0,), released=True),
    _case("three adapters in some rows", (5, 17, 30), (4, 2), 16, 8, ranks=(5, 16, 3), adapters=(0, -1, 0)),
    _case("lengths around a piece", (0, 1, 64, 65, 200), (4, 1), 16, 16),
    _case("one page per piece, adapter of queries in all rows", (64, 130), (3, 1), 64, 64, ranks=(16, 0, 0)),
    _case("odd head dim 40, adapter of queries and values", (9, 0, 70, 12), (3, 3), 40, 8, ranks=(8, 0, 8), adapters=(-1, 0)),
    _case("head dim 80, group of 20, adapter of keys", (40, 66), (20, 1), 80, 16, ranks=(0, 20, 0), adapters=(0, 1)),
    _case("head dim 128, two pieces per page", (127, 1), (2, 1), 128, 128),
    _case("no row uses the adapter", (3, 4), (2, 2), 16, 8, ranks=(4, 4, 4), adapters=(-1,)),
    _case("no keys", (0, 0), (4, 2), 16, 8, ranks=(4, 0, 4)),
    _case("no rows", (), (4, 2), 16, 8, ranks=(4, 0, 4), adapters=(0,)),
)

OPERATION = Operation(
    name="decode_attention",
    call=decode_attention,
    reference=decode_attention_reference,
    cost=decode_attention_cost,
    cases=CASES,
    library=decode_attention_library,
    mutates=("k_cache", "v_cache", "counters"),
    has_cpu=True,
    triton=triton_backend("decode_attention"),
)
