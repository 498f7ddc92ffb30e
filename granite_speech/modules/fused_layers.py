"""The language model's layers in few launches, for passes that fill a cache without gradients: `generate` and the engine.

`GraniteModel.run` calls one module after another, which a hook can see and a backward can follow. Here the projections that read the
same states are one product, on weights that lie side by side (`side_by_side.py`), and what is between two products is one launch:

| | up to 8 rows of one token (a decode step) | more rows |
|---|---|---|
| 1 | norm, q, k, v and the adapter's A | q, k, v and A, by the library |
| 2 | the adapter's B, rotary, cache write, attention | the same, or without attention in a prompt, which then is a launch of its own |
| 3 | o and residual | o, by the library |
| 4 | norm, gate, up and their SiLU product | residual and norm |
| 5 | down and residual | gate, up and their SiLU product, in one launch or after the library's; down, by the library; residual and norm |

`granite_kernels.paths` says which column a product uses. On a CPU, and in any dtype that the kernels do not have, the second column runs
on the operations' references; a small model on a CPU runs in fewer calls than that (`small_layers.py`).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from granite_kernels import OPERATIONS
from granite_kernels.int8_cpu import PackedInt8
from granite_kernels.launch import early_launches
from granite_kernels.matvec import MAX_HEAD_INPUTS
from granite_kernels.paths import Path, block_rows, product_path
from torch import Tensor, nn

from granite_speech.modules.cache import CacheStep, PagePool
from granite_speech.modules.decoder_layers import GraniteDecoderLayer, GraniteRMSNorm
from granite_speech.modules.fused_products import Layer, Product, can_be_read
from granite_speech.modules.int8_layers import packed_head
from granite_speech.modules.rotary import Rotary, rotary_embedding
from granite_speech.modules.side_by_side import padded_rows
from granite_speech.modules.small_layers import SmallLayers
from granite_speech.modules.tokens import Tokens

__all__ = ["FusedLayers", "States", "uses_kernels"]

_MOST_HEAD_DIM = 128  # of the attention kernels
# Tokens that the rounded head proposes. Its error of a logit is about 1 % of their spread, so the best is among the first few.
_CANDIDATES = 16


@dataclass(frozen=True)
class States:
    """What the last layer leaves.

    Attributes:
        hidden: `(rows, hidden)` before the final norm.
        normed: after it; None if the norm is part of the next product.
    """

    hidden: Tensor
    normed: Tensor | None


class Candidates(NamedTuple):
    """Tokens to choose from, as `finish_step` takes them.

    Attributes:
        scores: `(rows, candidates)`.
        ids: `(rows, candidates)` int32; None: the columns.
        log_sums: `(rows, candidates)`, log-sum-exps that together cover all logits; None: the scores are all logits.
        divisor: of the logits, if they are not divided yet.
    """

    scores: Tensor
    ids: Tensor | None
    log_sums: Tensor | None
    divisor: float


@dataclass(frozen=True)
class FusedLayers:
    """Layers and head of a language model, as they are now. Made for one pass, or for a step that runs many times.

    Attributes:
        decoder: the model without head.
        layers: its layers.
        head: `(vocabulary, hidden)`.
        padded_head: the same with rows that the library's product needs to be fast, `(more, hidden)`.
        divisor: of the logits.
        packed_head: a rounded copy of the head, for a CPU.
    """

    decoder: Any
    layers: tuple[Layer, ...]
    head: Tensor | None
    padded_head: Tensor | None
    divisor: float
    packed_head: PackedInt8 | None = None

    @classmethod
    def of(cls, decoder: nn.Module, head: nn.Module | None = None, divisor: float = 1.0) -> Self | None:
        """None if a module is not the usual one, or if weights do not lie side by side. Hooks are the caller's concern."""
        # By name, because the module of GraniteModel imports this one.
        usual = type(decoder).__module__ == "granite_speech.modules.language_model" and not decoder.training
        if not usual or type(decoder.norm) is not GraniteRMSNorm or len(decoder.layers) == 0:
            return None
        norm = decoder.norm.weight
        if not can_be_read(norm, norm.dtype):
            return None
        if head is not None and (type(head) is not nn.Linear or head.bias is not None or not can_be_read(head.weight, norm.dtype)):
            return None
        layers = []
        for module in decoder.layers:
            layer = Layer.of(module, norm.dtype) if type(module) is GraniteDecoderLayer else None
            if layer is None:
                return None
            layers.append(layer)
        weight = None if head is None else head.weight
        padded, packed = (None, None) if weight is None else (padded_rows(weight), packed_head(head))
        return cls(decoder, tuple(layers), weight, weight if padded is None else padded, divisor, packed)

    def without_copies(self) -> Self:
        """The same, with the copies of small weights to be made again."""
        return replace(self, layers=tuple(one.without_copies() for one in self.layers))

    def _are_matvecs(self, rows: int) -> bool:
        """Whether every product of a layer is one launch that reads the weight once, for this many rows."""
        if self.head.shape[1] > MAX_HEAD_INPUTS or not all(one.is_fused for one in self.layers):
            return False
        first = self.layers[0]
        shapes = [one.weight.shape for one in (first.qkv, first.o, first.gate_up, first.down)]
        return all(product_path(rows, inputs, outputs, summed=False) is Path.MATVEC for outputs, inputs in shapes)

    def prompt(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        """Packed embeddings, before the embedding multiplier, to `(total_tokens, hidden)` states after the final norm.

        Args:
            embeddings: `(total_tokens, hidden)`.
            tokens: their layout, with a `step`.
        """
        x = embeddings * self.decoder.embedding_multiplier
        frequencies = self.decoder.rotary_emb.frequencies(x.device)
        cos, sin = (one.squeeze(1) for one in rotary_embedding(frequencies, tokens.positions, x.dtype))
        small = None if tokens.step.has_past else self.small_for(x, tokens)
        if small is not None:
            return self.decoder.norm(small.prompt(x, (cos, sin), tokens.step, tokens.segments)).to(x.dtype)
        return self._many_rows(x, (cos, sin), tokens, None).normed

    def step(self, x: Tensor, rotary: Rotary, tokens: Tokens, counters: Tensor) -> States:
        """One new token of each sequence.

        Args:
            x: `(rows, hidden)` multiplied embeddings.
            rotary: cosine and signed sine of the positions, `(rows, head_dim)` each.
            tokens: the layout.
            counters: `(rows * heads,)` int32 zeros, which stay zero.
        """
        small = self.small_for(x, tokens)
        if small is not None:
            hidden = small.step(x, rotary, tokens.step)
            return States(hidden, self.decoder.norm(hidden).to(x.dtype))
        rows = x.shape[0]
        size = block_rows(rows, int8=self.layers[0].qkv.scale is not None)
        if not uses_kernels(tokens.step.pool) or not self._are_matvecs(size):
            return self._many_rows(x, rotary, tokens, counters)
        if size == rows:
            return self._few_rows(x, rotary, tokens, counters)
        blocks = [slice(first, first + size) for first in range(0, rows, size)]
        cos, sin = rotary
        parts = [self._few_rows(x[one], (cos[one], sin[one]), _rows_of(tokens, one), counters).hidden for one in blocks]
        return States(torch.cat(parts), None)

    def small_for(self, x: Tensor, tokens: Tokens) -> SmallLayers | None:
        """The layers for a pass of x on a CPU, if they are small and every row has the adapter."""
        return self._small if tokens.adapter_index is None and SmallLayers.run_on(x) else None

    @cached_property
    def _small(self) -> SmallLayers | None:
        return SmallLayers.of(self.layers, self.decoder.config.num_attention_heads)

    def _few_rows(self, x: Tensor, rotary: Rotary, tokens: Tokens, counters: Tensor) -> States:
        first = self.layers[0]
        # Not early: the launches after it read the step's state, which the launch before it writes, without waiting.
        projected = first.qkv.fused(x, first.module.input_layernorm)
        with early_launches():
            for layer in self.layers:
                if layer is not first:
                    projected = layer.qkv.fused(x, layer.module.input_layernorm)
                width, multiplier = layer.qkv.weight.shape[0], layer.module.residual_multiplier
                low = None if layer.qkv.lora_a is None else projected[:, width:]
                attended = self._attend_step(layer, projected[:, :width], low, rotary, tokens, counters)
                x = layer.o.fused(attended.flatten(1), residual=x, multiplier=multiplier)
                hidden = layer.gate_up.fused(x, layer.module.post_attention_layernorm, gated=True)
                x = layer.down.fused(hidden, residual=x, multiplier=multiplier)
        return States(x, None)

    def _many_rows(self, x: Tensor, rotary: Rotary, tokens: Tokens, counters: Tensor | None) -> States:
        normed = self.layers[0].module.input_layernorm(x)
        norms = [*(one.module.input_layernorm for one in self.layers[1:]), self.decoder.norm]
        for layer, next_norm in zip(self.layers, norms, strict=True):
            projected, low = layer.qkv.plain(normed)
            if counters is None:
                attended = self._attend_prompt(layer, projected, low, rotary, tokens)
            else:
                attended = self._attend_step(layer, projected, low, rotary, tokens, counters)
            x, normed = self._after_attention(layer, x, attended.flatten(1), tokens)
            x, normed = self._after_mlp(layer, x, normed, next_norm, tokens)
        return States(x, normed)

    def _after_attention(self, layer: Layer, x: Tensor, attended: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        if layer.o is None:
            delta = layer.module.self_attn.o_proj(attended, adapter_index=tokens.adapter_index)
        else:
            delta = layer.o.partial(attended, x.shape[0])
        return _add(layer, x, delta, layer.module.post_attention_layernorm)

    def _after_mlp(self, layer: Layer, x: Tensor, normed: Tensor, norm: GraniteRMSNorm, tokens: Tokens) -> tuple[Tensor, Tensor]:
        if layer.gate_up is None:
            delta = layer.module.mlp(normed, adapter_index=tokens.adapter_index)
        else:
            hidden = layer.gate_up.gated(normed)
            delta = layer.down.partial(hidden, x.shape[0])
        return _add(layer, x, delta, norm)

    def _attend_step(self, layer: Layer, qkv: Tensor, low: Tensor | None, rotary: Rotary, tokens: Tokens, counters: Tensor) -> Tensor:
        """`(rows, heads, head_dim)`: the adapter, rotary, cache write and attention of one new token of each sequence, in one launch."""
        step, pools = tokens.step, _pools(tokens.step, layer)
        arguments = qkv, *rotary, *pools, step.block_table, step.kv_lens, counters, low, *layer.adapter.b, tokens.adapter_index
        return OPERATIONS["decode_attention"].run(*arguments, scale=layer.module.self_attn.scaling, **self._options(layer))

    def _attend_prompt(self, layer: Layer, qkv: Tensor, low: Tensor | None, rotary: Rotary, tokens: Tokens) -> Tensor:
        """As `_attend_step` for any number of tokens of each sequence."""
        step, segments, pools = tokens.step, tokens.segments, _pools(tokens.step, layer)
        arguments = qkv, *rotary, step.slots, *pools, low, *layer.adapter.b, tokens.adapter_index
        q = OPERATIONS["rotary_write"].run(*arguments, **self._options(layer))
        extent = {"max_query_len": segments.longest, "scale": layer.module.self_attn.scaling}
        return OPERATIONS["paged_attention"].run(q, *pools, step.block_table, step.kv_lens, segments.cu_seqlens, **extent)

    def _options(self, layer: Layer) -> dict[str, Any]:
        names = ("scaling_q", "scaling_k", "scaling_v")
        return dict(zip(names, layer.adapter.scaling, strict=True)) | {"num_heads": self.decoder.config.num_attention_heads}

    def logits(self, states: States) -> Tensor:
        """`(rows, vocabulary)`, divided by `divisor`."""
        if states.normed is None:
            head = Product(self.head)
            with early_launches():
                return head.fused(states.hidden, self.decoder.norm, multiplier=1 / self.divisor)
        return self.scores(states) / self.divisor

    @cached_property
    def _head(self) -> Product:
        return Product(self.padded_head)

    def scores(self, states: States) -> Tensor:
        """`(rows, vocabulary)` logits that are not divided."""
        return self._head.plain(states.normed)[0][:, : self.head.shape[0]]

    def candidates(self, states: States) -> Candidates:
        """The tokens among which the best is."""
        if states.normed is not None and self.packed_head is not None:
            return self._decided(states.normed, self.packed_head.linear(states.normed))
        if states.normed is not None:
            return Candidates(self.scores(states), None, None, self.divisor)
        norm = self.decoder.norm
        run = OPERATIONS["head_argmax"].run
        return Candidates(*run(states.hidden, self.head, norm.weight, eps=norm.variance_epsilon, divisor=self.divisor), 1.0)

    def _decided(self, normed: Tensor, rounded: Tensor) -> Candidates:
        """The best tokens by the rounded head, with their logits by the head itself."""
        ids = rounded.topk(min(_CANDIDATES, rounded.shape[1]), dim=1).indices.sort(dim=1).values  # of equal scores, the first one wins
        exact = (self.head[ids] @ normed.unsqueeze(2)).squeeze(2) / self.divisor
        log_sums = torch.logsumexp(rounded.float() / self.divisor, dim=1, keepdim=True)
        return Candidates(exact, ids.int(), log_sums, 1.0)


def _rows_of(tokens: Tokens, rows: slice) -> Tokens:
    """The layout of some rows of one token each."""
    step, index = tokens.step, tokens.adapter_index
    step = replace(step, block_table=step.block_table[rows], kv_lens=step.kv_lens[rows])
    return replace(tokens, step=step, adapter_index=None if index is None else index[rows])


def uses_kernels(pool: PagePool) -> bool:
    """Whether the operations run as kernels on these pages, and not as references."""
    keys = pool.keys[0]
    return keys.shape[-1] <= _MOST_HEAD_DIM and OPERATIONS["decode_attention"].resolve(None, keys.device, keys.dtype) == "triton"


def _add(layer: Layer, x: Tensor, delta: Tensor, norm: GraniteRMSNorm) -> tuple[Tensor, Tensor]:
    """The residual sum, and its norm."""
    options = {"eps": norm.variance_epsilon, "multiplier": layer.module.residual_multiplier}
    return OPERATIONS["add_rms_norm"].run(x, delta, norm.weight, **options)


def _pools(step: CacheStep, layer: Layer) -> tuple[Tensor, Tensor]:
    number = layer.module.self_attn.layer_idx
    return step.pool.keys[number], step.pool.values[number]
