"""Prompts and decode steps of a small language model on a CPU, in few PyTorch calls.

PyTorch takes about as long to start an operation as to multiply one token with a small weight, and a layer that is computed by one module
after another is sixty operations. Here it is twenty-five: an adapter is added to a float32 copy of its weight, a product adds to the
residual stream, and nothing is looked up, checked or rounded in between. Activations stay in float32 from the embedding to the last norm,
which in 16 bits is nearer to the truth than the modules are.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from granite_kernels.launch import is_plain
from torch import Tensor

from granite_speech.modules.cache import CacheStep
from granite_speech.modules.decoder_layers import causal_attention
from granite_speech.modules.fused_products import Layer, Product
from granite_speech.modules.packing import Segments
from granite_speech.modules.quantized import dequantized
from granite_speech.modules.rotary import Rotary

__all__ = ["SmallLayers"]

_LARGEST = 1 << 18  # elements of a weight. A larger one takes longer to read than its operation to start
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDED = 16  # keys that are gathered for several rows are a multiple of this


class _Weights(NamedTuple):
    """One layer's, float32: `(in, out)` views of `(out, in)`, vectors and numbers."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    norms: tuple[Tensor, Tensor]
    eps: tuple[Tensor, Tensor]


class SmallLayers:
    """The layers of a model, for passes in which every row has the adapter, if there is one."""

    def __init__(self, layers: Sequence[Layer], num_heads: int):
        self._layers, self._num_heads = layers, num_heads
        self._sources = [one for layer in layers for one in _sources(layer)]
        self._take_weights()

    @staticmethod
    def run_on(x: Tensor) -> bool:
        """Whether a pass of this tensor is for this class: on a CPU, unless somebody has chosen a backend or sees every operation."""
        operation = OPERATIONS["decode_attention"]
        is_default = x.device.type == "cpu" and x.dtype in _DTYPES and operation.select(None, x) == operation.on_cpu
        return is_default and is_plain((x,)) and not torch.is_grad_enabled()

    @classmethod
    def of(cls, layers: Sequence[Layer], num_heads: int) -> Self | None:
        """None if a layer is too large, or has a weight that this cannot take in."""
        usable = all(one.is_fused and all(map(_is_usable, (one.qkv, one.o, one.gate_up, one.down))) for one in layers)
        if not usable or any(one.is_inference() for layer in layers for one in _sources(layer)):
            return None  # a tensor of inference mode does not tell whether it has changed
        return cls(layers, num_heads)

    def _take_weights(self) -> None:
        self._versions = self._current_versions()
        with torch.inference_mode(False), torch.no_grad():
            self._weights = [self._taken(layer) for layer in self._layers]

    def _current_versions(self) -> list[int]:
        return [one._version for one in self._sources]

    @staticmethod
    def _taken(layer: Layer) -> _Weights:
        module = layer.module
        weights = (_with_adapters(layer), *map(_wide, (layer.o, layer.gate_up, layer.down)))
        norms = (module.input_layernorm, module.post_attention_layernorm)
        return _Weights(
            *(one.T for one in weights),
            norms=tuple(one.weight.detach().float() for one in norms),
            eps=tuple(torch.tensor(one.variance_epsilon) for one in norms),
        )

    def step(self, x: Tensor, rotary: Rotary, cache: CacheStep) -> Tensor:
        """One new token of each row, whose key and value are stored.

        Args:
            x: `(rows, hidden)` multiplied embeddings.
            rotary: cosine and signed sine of the positions, `(rows, head_dim)` each.
            cache: a step of one token a row; rows without keys are not active.

        Returns:
            `(rows, hidden)` float32, before the final norm.
        """
        keys, num_kv_heads = _Keys(cache, x.shape[0]), cache.pool.keys[0].shape[2]

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            k, v = keys.with_new(number, k, v)
            # The query heads that share a head of keys are queries of one head.
            q = q.to(k.dtype).view(q.shape[0], num_kv_heads, -1, q.shape[2])
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keys.mask, scale=scale)

        return self._run(x, rotary, num_kv_heads, attend)

    def prompt(self, x: Tensor, rotary: Rotary, cache: CacheStep, segments: Segments) -> Tensor:
        """The same for prompts, `(total_tokens, hidden)`, of sequences without earlier keys."""

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            cache.write(number, k, v)
            return causal_attention(q, k, v, segments, scale, 0.0)

        return self._run(x, rotary, cache.pool.keys[0].shape[2], attend)

    def _run(self, x: Tensor, rotary: Rotary, num_kv_heads: int, attend: Callable[..., Tensor]) -> Tensor:
        if self._current_versions() != self._versions:
            self._take_weights()
        rows, x, (cos, sin) = x.shape[0], x.float(), (one.float().unsqueeze(1) for one in rotary)
        heads, head_dim = self._num_heads, cos.shape[2]
        rotated = heads + num_kv_heads
        for number, (layer, (qkv, o, gate_up, down, norms, eps)) in enumerate(zip(self._layers, self._weights, strict=True)):
            multiplier, scale = layer.module.residual_multiplier, layer.module.self_attn.scaling
            projected = torch.mm(_norm(x, norms[0], eps[0]), qkv).view(rows, -1, head_dim)
            turned = projected[:, :rotated]
            turned = torch.addcmul(turned * cos, turned.roll(head_dim // 2, dims=-1), sin)
            attended = attend(number, turned[:, :heads], turned[:, heads:], projected[:, rotated:], scale)
            x = torch.addmm(x, attended.reshape(rows, -1).float(), o, alpha=multiplier)
            gate, up = torch.mm(_norm(x, norms[1], eps[1]), gate_up).chunk(2, dim=1)
            x = torch.addmm(x, F.silu(gate).mul_(up), down, alpha=multiplier)
        return x


class _Keys:
    """Where the keys of a step's rows are, which is the same in all layers.

    Attributes:
        mask: added to the scores of `with_new`'s keys, `(rows, 1, 1, keys)`; None if all are the rows' own.
    """

    def __init__(self, cache: CacheStep, rows: int):
        self._cache, self._rows, self.mask = cache, rows, None
        page_size, lengths = cache.pool.keys[0].shape[1], cache.kv_lens.tolist()
        self._span = _span(cache.block_table, lengths[0], page_size) if rows == 1 else None
        if self._span is not None:
            return
        kv_lens, table = cache.kv_lens.unsqueeze(1), cache.block_table
        position = torch.arange(min(-(-max(lengths) // _ROUNDED) * _ROUNDED, table.shape[1] * page_size) or 1)
        slots = torch.add(position % page_size, table.index_select(1, position // page_size), alpha=page_size)
        exists = position < kv_lens
        # The first key in place of those past the end, which may hold NaN.
        self._slots = torch.where(exists, slots, slots[:, :1]).flatten()
        mask = torch.where(position < kv_lens.clamp(min=1), 0.0, -torch.inf)
        self.mask = mask.to(cache.pool.keys[0].dtype)[:, None, None]
        # A row that is not active writes to the first slot of page 0, which belongs to no sequence.
        new = slots.gather(1, (kv_lens - 1).clamp(min=0).long())
        self._new = torch.where(kv_lens > 0, new, 0).flatten()

    def with_new(self, layer: int, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Store `(rows, num_kv_heads, head_dim)` of one layer; returns all keys and all values, `(rows, num_kv_heads, keys, head_dim)`."""
        pool, found = self._cache.pool, []
        for pages, new in ((pool.keys[layer], keys), (pool.values[layer], values)):
            slots = pages.flatten(0, 1)
            if self._span is not None:
                own = slots[self._span]
                own[-1:].copy_(new)
            else:
                slots.index_copy_(0, self._new, new.to(slots.dtype))
                own = slots.index_select(0, self._slots)
            found.append(own.view(self._rows, -1, *own.shape[1:]).transpose(1, 2))
        return found


def _span(block_table: Tensor, kv_len: int, page_size: int) -> slice | None:
    """The keys of the only row, in pages that lie one after another; None unless they do."""
    if kv_len == 0:
        return None
    pages = -(-kv_len // page_size)
    [numbers] = block_table[:, :pages].tolist()
    if numbers != list(range(numbers[0], numbers[0] + pages)):
        return None
    return slice(numbers[0] * page_size, numbers[0] * page_size + kv_len)


def _norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """RMSNorm in float32, in fewer operations than PyTorch's own."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return (x * torch.addcmul(eps, length, length, value=1 / x.shape[1]).rsqrt_()).mul_(weight)


def _is_usable(product: Product) -> bool:
    weight = product.weight
    is_readable = weight.dtype in _DTYPES or product.scale is not None
    return weight.numel() <= _LARGEST and is_readable and product.packed is product.bias is None


def _wide(product: Product) -> Tensor:
    """A weight in float32; the weight itself, if it is that."""
    weight = product.weight.detach()
    return weight.float() if product.scale is None else dequantized(weight, product.scale, torch.float32)


def _sources(layer: Layer) -> Iterator[Tensor]:
    """Everything that the weights are made from."""
    module = layer.module
    attention = module.self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        yield projection.weight
        if projection.has_adapter:
            yield from (projection.lora_A.weight, projection.lora_B.weight)
    yield from (attention.o_proj.weight, module.mlp.gate_proj.weight, module.mlp.up_proj.weight, module.mlp.down_proj.weight)
    yield from (module.input_layernorm.weight, module.post_attention_layernorm.weight)


def _with_adapters(layer: Layer) -> Tensor:
    """The weight of q, k and v, and what the adapter adds to it."""
    attention, weight = layer.module.self_attn, _wide(layer.qkv)
    if layer.qkv.lora_a is None:
        return weight
    weight = weight.clone() if weight.dtype == layer.qkv.weight.dtype else weight
    parts = weight.split([one.weight.shape[0] for one in (attention.q_proj, attention.k_proj, attention.v_proj)])
    matrices = iter(layer.qkv.lora_a.float().split([one.shape[1] for one in layer.adapter.b if one is not None]))
    for part, b, scaling in zip(parts, layer.adapter.b, layer.adapter.scaling, strict=True):
        if b is not None:
            part.addmm_(b.float(), next(matrices), alpha=scaling)
    return weight
