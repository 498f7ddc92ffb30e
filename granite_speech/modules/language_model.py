"""The Granite language model, packed: tokens of all sequences in one tensor, `(total_tokens, hidden)`.

Llama with four multipliers (Granite 3.0, arXiv 2408.13359): of the embeddings, of the attention scores in place of
1/sqrt(head_dim), of every residual branch, and a divisor of the logits. Names and arithmetic are those of transformers'
`GraniteForCausalLM`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from torch import Tensor, nn

from granite_speech.config import GraniteConfig
from granite_speech.modules.activations import activation
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.cache import CacheStep
from granite_speech.modules.packing import Bucket, Segments

__all__ = ["GraniteForCausalLM", "GraniteModel", "Tokens"]

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Tokens:
    """Layout of packed tokens, as every layer needs it.

    Attributes:
        segments: where each sequence lies; a Bucket only with a `step`.
        positions: `(total_tokens,)` int64, for the rotary embedding.
        adapter_index: `(total_tokens,)` int32, 0 with the adapter and −1 without; None: all tokens have it.
        step: this call's view of the cache; None: no cache.
        attentions: a list that takes each layer's softmax weights, one tensor `(heads, queries, keys)` per sequence.
    """

    segments: Segments | Bucket
    positions: Tensor
    adapter_index: Tensor | None = None
    step: CacheStep | None = None
    attentions: list[list[Tensor]] | None = None


class GraniteRMSNorm(nn.Module):
    """`weight · x / sqrt(mean(x²) + eps)`; normalised at least in float32, rounded before the weight is applied."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight  # once: looking up a parameter takes as long as a small kernel's dispatch
        return weight * F.rms_norm(x, weight.shape, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"


class GraniteAttention(nn.Module):
    """Causal attention with grouped key and value heads and rotary positions."""

    def __init__(self, config: GraniteConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.attention_head_dim
        self.scaling, self.dropout = float(config.attention_multiplier), config.attention_dropout
        queries, keys, bias = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim, config.attention_bias
        self.q_proj = LoraLinear(config.hidden_size, queries, bias=bias)
        self.k_proj = LoraLinear(config.hidden_size, keys, bias=bias)
        self.v_proj = LoraLinear(config.hidden_size, keys, bias=bias)
        self.o_proj = LoraLinear(queries, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, rotary: Rotary, tokens: Tokens) -> Tensor:
        q, k, v = (proj(x, tokens.adapter_index).view(x.shape[0], -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        # Together, because each operation on one token costs more than its arithmetic.
        q, k = rotate(torch.cat((q, k), dim=1), *rotary).split((q.shape[1], k.shape[1]), dim=1)
        step, segments = tokens.step, tokens.segments
        if step is not None:
            step.write(self.layer, k, v)
        if step is not None and (step.has_past or self._reads_own_pages(q)):
            pools = step.pool.keys[self.layer], step.pool.values[self.layer]
            extent = {"max_query_len": segments.longest, "scale": self.scaling}
            out = OPERATIONS["paged_attention"].run(q, *pools, step.block_table, step.kv_lens, segments.cu_seqlens, **extent)
        else:
            # All keys are from this call, so nothing needs to be read back from pages, and gradients flow.
            out = causal_attention(q, k, v, segments, self.scaling, self.dropout if self.training else 0.0)
        if tokens.attentions is not None:
            tokens.attentions.append(attention_weights(q, k, segments, self.scaling))
        return self.o_proj(out.flatten(1), tokens.adapter_index)

    @staticmethod
    def _reads_own_pages(q: Tensor) -> bool:
        # The kernel takes prompts of all lengths in one call, while SDPA needs one per sequence. But it has no backward.
        needs_gradient = torch.is_grad_enabled() and q.requires_grad
        return not needs_gradient and OPERATIONS["paged_attention"].resolve(None, q.device, q.dtype) == "triton"

    def extra_repr(self) -> str:
        return OPERATIONS["paged_attention"].backend(self.q_proj.weight)


def rotary_frequencies(config: GraniteConfig, device: torch.device) -> Tensor:
    """Angle per position of every feature of a head, `(head_dim,)` float32: first half negative, second half positive."""
    rope, width = config.rope_parameters, config.attention_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    return torch.cat((-frequencies, frequencies))


def rotary_embedding(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Cosine and signed sine of every position, `(total_tokens, 1, head_dim)` each, for `rotate`.

    Computed in float32, rounded to dtype. The sine's first half is negative.
    """
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of `(total_tokens, heads, head_dim)` by the angles of their positions."""
    # Not addcmul, which rounds only once: eager code in bfloat16 rounds both products.
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


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
        self.gate_proj = LoraLinear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = LoraLinear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = LoraLinear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = activation(config.hidden_act)

    def forward(self, x: Tensor, adapter_index: Tensor | None) -> Tensor:
        hidden = self.activation(self.gate_proj(x, adapter_index)) * self.up_proj(x, adapter_index)
        return self.down_proj(hidden, adapter_index)


class GraniteDecoderLayer(nn.Module):
    """Attention and MLP, with a norm before each; each branch is multiplied by `residual_multiplier`."""

    def __init__(self, config: GraniteConfig, layer: int):
        super().__init__()
        self.residual_multiplier = float(config.residual_multiplier)
        self.self_attn = GraniteAttention(config, layer)
        self.mlp = GraniteMLP(config)
        self.input_layernorm = GraniteRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = GraniteRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, tokens: Tokens) -> Tensor:
        x = torch.add(x, self.self_attn(self.input_layernorm(x), rotary, tokens), alpha=self.residual_multiplier)
        return torch.add(x, self.mlp(self.post_attention_layernorm(x), tokens.adapter_index), alpha=self.residual_multiplier)


class GraniteModel(nn.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: GraniteConfig):
        super().__init__()
        self.config = config
        self.embedding_multiplier = float(config.embedding_multiplier)
        pad = config.pad_token_id
        inside = pad is not None and 0 <= pad < config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=pad if inside else None)
        self.layers = nn.ModuleList([GraniteDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = GraniteRMSNorm(config.hidden_size, config.rms_norm_eps)
        self._frequencies: Tensor | None = None

    def forward(self, embeddings: Tensor, tokens: Tokens, collected: list[Tensor] | None = None) -> Tensor:
        """Run packed embeddings through the layers.

        Args:
            embeddings: `(total_tokens, hidden)`, before the embedding multiplier.
            tokens: their layout.
            collected: a list that takes the multiplied embeddings and every layer's output, the last one after the norm.

        Returns:
            `(total_tokens, hidden)` after the final norm.
        """
        x = embeddings * self.embedding_multiplier
        rotary = rotary_embedding(self._frequencies_on(x.device), tokens.positions, x.dtype)
        for layer in self.layers:
            if collected is not None:
                collected.append(x)
            x = layer(x, rotary, tokens)
        x = self.norm(x)
        if collected is not None:
            collected.append(x)
        return x

    def _frequencies_on(self, device: torch.device) -> Tensor:
        # Not a buffer, because checkpoints do not have it. Cached, because computing it takes as many launches as half a layer.
        if self._frequencies is None or self._frequencies.device != device:
            with torch.inference_mode(False):  # a tensor from inference mode could not be used in a later backward pass
                self._frequencies = rotary_frequencies(self.config, device)
        return self._frequencies


class GraniteForCausalLM(nn.Module):
    """The language model with its head; `model` and `lm_head` as in the checkpoints."""

    def __init__(self, config: GraniteConfig, tied: bool):
        super().__init__()
        self.config = config
        self.model = GraniteModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def logits(self, hidden: Tensor) -> Tensor:
        """`(..., hidden)` → `(..., vocabulary)`, divided by `logits_scaling`."""
        return self.lm_head(hidden) / self.config.logits_scaling
