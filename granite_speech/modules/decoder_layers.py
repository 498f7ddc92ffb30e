"""The Granite language model's layers: RMSNorm, attention and MLP.

Layers take both layouts that `encoder.py` describes: packed states with their `Tokens`, or transformers' padded
`(batch, sequence, hidden)`. Only attention mixes tokens, so only attention packs padded states and pads its result. `Tokens.rows`
says which layout a pass has.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from torch import Tensor, nn

from granite_speech.config import GraniteConfig
from granite_speech.errors import UnsupportedError
from granite_speech.modules.activations import Activation
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.packing import Segments
from granite_speech.modules.prompts import refuse_arguments
from granite_speech.modules.rotary import GraniteRotaryEmbedding, Rotary, rotary_embedding, rotate
from granite_speech.modules.row_parts import in_parts
from granite_speech.modules.tokens import Tokens

__all__ = ["GraniteAttention", "GraniteDecoderLayer", "GraniteMLP", "GraniteRMSNorm"]


class GraniteRMSNorm(nn.Module):
    """`weight · x / sqrt(mean(x²) + eps)`; normalised at least in float32, rounded before the weight is applied."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight  # once: looking up a parameter takes as long as a small kernel's dispatch
        return weight * F.rms_norm(hidden_states, weight.shape, eps=self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon:g}"


class GraniteAttention(nn.Module):
    """Causal attention with grouped key and value heads and rotary positions."""

    def __init__(self, config: GraniteConfig, layer: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer, config.attention_head_dim
        self.scaling, self.attention_dropout = float(config.attention_multiplier), config.attention_dropout
        queries, keys, bias = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim, config.attention_bias
        self.q_proj = LoraLinear(config.hidden_size, queries, bias=bias)
        self.k_proj = LoraLinear(config.hidden_size, keys, bias=bias)
        self.v_proj = LoraLinear(config.hidden_size, keys, bias=bias)
        self.o_proj = LoraLinear(queries, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: None = None,
        *,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        tokens: Tokens | None = None,
        **unknown: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within each sequence.

        Args:
            hidden_states: `(total_tokens, hidden)` with `tokens`, or `(batch, sequence, hidden)`.
            position_embeddings: cosine and sine of the tokens' positions: packed as `rotary_embedding` makes them, padded as
                `GraniteRotaryEmbedding` does. None: of `position_ids`, or counted.
            attention_mask, position_ids: of a padded batch, as for `GraniteModel`; only without `tokens`.
            past_key_values: None. Keys of earlier calls go through the whole model.
            use_cache: without effect here.
            output_attentions: of a call without `tokens`: return the softmax weights.
            tokens: the layout. Without it nothing is read from or added to a cache.

        Returns:
            The states in the layout of `hidden_states`, and the softmax weights of a padded batch, if requested.
        """
        if tokens is None:
            tokens = _layout_of_call(hidden_states, attention_mask, position_ids, past_key_values, unknown)
            tokens = replace(tokens, attentions=[] if output_attentions else None)
        if position_embeddings is None:
            frequencies = GraniteRotaryEmbedding(self.config).frequencies(hidden_states.device)
            rotary = rotary_embedding(frequencies, tokens.positions, hidden_states.dtype)
        else:
            rotary = position_embeddings if tokens.rows is None else tokens.pack_rotary(position_embeddings)
        index = tokens.adapter_index
        projected = (one(hidden_states, adapter_index=index) for one in (self.q_proj, self.k_proj, self.v_proj))
        if tokens.rows is not None:
            projected = map(tokens.rows.pack, projected)
        q, k, v = (one.view(one.shape[0], -1, self.head_dim) for one in projected)
        # Together, because each operation on one token costs more than its arithmetic.
        q, k = rotate(torch.cat((q, k), dim=1), *rotary).split((q.shape[1], k.shape[1]), dim=1)
        out = self._attend(q, k, v, tokens).flatten(1)
        weights = None
        if tokens.attentions is not None:
            tokens.attentions.append(attention_weights(q, k, tokens.segments, self.scaling))
            weights = None if tokens.rows is None else tokens.rows.pad_weights(tokens.attentions[-1])
        return self.o_proj(out if tokens.rows is None else tokens.rows.pad(out), adapter_index=index), weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        """`(total_tokens, heads, head_dim)` in and out. Keys and values are added to the cache, if there is one."""
        step, segments = tokens.step, tokens.segments
        if step is not None:
            step.write(self.layer_idx, k, v)
        if step is not None and (step.has_past or self._reads_own_pages(q)):
            pools = step.pool.keys[self.layer_idx], step.pool.values[self.layer_idx]
            extent = {"max_query_len": segments.longest, "scale": self.scaling}
            return OPERATIONS["paged_attention"].run(q, *pools, step.block_table, step.kv_lens, segments.cu_seqlens, **extent)
        # All keys are from this call, so nothing needs to be read back from pages, and gradients flow.
        return causal_attention(q, k, v, segments, self.scaling, self.attention_dropout if self.training else 0.0)

    @staticmethod
    def _reads_own_pages(q: Tensor) -> bool:
        # The kernel takes prompts of all lengths in one call, while SDPA needs one per sequence. But it has no backward.
        needs_gradient = torch.is_grad_enabled() and q.requires_grad
        return not needs_gradient and OPERATIONS["paged_attention"].resolve(None, q.device, q.dtype) == "triton"

    def extra_repr(self) -> str:
        weight = self.q_proj.weight
        dtype = getattr(self.q_proj, "activation_dtype", weight.dtype)  # peft's layers have none
        return OPERATIONS["paged_attention"].backend(torch.empty(0, dtype=dtype, device=weight.device))


def _layout_of_call(
    states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past_key_values: Any, unknown: dict[str, Any]
) -> Tokens:
    """The layout of a padded batch that a caller gave to a layer on its own."""
    refuse_arguments(unknown, "a layer's forward", allowed=("cache_position",))
    if past_key_values is not None:
        raise UnsupportedError(
            got="past_key_values for a single layer",
            expected="a whole sequence: pages of a cache are shared by all layers and reserved for all at once",
            remedy="Call language_model.model with past_key_values",
        )
    return Tokens.of_batch(states, attention_mask, position_ids)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, dropout: float) -> Tensor:
    """SDPA within each sequence of a packed batch; `(total_tokens, heads, head_dim)` in and out."""
    options = {"is_causal": True, "scale": scale, "dropout_p": dropout, "enable_gqa": q.shape[1] != k.shape[1]}

    def attend(*batch: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in batch), **options).transpose(1, 2)

    if segments.total == 0:
        return q
    if len(set(segments.lengths)) == 1:
        return attend(*(one.unflatten(0, (len(segments.lengths), -1)) for one in (q, k, v))).flatten(0, 1)
    if torch.is_grad_enabled() and q.requires_grad and len(segments.lengths) * segments.longest <= 1.5 * segments.total:
        # Training on nearly equal lengths: one call on a padded batch. No token attends to the padding, which comes after it.
        width, places = segments.longest, segments.rows_at(range(0, len(segments.lengths) * segments.longest, segments.longest))
        return attend(*(segments.pad(one, width) for one in (q, k, v))).flatten(0, 1).index_select(0, places)
    pieces = zip(*(one.split(segments.lengths) for one in (q, k, v)), strict=True)
    return torch.cat([attend(*(one.unsqueeze(0) for one in piece)).squeeze(0) for piece in pieces if piece[0].shape[0]])


def attention_weights(q: Tensor, k: Tensor, segments: Segments, scale: float) -> list[Tensor]:
    """Softmax weights of each sequence, `(heads, queries, keys)`, for output_attentions; attention itself does not use them."""
    weights = []
    for queries, keys in zip(q.split(segments.lengths), k.split(segments.lengths), strict=True):
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys).float() * scale
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        weights.append(scores.masked_fill(future, float("-inf")).softmax(-1).to(q.dtype))
    return weights


class GraniteMLP(nn.Module):
    """`W_down (act(W_gate x) · W_up x)`."""

    def __init__(self, config: GraniteConfig):
        super().__init__()
        self.inner = config.intermediate_size
        self.gate_proj = LoraLinear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = LoraLinear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = LoraLinear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = Activation(config.hidden_act)

    def forward(self, x: Tensor, *, adapter_index: Tensor | None = None) -> Tensor:
        is_packed = x.dim() == 2 and x.device.type == "cpu" and not torch.is_grad_enabled()
        parts = in_parts(x, self.inner) if is_packed else (x,)
        if len(parts) == 1:
            return self._forward(x, adapter_index)
        indices = [None] * len(parts) if adapter_index is None else adapter_index.tensor_split(len(parts))
        return torch.cat([self._forward(*part) for part in zip(parts, indices, strict=True)])

    def _forward(self, x: Tensor, adapter_index: Tensor | None) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x, adapter_index=adapter_index)) * self.up_proj(x, adapter_index=adapter_index)
        return self.down_proj(hidden, adapter_index=adapter_index)


class GraniteDecoderLayer(nn.Module):
    """Attention and MLP, with a norm before each; each branch is multiplied by `residual_multiplier`."""

    def __init__(self, config: GraniteConfig, layer: int):
        super().__init__()
        self.residual_multiplier = float(config.residual_multiplier)
        self.self_attn = GraniteAttention(config, layer)
        self.mlp = GraniteMLP(config)
        self.input_layernorm = GraniteRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = GraniteRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: None = None,
        use_cache: bool | None = None,
        position_embeddings: Rotary | None = None,
        *,
        tokens: Tokens | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Arguments as for `GraniteAttention`; states in, states of the same layout out."""
        if tokens is None:
            tokens = _layout_of_call(hidden_states, attention_mask, position_ids, past_key_values, unknown)
        x = hidden_states
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(x), position_embeddings=position_embeddings, tokens=tokens)
        x = torch.add(x, attended, alpha=self.residual_multiplier)
        hidden = self.mlp(self.post_attention_layernorm(x), adapter_index=tokens.adapter_index)
        return torch.add(x, hidden, alpha=self.residual_multiplier)
