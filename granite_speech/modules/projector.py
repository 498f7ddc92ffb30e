"""The windowed Q-Former: 15 frames of a clip become 3 vectors of the language model's width.

BERT layers over a few learned queries with cross-attention to the audio (Li et al., "BLIP-2", arXiv 2301.12597). Names and
arithmetic are those of transformers' `GraniteSpeechEncoderProjector` and `Blip2QFormerModel`. Windows are independent. A clip's
last window is padded with zero vectors, which are attended to like frames, because the model was trained that way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granite_speech.config import Blip2QFormerConfig, GraniteSpeechConfig
from granite_speech.modules.activations import activation
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.packing import Segments
from granite_speech.modules.transfers import on_device

__all__ = ["GraniteSpeechEncoderProjector"]


class Blip2QFormerMultiHeadAttention(nn.Module):
    """Queries attend to themselves, or to the frames of their window."""

    def __init__(self, config: Blip2QFormerConfig, source_width: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = LoraLinear(config.hidden_size, config.hidden_size)
        self.key = LoraLinear(source_width, config.hidden_size)
        self.value = LoraLinear(source_width, config.hidden_size)

    def forward(self, hidden: Tensor, source: Tensor) -> Tensor:
        q, k, v = (
            one.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for one in (self.query(hidden), self.key(source), self.value(source))
        )
        # Before the first cross-attention all windows have the same queries, so `hidden` has a single row.
        q = q.expand(k.shape[0], -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return out.transpose(1, 2).flatten(2)


class Blip2QFormerOutput(nn.Module):
    """Projection, then norm of its sum with the layer's input: after the residual, as in BERT."""

    def __init__(self, config: Blip2QFormerConfig, inner: int):
        super().__init__()
        self.dense = LoraLinear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Blip2QFormerAttention(nn.Module):
    """Attention with its output projection, residual and norm."""

    def __init__(self, config: Blip2QFormerConfig, source_width: int):
        super().__init__()
        self.attention = Blip2QFormerMultiHeadAttention(config, source_width)
        self.output = Blip2QFormerOutput(config, config.hidden_size)

    def forward(self, hidden: Tensor, source: Tensor) -> Tensor:
        return self.output(self.attention(hidden, source), hidden)


class Blip2QFormerIntermediate(nn.Module):
    """First layer of the feed-forward."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.dense = LoraLinear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))


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

    def forward(self, queries: Tensor, frames: Tensor) -> Tensor:
        queries = self.attention(queries, queries)
        if self.crossattention is not None:
            queries = self.crossattention(queries, frames)
        return self.output_query(self.intermediate_query(queries), queries)


class Blip2QFormerEncoder(nn.Module):
    """The layers, under the checkpoint's name."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.layer = nn.ModuleList([Blip2QFormerLayer(config, number) for number in range(config.num_hidden_layers)])


class Blip2QFormerModel(nn.Module):
    """`(1, queries, hidden)` and `(windows, frames, width)` → `(windows, queries, hidden)`."""

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = Blip2QFormerEncoder(config)

    def forward(self, queries: Tensor, frames: Tensor) -> Tensor:
        queries = self.dropout(self.layernorm(queries))
        for layer in self.encoder.layer:
            queries = layer(queries, frames)
        return queries


class GraniteSpeechEncoderProjector(nn.Module):
    """Audio states to audio vectors, `window_size // downsample_rate` per window."""

    def __init__(self, config: GraniteSpeechConfig):
        super().__init__()
        config.validate()
        self.window_size = config.window_size
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
        return self.linear(self.qformer(self.query, windows)).flatten(0, 1)

    def forward(self, frames: Tensor, clips: Segments) -> tuple[Tensor, Segments]:
        """Project packed frames.

        Args:
            frames: `(total_frames, encoder width)`.
            clips: where each clip lies.

        Returns:
            `(total audio tokens, text hidden size)`, and where each clip's vectors lie.
        """
        return self.project(frames, self.windows(clips)), self.token_segments(clips)
