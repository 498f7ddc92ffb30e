"""`decode_attention` of one row on a CPU: a step of a single answer, whose time is in the number of operations, not in their arithmetic.

The reference gathers keys and values and pads them. Here the pages of the answer lie one after another in the cache, as they do unless
other answers ran meanwhile, so its keys and values are views. In 16 bits these are multiplied as they are, with sums in float32.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_kernels.decode_attention import DecodeAttentionInputs, decode_attention_reference
from granite_kernels.op import called_with
from granite_kernels.paged_attention import LastPlan

_LAST_PLAN = LastPlan()


@called_with(DecodeAttentionInputs)
def decode_attention_cpu(inputs: DecodeAttentionInputs) -> Tensor:
    """`decode_attention` for CPU tensors. More rows than one, an inactive row and scattered pages are the reference's."""
    caches, index = (inputs.k_cache, inputs.v_cache), (inputs.block_table, inputs.kv_lens)
    page_size, num_kv_heads, head_dim = inputs.k_cache.shape[1:]
    span = None
    if inputs.qkv.shape[0] == 1 and all(one.stride(0) == page_size * one.stride(1) for one in caches):
        span = _LAST_PLAN.of(index, (page_size,), partial(_span, *index, page_size))
    if span is None:
        return decode_attention_reference(*inputs)
    keys, values = (cache.flatten(0, 1)[span] for cache in caches)
    heads = _adapted(inputs).view(1, -1, head_dim)
    q_and_k = heads[:, :-num_kv_heads]
    rotated = q_and_k * inputs.cos.unsqueeze(1) + q_and_k.roll(head_dim // 2, dims=-1) * inputs.sin.unsqueeze(1)
    keys[-1:].copy_(rotated[:, inputs.num_heads :])
    values[-1:].copy_(heads[:, -num_kv_heads:])
    # The query heads that share a head of keys are queries of one head.
    queries = rotated[:, : inputs.num_heads].unflatten(1, (num_kv_heads, -1))
    keys, values = (one.transpose(0, 1).unsqueeze(0) for one in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, scale=inputs.scale).reshape(1, -1, head_dim)


def _span(block_table: Tensor, kv_lens: Tensor, page_size: int) -> slice | None:
    """The keys of the only row, in a cache whose pages are joined; None unless its pages lie one after another."""
    [kv_len] = kv_lens.tolist()
    if not 0 < kv_len <= block_table.shape[1] * page_size:
        return None
    pages = -(-kv_len // page_size)
    [numbers] = block_table[:, :pages].tolist()
    if numbers != list(range(numbers[0], numbers[0] + pages)):
        return None
    return slice(numbers[0] * page_size, numbers[0] * page_size + kv_len)


def _adapted(inputs: DecodeAttentionInputs) -> Tensor:
    """qkv with the adapter."""
    if inputs.low is None:
        return inputs.qkv
    low, qkv = inputs.low, inputs.qkv.clone(memory_format=torch.contiguous_format)
    if inputs.adapter_index is not None:
        low = torch.where((inputs.adapter_index >= 0).unsqueeze(1), low, 0.0)
    keys = inputs.k_cache.shape[2] * inputs.k_cache.shape[3]
    parts, column = qkv.split((qkv.shape[1] - 2 * keys, keys, keys), dim=1), 0
    adapters = (inputs.lora_q, inputs.scaling_q), (inputs.lora_k, inputs.scaling_k), (inputs.lora_v, inputs.scaling_v)
    for part, (lora_b, scaling) in zip(parts, adapters, strict=True):
        if lora_b is not None:
            part.addmm_(low[:, column : column + lora_b.shape[1]], lora_b.T, alpha=scaling)
            column += lora_b.shape[1]
    return qkv
