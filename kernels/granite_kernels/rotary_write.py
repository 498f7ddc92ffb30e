"""What comes between a layer's q|k|v product and attention: LoRA, rotary positions, and the write of keys and values to pages."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, called_with, nbytes, triton_backend


class Projections(Protocol):
    """The arguments that `rotary_write` and `decode_attention` share."""

    qkv: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    low: torch.Tensor | None
    lora_q: torch.Tensor | None
    lora_k: torch.Tensor | None
    lora_v: torch.Tensor | None
    adapter_index: torch.Tensor | None
    num_heads: int
    scaling_q: float
    scaling_k: float
    scaling_v: float


class RotaryWriteInputs(NamedTuple):
    """The arguments of `rotary_write` except `impl`. num_heads is always given: it has a default because a field before it has one."""

    qkv: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    low: torch.Tensor | None = None
    lora_q: torch.Tensor | None = None
    lora_k: torch.Tensor | None = None
    lora_v: torch.Tensor | None = None
    adapter_index: torch.Tensor | None = None
    num_heads: int = 0
    scaling_q: float = 1.0
    scaling_k: float = 1.0
    scaling_v: float = 1.0


def rotary_write(
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
    impl: str | None = None,
) -> torch.Tensor:
    """Rotate the queries and keys of `tokens` tokens, write keys and values to the cache, and return the queries.

    ::

        x += scaling · low·Bᵀ                           for queries, keys and values that have a B, in rows with an adapter
        x_d = x_d · cos_d + x_{d ± head_dim/2} · sin_d  for queries and keys

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | qkv | (tokens, (num_heads + 2 · num_kv_heads) · head_dim): query, key, value heads | last 1, first free | any float |
    | cos, sin | (tokens, head_dim); the first half of the sine is negative | last 1, first free | as qkv |
    | slots | (tokens,): page · page_size + place in the page | 1 | int64 |
    | k_cache, v_cache | (num_pages, page_size, num_kv_heads, head_dim) | last 1, others free | as qkv |
    | low | (tokens, rank_q + rank_k + rank_v): x·Aᵀ of the projections with a B, in this order | last 1, first free | as qkv |
    | lora_q | (num_heads · head_dim, rank_q): B; None: no adapter there | last 1, first free | as qkv |
    | lora_k, lora_v | (num_kv_heads · head_dim, rank) | last 1, first free | as qkv |
    | adapter_index | (tokens,): negative for rows without the adapter; None: all rows have it | 1 | int32 |
    | returns | (tokens, num_heads, head_dim): rotated queries | contiguous | as qkv |

    Writes to k_cache and v_cache. Several tokens may have the same slot, as the padding of a step of fixed shape: one of them is
    kept. Rows of `low` without the adapter are not used, even if they hold NaN.

    Args:
        num_heads: query heads; the cache has the number of key heads.
        scaling_q, scaling_k, scaling_v: factors of the adapter.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, a tensor that needs a gradient, or in Triton a head_dim above 128.

    Rotary positions are those of RoFormer (Su et al., arXiv 2104.09864) with halves rotated, as in transformers' Llama.
    """
    inputs = RotaryWriteInputs(
        qkv, cos, sin, slots, k_cache, v_cache, low, lora_q, lora_k, lora_v, adapter_index, num_heads, scaling_q, scaling_k, scaling_v
    )
    arguments = Arguments("rotary_write")
    check_projections(arguments, inputs)
    arguments.tensor("slots", slots, "rows", (torch.int64,))
    return OPERATION.select(impl, qkv)(**inputs._asdict())


def check_projections(arguments: Arguments, inputs: Projections) -> None:
    """Raises KernelError unless the shared arguments fit together."""
    arguments.tensor("qkv", inputs.qkv, "rows features")
    for name in ("cos", "sin"):
        arguments.tensor(name, getattr(inputs, name), "rows head_dim")
    for name in ("k_cache", "v_cache"):
        arguments.tensor(name, getattr(inputs, name), "num_pages page_size num_kv_heads head_dim")
    num_heads, (page_size, num_kv_heads, head_dim) = inputs.num_heads, inputs.k_cache.shape[1:]
    if num_heads < 1 or num_kv_heads == 0 or num_heads % num_kv_heads:
        arguments.refuse(
            f"num_heads={num_heads} for {num_kv_heads} heads of k_cache", "a multiple", "Use the model's num_heads and num_kv_heads"
        )
    if head_dim % 2:
        arguments.refuse(f"k_cache has head_dim {head_dim}", "an even number", "Rotary positions rotate pairs of features")
    if page_size == 0:
        arguments.refuse("k_cache has page_size 0", "at least 1", "Allocate the cache with rows in its pages")
    if inputs.qkv.shape[1] != (num_heads + 2 * num_kv_heads) * head_dim:
        arguments.refuse(
            f"qkv has {inputs.qkv.shape[1]} features",
            f"(num_heads + 2 * num_kv_heads) * head_dim = {(num_heads + 2 * num_kv_heads) * head_dim}",
            "Put the query, key and value heads side by side",
        )
    _check_adapter(arguments, inputs, {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim})
    arguments.refuse_gradients(
        qkv=inputs.qkv,
        k_cache=inputs.k_cache,
        v_cache=inputs.v_cache,
        low=inputs.low,
        lora_q=inputs.lora_q,
        lora_k=inputs.lora_k,
        lora_v=inputs.lora_v,
    )


def _check_adapter(arguments: Arguments, inputs: Projections, features: dict[str, int]) -> None:
    ranks = 0
    for name, count in features.items():
        lora_b = getattr(inputs, f"lora_{name}")
        if lora_b is not None:
            arguments.tensor(f"lora_{name}", lora_b, f"features_{name} rank_{name}")
            if lora_b.shape[0] != count:
                arguments.refuse(f"lora_{name} has shape {tuple(lora_b.shape)}", f"({count}, rank)", "Pass B as (out_features, rank)")
            ranks += lora_b.shape[1]
    if inputs.low is not None:
        arguments.tensor("low", inputs.low, "rows ranks")
    width = 0 if inputs.low is None else inputs.low.shape[1]
    if width != ranks:
        remedy = "Pass x·Aᵀ of the projections whose B is given, side by side"
        arguments.refuse(f"low has {width} columns", f"{ranks}, the ranks of lora_q, lora_k and lora_v together", remedy)
    if inputs.adapter_index is not None:
        arguments.index("adapter_index", inputs.adapter_index, "rows")


@called_with(RotaryWriteInputs)
def rotary_write_reference(inputs: RotaryWriteInputs) -> torch.Tensor:
    """`rotary_write` in PyTorch, with the roundings of eager code: after the adapter, and after each product and sum of the rotation."""
    q, k, v = rotated_heads(inputs)
    write(inputs.slots, (inputs.k_cache, k), (inputs.v_cache, v))
    return q.contiguous()


def rotated_heads(inputs: Projections) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adapted and rotated queries and keys, and adapted values, `(rows, heads, head_dim)` each."""
    _, _, num_kv_heads, head_dim = inputs.k_cache.shape
    qkv, counts = inputs.qkv if inputs.low is None else _adapted(inputs), (inputs.num_heads, num_kv_heads)
    q_and_k, v = qkv.view(qkv.shape[0], sum(counts) + num_kv_heads, head_dim).split((sum(counts), num_kv_heads), dim=1)
    # Queries and keys together, because each operation on one token costs more than its arithmetic. Not addcmul, which rounds only
    # once: eager code in bfloat16 rounds both products.
    rotated = q_and_k * inputs.cos.unsqueeze(1) + q_and_k.roll(head_dim // 2, dims=-1) * inputs.sin.unsqueeze(1)
    q, k = rotated.split(counts, dim=1)
    return q, k, v


def _adapted(inputs: Projections) -> torch.Tensor:
    """qkv with the adapter, whose products round as those of `lora_linear`."""
    qkv, low, has_adapter = inputs.qkv, inputs.low, None if inputs.adapter_index is None else (inputs.adapter_index >= 0)[:, None]
    keys = qkv.shape[1] - inputs.num_heads * inputs.k_cache.shape[3] >> 1
    parts, column = list(qkv.split((qkv.shape[1] - 2 * keys, keys, keys), dim=1)), 0
    adapters = (inputs.lora_q, inputs.scaling_q), (inputs.lora_k, inputs.scaling_k), (inputs.lora_v, inputs.scaling_v)
    for number, (lora_b, scaling) in enumerate(adapters):
        if lora_b is not None:
            plain, delta = parts[number], F.linear(low[:, column : column + lora_b.shape[1]], lora_b)
            adapted = torch.add(plain.to(accumulator(qkv.dtype)), delta, alpha=scaling).to(qkv.dtype)
            parts[number] = adapted if has_adapter is None else torch.where(has_adapter, adapted, plain)
            column += lora_b.shape[1]
    return torch.cat(parts, dim=1)


def write(slots: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write the rows of the second tensor of each pair to these slots of the first, a cache of pages."""
    for cache, rows in pairs:
        page_size = cache.shape[1]
        if cache.stride(0) == page_size * cache.stride(1):
            cache.flatten(0, 1).index_copy_(0, slots, rows)
        else:  # joining the pages would copy them
            cache.index_put_((slots // page_size, slots % page_size), rows)


@called_with(RotaryWriteInputs)
def rotary_write_cost(inputs: RotaryWriteInputs) -> Cost:
    """FLOPs: the adapter's products, and three per rotated feature. Bytes: every tensor once, of the caches what is written."""
    tokens, head_dim = inputs.cos.shape
    rotated = inputs.num_heads + inputs.k_cache.shape[2]
    flops, moved = adapter_cost(inputs, range(tokens))
    moved += 2 * nbytes(inputs.qkv) + nbytes(inputs.cos, inputs.sin, inputs.slots)
    return Cost(flops=flops + 3 * tokens * rotated * head_dim, bytes=moved)


def adapter_cost(inputs: Projections, rows: range | list[int]) -> tuple[int, int]:
    """FLOPs and bytes of the adapter in these rows: B once if any of them uses it, and their part of `low` and adapter_index."""
    if inputs.low is None:
        return 0, 0
    index = inputs.adapter_index
    using = len(rows) if index is None else sum(index[row].item() >= 0 for row in rows)
    weights = [one for one in (inputs.lora_q, inputs.lora_k, inputs.lora_v) if one is not None]
    low = using * inputs.low.shape[1] * inputs.low.element_size()
    flops = 2 * using * sum(one.numel() for one in weights)
    return flops, low + (nbytes(*weights) if using else 0) + (0 if index is None else len(rows) * index.element_size())


@called_with(RotaryWriteInputs)
def rotary_write_library(inputs: RotaryWriteInputs) -> Callable[[], torch.Tensor]:
    """A copy of qkv: the same bytes, without the arithmetic."""
    return partial(torch.empty(inputs.qkv.shape, dtype=inputs.qkv.dtype, device=inputs.qkv.device).copy_, inputs.qkv)


def draw_projections(
    draw: Draw, *, rows: int, heads: tuple[int, int], head_dim: int, ranks: tuple[int, int, int], adapters: tuple[int, ...] | None
) -> dict[str, Any]:
    """The shared arguments except the caches. A rank of 0 passes None for B; `adapters` is repeated over the rows, None passes None."""
    num_heads, num_kv_heads = heads
    width = (num_heads + 2 * num_kv_heads) * head_dim
    # A view, as of a product with further columns.
    qkv = draw.normal(rows, width + 16)
    qkv[:, width:] = torch.nan
    angles = draw.normal(rows, head_dim // 2, dtype=torch.float32)
    low = draw.normal(rows, sum(ranks)) if any(ranks) else None
    index = None if adapters is None else [adapters[row % len(adapters)] for row in range(rows)]
    if low is not None and index is not None:
        low[[row for row, adapter in enumerate(index) if adapter < 0]] = torch.nan
    given = {"cos": torch.cat((angles.cos(), angles.cos()), dim=1), "sin": torch.cat((-angles.sin(), angles.sin()), dim=1)}
    given = {"qkv": qkv[:, :width], **{name: one.to(draw.dtype) for name, one in given.items()}, "low": low}
    for name, count, rank in zip("qkv", (num_heads, num_kv_heads, num_kv_heads), ranks, strict=True):
        given[f"lora_{name}"] = draw.normal(count * head_dim, rank, std=rank**-0.5) if rank else None
    scalings = {"scaling_q": 0.5, "scaling_k": -1.5, "scaling_v": 2.0}
    return {**given, "adapter_index": None if index is None else draw.int32(index), "num_heads": num_heads, **scalings}


def _make(
    draw: Draw,
    *,
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    ranks: tuple[int, int, int] = (0, 0, 0),
    adapters: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    given = draw_projections(draw, rows=tokens, heads=heads, head_dim=head_dim, ranks=ranks, adapters=adapters)
    pages = 2 + tokens // page_size
    # Page 0 is for padding. Keys and values interleave, and nothing of the cache is read.
    cache = draw.normal(pages, page_size, 2, heads[1], head_dim)
    cache[:] = torch.nan
    slots = [page_size + slot for slot in draw.permutation((pages - 1) * page_size)[:tokens]]
    given["slots"] = torch.tensor(slots, dtype=torch.int64, device=draw.device)
    given |= {"k_cache": cache[:, :, 0], "v_cache": cache[:, :, 1]}
    return {name: given[name] for name in RotaryWriteInputs._fields}


def _case(name: str, tokens: int, heads: tuple[int, int], head_dim: int, page_size: int = 64, *, released: bool = False, **more) -> Case:
    """`heads` are (num_heads, num_kv_heads)."""
    return Case(name, _make, {"tokens": tokens, "heads": heads, "head_dim": head_dim, "page_size": page_size, **more}, released)


CASES = (
    _case("4.1-2b, 64 rows", 64, (16, 4), 128, released=True),
    _case("4.1-2b, prompts of 32 clips", 32 * 150, (16, 4), 128, released=True),
    _case("3.3-2b, 128 rows with adapter", 128, (32, 8), 64, ranks=(64, 0, 64), released=True),
    _case("3.3-2b, prompts of 8 clips, half with adapter", 8 * 180, (32, 8), 64, ranks=(64, 0, 64), adapters=(0, -1), released=True),
    _case("3.3-8b, prompts of 8 clips", 8 * 180, (32, 8), 128, ranks=(64, 0, 64), released=True),
    _case("three adapters in some rows", 5, (4, 2), 16, 8, ranks=(5, 16, 3), adapters=(0, -1, 0)),
    _case("no adapter", 37, (4, 1), 16, 16),
    _case("adapter of queries alone, in all rows", 19, (3, 1), 40, 8, ranks=(16, 0, 0)),
    _case("adapter of queries and values", 33, (3, 3), 64, 64, ranks=(8, 0, 8), adapters=(-1, 0)),
    _case("no row uses the adapter", 4, (2, 2), 16, 8, ranks=(4, 4, 4), adapters=(-1,)),
    _case("head dim 80", 18, (5, 1), 80, 16, ranks=(0, 20, 0)),
    _case("head dim 128", 3, (2, 1), 128, 1),
    _case("head dim 2", 9, (2, 1), 2, 4, ranks=(1, 1, 1), adapters=(0, 0, -1)),
    _case("one token", 1, (4, 2), 32, 16, ranks=(8, 0, 8)),
    _case("no tokens", 0, (4, 2), 16, 8, ranks=(8, 8, 8), adapters=(0,)),
)

OPERATION = Operation(
    name="rotary_write",
    call=rotary_write,
    reference=rotary_write_reference,
    cost=rotary_write_cost,
    cases=CASES,
    library=rotary_write_library,
    mutates=("k_cache", "v_cache"),
    triton=triton_backend("rotary_write"),
)
