"""Attention to keys and values in pages: the language model's decode step and prefill."""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.errors import KernelError
from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, bounds, called_with, nbytes, triton_backend


class PagedAttentionInputs(NamedTuple):
    """The arguments of `paged_attention` except `impl`."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    kv_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_query_len: int
    scale: float
    causal: bool = True


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_query_len: int,
    scale: float,
    causal: bool = True,
    impl: str | None = None,
) -> torch.Tensor:
    """Softmax attention to paged keys: key j of a sequence is row j % page_size of page block_table[sequence, j // page_size].

    ::

        out_t = Σ_j softmax_j(scale · q_t·k_j) v_j     over j < kv_len, and with causal over j ≤ kv_len − n + t

    for query t of n. A sequence's queries are its last n tokens, whose keys are already in the cache.

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | q | (total_queries, num_heads, head_dim) | last 1, others free | any float |
    | k_cache, v_cache | (num_pages, page_size, num_kv_heads, head_dim) | last 1, others free | as q |
    | block_table | (sequences, max_pages) | last 1, first free | int32 |
    | kv_lens | (sequences,) | 1 | int32 |
    | cu_seqlens_q | (sequences + 1,) | 1 | int32 |
    | returns | (total_queries, num_heads, head_dim) | contiguous | as q |

    Head h reads key head h // (num_heads // num_kv_heads). Entries of block_table and rows of a page past a sequence's keys are
    not read. The result is zero for a query that sees no key, as when kv_len is 0. Rows from `cu_seqlens_q[-1]` on are padding:
    never read, zero in the result. Scores, softmax and sums are float32 (float64 for float64), and the result is rounded once.

    Args:
        max_query_len: a bound on the queries of one sequence, known to the host; 1 for decode.
        scale: factor on the scores; attention_multiplier in Granite.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, or a tensor that needs a gradient: training and a forward without
            a cache use scaled_dot_product_attention. "torch" also refuses decreasing offsets, a sequence with more queries than
            max_query_len, and a kv_len beyond its row of block_table. "triton" cannot check these.

    Pages are those of PagedAttention (Kwon et al., arXiv 2309.06180), grouped heads those of Ainslie et al. (arXiv 2305.13245).
    """
    inputs = PagedAttentionInputs(q, k_cache, v_cache, block_table, kv_lens, cu_seqlens_q, max_query_len, scale, causal)
    _check(inputs)
    return OPERATION.select(impl, q)(*inputs)


def _check(inputs: PagedAttentionInputs) -> None:
    arguments = Arguments("paged_attention")
    arguments.tensor("q", inputs.q, "total_queries num_heads head_dim")
    arguments.tensor("k_cache", inputs.k_cache, "num_pages page_size num_kv_heads head_dim")
    arguments.tensor("v_cache", inputs.v_cache, "num_pages page_size num_kv_heads head_dim")
    arguments.index("block_table", inputs.block_table, "sequences max_pages")
    arguments.index("kv_lens", inputs.kv_lens, "sequences")
    arguments.index("cu_seqlens_q", inputs.cu_seqlens_q, "sequences+1")
    sequences, num_heads, num_kv_heads = inputs.kv_lens.shape[0], inputs.q.shape[1], inputs.k_cache.shape[2]
    if inputs.cu_seqlens_q.shape[0] != sequences + 1:
        arguments.refuse(
            f"cu_seqlens_q has {inputs.cu_seqlens_q.shape[0]} entries for {sequences} sequences of kv_lens",
            "one entry more than sequences",
            "Start it with 0 and end it with the number of queries",
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        arguments.refuse(
            f"q has {num_heads} heads for {num_kv_heads} of k_cache", "a multiple", "Use the model's num_heads and num_kv_heads"
        )
    if inputs.k_cache.shape[1] == 0:
        arguments.refuse("k_cache has page_size 0", "at least 1", "Allocate the cache with rows in its pages")
    if inputs.max_query_len < 0:
        arguments.refuse(f"max_query_len={inputs.max_query_len}", "0 or more", "Pass the largest number of queries of any sequence")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (inputs.q, inputs.k_cache, inputs.v_cache)):
        arguments.refuse(
            "a tensor that requires a gradient",
            "inference, because pages are overwritten before a backward could read them",
            "Call it under torch.no_grad(), or train with scaled_dot_product_attention",
        )


@called_with(PagedAttentionInputs)
def paged_attention_reference(inputs: PagedAttentionInputs) -> torch.Tensor:
    """`paged_attention` in PyTorch. Sequences with equal numbers of queries and of pieces of keys are computed together.

    A sequence's keys are padded to whole pieces, whatever the others need, so its bits do not depend on its neighbours.
    """
    q, index = inputs.q, (inputs.block_table, inputs.kv_lens, inputs.cu_seqlens_q)
    sizes = (q.shape, q.dtype, inputs.k_cache.shape[1:3], inputs.max_query_len, inputs.causal)
    groups: list[_Group] = _LAST_PLAN.of(index, sizes, lambda: _groups(inputs))
    if len(groups) == 1 and groups[0].rows is None:
        return _attend(inputs, q, groups[0])
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for group in groups:
        out.index_copy_(0, group.rows, _attend(inputs, q.index_select(0, group.rows), group))
    return out


class _Group(NamedTuple):
    """Sequences that are computed together."""

    rows: torch.Tensor | None  # their queries, int64, if those are not all rows of q
    sequences: int
    slots: torch.Tensor  # (sequences · keys,), their keys as rows of a cache whose pages are joined
    mask: torch.Tensor  # (sequences, 1, 1 or queries, keys), added to the scores
    blind: torch.Tensor | None  # queries that see no key, (sequences · n, 1, 1) bool, if there may be any


class LastPlan(threading.local):
    """What this thread's last call computed from its index tensors, for the next: a model's layers share those of a step.

    It holds while these tensors exist and nothing has written to them.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self, _: Any = None) -> None:
        self._key: tuple[Any, ...] = ()
        self._index: tuple[weakref.ref[torch.Tensor], ...] = ()
        self._plan: Any = None

    def of(self, index: tuple[torch.Tensor, ...], sizes: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The result of `make`, which depends on the values of `index` and on `sizes` alone."""
        if any(type(one) is not torch.Tensor or one.is_inference() for one in index):
            return make()  # nothing tells whether its values have changed
        key = (tuple(one._version for one in index), sizes)
        if key != self._key or any(kept() is not one for kept, one in zip(self._index, index, strict=True)):
            self._forget()
            self._plan = make()
            self._key, self._index = key, tuple(weakref.ref(one, self._forget) for one in index)
        return self._plan


_LAST_PLAN = LastPlan()
# Keys per piece. More groups than these give would cost more than their padding.
_PIECE = 64


def _groups(inputs: PagedAttentionInputs) -> list[_Group]:
    """The sequences with equal numbers of queries and of pieces of keys, except those without queries or keys."""
    alike: dict[tuple[int, int], list[int]] = {}
    for sequence, (first, end, kv_len) in enumerate(_spans(inputs)):
        if end > first and kv_len:
            alike.setdefault((end - first, -(-kv_len // _PIECE)), []).append(sequence)
    if len(alike) == 1:
        [((n, pieces), members)] = alike.items()
        if len(members) == inputs.kv_lens.shape[0] and len(members) * n == inputs.q.shape[0]:
            return [_group(inputs, None, n, pieces * _PIECE, inputs.block_table, inputs.kv_lens)]
    groups = []
    for (n, pieces), members in alike.items():
        which = torch.tensor(members, device=inputs.q.device)
        rows = inputs.cu_seqlens_q.index_select(0, which).long()
        if n > 1:
            rows = (rows[:, None] + torch.arange(n, device=rows.device)).flatten()
        own = inputs.block_table.index_select(0, which), inputs.kv_lens.index_select(0, which)
        groups.append(_group(inputs, rows, n, pieces * _PIECE, *own))
    return groups


def _group(
    inputs: PagedAttentionInputs, rows: torch.Tensor | None, n: int, keys: int, table: torch.Tensor, kv_lens: torch.Tensor
) -> _Group:
    """The group of sequences with n queries each and these pages, `(sequences, pages)`, padded to this many keys."""
    sequences, (page_size, num_kv_heads) = table.shape[0], inputs.k_cache.shape[1:3]
    position, ends = torch.arange(keys, device=table.device), kv_lens[:, None]
    exists = position < ends
    page = table.index_select(1, (position // page_size).clamp(max=table.shape[1] - 1))
    slots = torch.add(position % page_size, page, alpha=page_size)
    # The first key in place of those past the end, which get no weight but may hold NaN, and 0 · NaN is NaN.
    slots = torch.where(exists, slots, slots[:, :1]).flatten()
    seen, blind = exists[:, None], None
    if inputs.causal and n > 1:
        ends = ends + torch.arange(1 - n, 1, device=table.device)  # of each query, (sequences, n)
        seen = (position < ends[:, :, None]).repeat_interleave(inputs.q.shape[1] // num_kv_heads, dim=1)
        if n > keys - _PIECE:  # a sequence may have more queries than keys
            blind = ends.flatten()[:, None, None] <= 0
    mask = torch.where(seen, 0.0, -torch.inf).to(accumulator(inputs.q.dtype))
    return _Group(rows, sequences, slots, mask[:, None], blind)


def _attend(inputs: PagedAttentionInputs, q: torch.Tensor, group: _Group) -> torch.Tensor:
    """Attention of a group's queries, `(sequences · n, num_heads, head_dim)`."""
    (total, num_heads, head_dim), num_kv_heads, dtype = q.shape, inputs.k_cache.shape[2], accumulator(q.dtype)
    keys, values = (
        cache.flatten(0, 1).index_select(0, group.slots).to(dtype).view(group.sequences, -1, num_kv_heads, head_dim).transpose(1, 2)
        for cache in (inputs.k_cache, inputs.v_cache)
    )
    # The query heads that share a KV head are queries of one head: (sequences, num_kv_heads, n · group, head_dim).
    n = total // group.sequences
    heads = (group.sequences, n, num_kv_heads, num_heads // num_kv_heads, head_dim)
    queries = q.to(dtype).reshape(heads).transpose(1, 2).flatten(2, 3)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask, scale=inputs.scale)
    out = out.unflatten(2, heads[1:4:2]).transpose(1, 2).reshape(q.shape).to(q.dtype).contiguous()
    return out if group.blind is None else out.masked_fill(group.blind, 0)


def _spans(inputs: PagedAttentionInputs) -> list[tuple[int, int, int]]:
    """First query, end and kv_len of every sequence, checked, since the host now knows them."""
    capacity = inputs.block_table.shape[1] * inputs.k_cache.shape[1]
    queries = bounds(inputs.cu_seqlens_q, inputs.q.shape[0])
    spans = [(first, end, kv_len) for (first, end), kv_len in zip(queries, inputs.kv_lens.tolist(), strict=True)]
    for sequence, (first, end, kv_len) in enumerate(spans):
        if end - first > inputs.max_query_len:
            raise KernelError(
                got=f"paged_attention: {end - first} queries in sequence {sequence}",
                expected=f"at most max_query_len = {inputs.max_query_len}",
                remedy="Pass the largest number of queries of any sequence as max_query_len",
            )
        if not 0 <= kv_len <= capacity:
            raise KernelError(
                got=f"paged_attention: kv_lens[{sequence}] = {kv_len}",
                expected=f"0 to {capacity}, the capacity of a row of block_table",
                remedy="Give the sequence more pages before its keys are written",
            )
    return spans


@called_with(PagedAttentionInputs)
def paged_attention_cost(inputs: PagedAttentionInputs) -> Cost:
    """FLOPs: two products for each pair of a query and a key that it sees, without the softmax. Bytes: the queries, the result,
    the keys and values of every sequence with a query, once per sequence, and the index entries that are needed."""
    rows, num_heads, head_dim = inputs.q.shape
    page_size, num_kv_heads = inputs.k_cache.shape[1:3]
    pairs = keys = queries = pages = 0
    for first, end, kv_len in _spans(inputs):
        n = end - first
        if n:
            pairs += sum(max(0, kv_len - n + t + 1) for t in range(n)) if inputs.causal else n * kv_len
            keys += kv_len
            queries += n
            pages += -(-kv_len // page_size)
    moved = (queries + rows) * num_heads * head_dim + 2 * keys * num_kv_heads * head_dim
    index = pages * inputs.block_table.element_size() + nbytes(inputs.kv_lens, inputs.cu_seqlens_q)
    return Cost(flops=4 * pairs * num_heads * head_dim, bytes=moved * inputs.q.element_size() + index)


@called_with(PagedAttentionInputs)
def paged_attention_library(inputs: PagedAttentionInputs) -> Callable[[], torch.Tensor]:
    """SDPA without a mask over keys that are already gathered and padded to the longest sequence."""
    q, kv_lens = inputs.q, inputs.kv_lens
    sequences, longest = kv_lens.shape[0], int(kv_lens.max()) if kv_lens.numel() else 0
    queries = q.new_empty(sequences, q.shape[1], inputs.max_query_len, q.shape[2]).normal_()
    keys, values = (
        cache.new_empty(sequences, cache.shape[2], longest, cache.shape[3]).normal_() for cache in (inputs.k_cache, inputs.v_cache)
    )
    return partial(F.scaled_dot_product_attention, queries, keys, values, scale=inputs.scale, enable_gqa=True)


def _make(
    draw: Draw,
    *,
    sequences: tuple[tuple[int, int], ...],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    causal: bool = True,
    padding: int = 0,
) -> dict[str, Any]:
    lengths = tuple(n for n, _ in sequences)
    total = sum(lengths)
    q = draw.normal(total + padding, (num_heads + 2 * num_kv_heads) * head_dim)[:, : num_heads * head_dim]
    q = q.unflatten(1, (num_heads, head_dim))
    q[total:] = torch.nan
    counts = [-(-kv_len // page_size) for _, kv_len in sequences]
    # Page 0 holds NaN, and unused entries of the table refer to it. Pages are in random order; keys and values interleave.
    pages = [1 + page for page in draw.permutation(sum(counts))]
    cache = draw.normal(1 + len(pages), page_size, 2, num_kv_heads, head_dim)
    cache[0] = torch.nan
    table = []
    for (_, kv_len), count in zip(sequences, counts, strict=True):
        own, pages = pages[:count], pages[count:]
        if kv_len % page_size:
            cache[own[-1], kv_len % page_size :] = torch.nan
        table.append(own + [0] * (max(counts) + 2 - count))
    return {
        "q": q,
        "k_cache": cache[:, :, 0],
        "v_cache": cache[:, :, 1],
        "block_table": draw.int32(table).reshape(len(sequences), -1 if sequences else 0),
        "kv_lens": draw.int32([kv_len for _, kv_len in sequences]),
        "cu_seqlens_q": draw.cu_seqlens(lengths),
        "max_query_len": max(lengths, default=0),
        "scale": head_dim**-0.5,
        "causal": causal,
    }


def _case(
    name: str,
    sequences: tuple[tuple[int, int], ...],
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    *,
    released: bool = False,
    **options,
) -> Case:
    """`sequences` are (queries, kv_len) each; `heads` are (num_heads, num_kv_heads)."""
    shape = {"sequences": sequences, "num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": head_dim, "page_size": page_size}
    return Case(name, _make, {**shape, **options}, released)


# The page size of the model's cache, `granite_speech.modules.cache.PagedCache`.
PAGE_SIZE = 64

CASES = (
    _case("3.3-2b decode, 1 sequence", ((1, 300),), (32, 8), 64, PAGE_SIZE, released=True),
    _case("3.3-2b decode, 128 sequences", ((1, 200),) * 128, (32, 8), 64, PAGE_SIZE, released=True),
    _case("3.3-8b decode, 128 sequences", ((1, 200),) * 128, (32, 8), 128, PAGE_SIZE, released=True),
    _case("4.1-2b decode, 1 sequence", ((1, 300),), (16, 4), 128, PAGE_SIZE, released=True),
    _case("4.1-2b decode, 128 sequences", ((1, 200),) * 128, (16, 4), 128, PAGE_SIZE, released=True),
    _case("4.1-2b decode, long context", ((1, 16384), (1, 2048), (1, 512)), (16, 4), 128, PAGE_SIZE, released=True),
    _case("4.1-2b drafts of 40, 32 sequences", ((40, 200),) * 32, (16, 4), 128, PAGE_SIZE, released=True),
    _case("4.1-2b prefill, 32 prompts", ((150, 150),) * 32, (16, 4), 128, PAGE_SIZE, released=True),
    _case("decode", ((1, 54), (1, 97), (1, 1), (1, 16)), (8, 2), 64, 16),
    _case("drafts after a context", ((5, 23), (1, 9), (7, 64)), (4, 2), 32, 16),
    _case("prefill", ((13, 13), (33, 33)), (4, 4), 32, 8),
    _case("page 1", ((1, 5), (3, 11)), (4, 2), 32, 1),
    _case("page 256", ((1, 300), (2, 256)), (4, 1), 32, 256),
    _case("one KV head, odd head dim 40", ((2, 19), (1, 33)), (6, 1), 40, 32),
    _case("head dim 80, group of 3", ((4, 21),), (6, 2), 80, 8),
    _case("one KV head, group of 20", ((1, 40), (5, 50)), (20, 1), 128, 16),
    _case("decode, drafts and prefill over many keys", ((1, 500), (9, 9), (2, 257), (1, 0)), (4, 2), 64, 16),
    _case("not causal", ((5, 12), (3, 30)), (4, 2), 32, 8, causal=False),
    _case("no keys yet", ((1, 0), (1, 7), (2, 0)), (4, 2), 32, 8),
    _case("sequences without a query", ((0, 9), (3, 9), (0, 0)), (4, 2), 32, 8),
    _case("padding rows", ((1, 9), (2, 17)), (4, 2), 32, 8, padding=4),
    _case("no sequences, padding rows", (), (4, 2), 32, 8, padding=2),
    _case("no sequences", (), (4, 2), 32, 8),
)

OPERATION = Operation(
    name="paged_attention",
    call=paged_attention,
    reference=paged_attention_reference,
    cost=paged_attention_cost,
    cases=CASES,
    library=paged_attention_library,
    packed=("q",),
    triton=triton_backend("paged_attention"),
)
