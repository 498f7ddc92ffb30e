"""The windowed Q-Former: 15 frames of a clip become 3 vectors of the language model's width.

BERT layers over a few learned queries with cross-attention to the audio (Li et al., "BLIP-2", arXiv 2301.12597). Names and
arithmetic are those of transformers' `GraniteSpeechEncoderProjector` and `Blip2QFormerModel`. Windows are independent. A clip's
last window is padded with zero vectors, which are attended to like frames, because the model was trained that way.

Inside, every tensor is `(windows, queries or frames, width)`. Packed, only the windows that clips have are computed; padded, each
clip has as many windows as the longest, as in transformers. `encoder.py` describes both layouts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from torch import Tensor, nn

from granite_speech.config import Blip2QFormerConfig, GraniteSpeechConfig
from granite_speech.errors import InputError, UnsupportedError
from granite_speech.modules.activations import Activation
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.add_norm import add_norm, has_kernels
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.outputs import BaseModelOutputWithPooling
from granite_speech.modules.packing import Segments
from granite_speech.modules.prompts import refuse_arguments
from granite_speech.modules.transfers import on_device

__all__ = ["GraniteSpeechEncoderProjector"]

_MOST = (16, 64, 128)  # queries, keys and dim of the kernel


class Blip2QFormerMultiHeadAttention(nn.Module):
    """Queries attend to themselves, or to the frames of their window."""

    def __init__(self, config: Blip2QFormerConfig, source_width: int):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query = LoraLinear(config.hidden_size, config.hidden_size)
        self.key = LoraLinear(source_width, config.hidden_size)
        self.value = LoraLinear(source_width, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """`(windows, queries, hidden)`, and None in the place of transformers' weights. Masks are bool, `(windows, 1, 1, keys)`."""
        source, mask = hidden_states, attention_mask
        if encoder_hidden_states is not None:
            source, mask = encoder_hidden_states, encoder_attention_mask
        # Before the first cross-attention all windows have the same queries, so `hidden_states` has a single row.
        q, k, v = (
            one.unflatten(2, (self.num_attention_heads, -1)) for one in (self.query(hidden_states), self.key(source), self.value(source))
        )
        dropout = self.attention_dropout if self.training else 0.0
        if mask is None and not dropout and _have_kernel(q, k, v):
            return OPERATIONS["window_attention"].run(q, k, v).flatten(2), None
        q, k, v = (one.transpose(1, 2) for one in (q.expand(k.shape[0], -1, -1, -1), k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2), None


def _have_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `window_attention` runs as a kernel on these queries, keys and values, `(windows, queries or keys, heads, dim)`."""
    if OPERATIONS["window_attention"].resolve(None, q.device, q.dtype) == "torch":
        return False
    few = all(0 < size <= most for size, most in zip((q.shape[1], k.shape[1], q.shape[3]), _MOST, strict=True))
    return few and q.stride(3) == k.stride(3) == v.stride(3) == 1 and q.dtype == k.dtype == v.dtype  # a hook may give any


class Blip2QFormerOutput(nn.Module):
    """Projection, then norm of its sum with the layer's input: after the residual, as in BERT."""

    def __init__(self, config: Blip2QFormerConfig, inner: int):
        super().__init__()
        self.dense = LoraLinear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        delta = self.dropout(self.dense(hidden_states))
        if not has_kernels(delta) or delta.shape != input_tensor.shape or have_hooks(self.LayerNorm):
            return self.LayerNorm(delta + input_tensor)
        return add_norm(input_tensor.flatten(0, -2), delta.flatten(0, -2), self.LayerNorm)[1].view_as(delta)


class Blip2QFormerAttention(nn.Module):
    """Attention with its output projection, residual and norm."""

    def __init__(self, config: Blip2QFormerConfig, source_width: int):
        super().__init__()
        self.attention = Blip2QFormerMultiHeadAttention(config, source_width)
        self.output = Blip2QFormerOutput(config, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        attended, _ = self.attention(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        return self.output(attended, hidden_states)


class Blip2QFormerIntermediate(nn.Module):
    """First layer of the feed-forward."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.dense = LoraLinear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = Activation(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class Blip2QFormerLayer(nn.Module):
    """Self-attention, in every `cross_attention_frequency`-th layer cross-attention, feed-forward."""

    def __init__(self, config: Blip2QFormerConfig, number: int):
        super().__init__()
        self.attention = Blip2QFormerAttention(config, config.hidden_size)
        self.crossattention = None
        if number % config.cross_attention_frequency == 0:
            self.crossattention = Blip2QFormerAttention(config, config.encoder_hidden_size)
        self.intermediate_query = Blip2QFormerIntermediate(config)
        self.output_query = Blip2QFormerOutput(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        query_length: int | None = None,
    ) -> Tensor:
        """All of `hidden_states` are queries, whatever `query_length` is."""
        queries = self.attention(hidden_states=hidden_states, attention_mask=attention_mask)
        if self.crossattention is not None:
            if encoder_hidden_states is None:
                raise InputError(
                    got="a Q-Former layer without encoder_hidden_states",
                    expected="(windows, frames, width)",
                    remedy="Pass the frames to attend to",
                )
            queries = self.crossattention(
                hidden_states=queries,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )
        return self.output_query(self.intermediate_query(queries), queries)


class Blip2QFormerEncoder(nn.Module):
    """The layers, under the checkpoint's name."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList([Blip2QFormerLayer(config, number) for number in range(config.num_hidden_layers)])

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        query_length: int | None = None,
    ) -> BaseModelOutputWithPooling:
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask=encoder_attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states)


class Blip2QFormerModel(nn.Module):
    """Norm of the queries, then the layers."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.config = config
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = Blip2QFormerEncoder(config)

    def forward(
        self,
        query_embeds: Tensor,
        query_length: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Attend from queries to frames.

        Args:
            query_embeds: `(windows, queries, hidden)`, or `(1, queries, hidden)` for all windows.
            query_length: the number of queries, or None.
            attention_mask, encoder_attention_mask: `(windows, queries)` and `(windows, frames)` of 0 and 1; None keeps all.
            encoder_hidden_states: `(windows, frames, width)`.
            return_dict: False returns a tuple.

        Returns:
            `last_hidden_state` `(windows, queries, hidden)`, and the first query's as `pooler_output`.
        """
        refuse_arguments(unknown, "Blip2QFormerModel.forward")
        if query_length not in (None, query_embeds.shape[1]):
            raise UnsupportedError(
                got=f"query_length={query_length} of {query_embeds.shape[1]} vectors",
                expected="queries alone: these models have no text in the Q-Former",
                remedy="Omit query_length",
            )
        queries = self.dropout(self.layernorm(query_embeds.to(self.layernorm.weight.dtype)))
        frames = None if encoder_hidden_states is None else encoder_hidden_states.to(queries.dtype)
        masks = (None if one is None else one.bool()[:, None, None, :] for one in (attention_mask, encoder_attention_mask))
        own, of_frames = masks
        output = self.encoder(queries, attention_mask=own, encoder_hidden_states=frames, encoder_attention_mask=of_frames)
        states = output.last_hidden_state
        output = BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0])
        return output.to_tuple() if return_dict is False else output


class GraniteSpeechEncoderProjector(nn.Module):
    """Audio states to audio vectors, `window_size // downsample_rate` per window."""

    def __init__(self, config: GraniteSpeechConfig):
        super().__init__()
        config.validate()
        self.hidden_size, self.downsample_rate, self.window_size = (
            config.projector_config.hidden_size,
            config.downsample_rate,
            config.window_size,
        )
        self.num_queries = config.window_size // config.downsample_rate
        self.query = nn.Parameter(torch.randn(1, self.num_queries, config.projector_config.hidden_size))
        self.qformer = Blip2QFormerModel(config.projector_config)
        self.linear = LoraLinear(config.projector_config.hidden_size, config.text_config.hidden_size)

    def tokens(self, frames: int) -> int:
        """Number of audio vectors of a clip with this many encoder frames."""
        return -(-frames // self.window_size) * self.num_queries

    def token_segments(self, clips: Segments) -> Segments:
        """Where each clip's audio vectors lie."""
        return Segments(tuple(self.tokens(length) for length in clips.lengths), clips.device)

    def windows(self, clips: Segments) -> Tensor | None:
        """The `index` of `project` for these clips, on their device; None if every clip is whole windows."""
        if all(length % self.window_size == 0 for length in clips.lengths):
            return None
        return on_device(clips.window_rows(self.window_size, beyond=clips.total), clips.device)

    def project(self, frames: Tensor, index: Tensor | None) -> Tensor:
        """Project windows of packed frames. Only the shapes of the arguments decide which work is done.

        Args:
            frames: `(rows, encoder width)`. Rows that `index` does not name may hold NaN.
            index: `(windows, window_size)` int64, the row of each frame of each window; the number of rows means a zero vector.
                None: the frames in order.

        Returns:
            `(windows * queries, text hidden size)`.
        """
        if index is None:
            windows = frames.reshape(frames.shape[0] // self.window_size, self.window_size, frames.shape[1])
        else:
            windows = F.pad(frames, (0, 0, 0, 1)).index_select(0, index.flatten()).unflatten(0, index.shape)
        return self.linear(self._queried(windows)).flatten(0, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project a padded batch, as transformers does: windows beyond a clip's end are computed too.

        Args:
            hidden_states: `(clips, frames, encoder width)`, zero after a clip's end.

        Returns:
            `(clips, audio tokens, text hidden size)`, as many vectors as the padded frames give. `project` computes only those
            that clips have.
        """
        if hidden_states.dim() != 3:
            raise InputError(
                got=f"hidden_states of shape {tuple(hidden_states.shape)}",
                expected="(clips, frames, encoder width)",
                remedy="Pass the encoder's last_hidden_state",
            )
        count, frames, width = hidden_states.shape
        padded = F.pad(hidden_states, (0, 0, 0, -frames % self.window_size))
        vectors = self._queried(padded.reshape(-1, self.window_size, width))
        return self.linear(vectors.reshape(count, self.tokens(frames), self.hidden_size))

    def _queried(self, windows: Tensor) -> Tensor:
        """`(windows, window_size, encoder width)` → `(windows, queries, hidden)`."""
        return self.qformer(query_embeds=self.query, encoder_hidden_states=windows).last_hidden_state
