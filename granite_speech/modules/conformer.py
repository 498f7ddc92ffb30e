"""A block of the 3.x and 4.x models' conformer encoder: half a feed-forward, attention, convolution, half a feed-forward, norm.

`forward` calls one module after another. With kernels, the encoder runs packed blocks in few launches instead (`ConformerBlock.run`): a
residual sum and the norm after it are one, also from one block to the next.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granite_speech.config import GraniteSpeechEncoderConfig
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.add_norm import has_kernels
from granite_speech.modules.conformer_parts import BlockAttention, ConformerBlock, FeedForward, GatedConvolution, added, without_padding
from granite_speech.modules.few_sizes import linear
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.int8_weight import PointwiseConv1d
from granite_speech.modules.packing import Segments
from granite_speech.modules.wrapped_weights import weight_of

__all__ = ["GraniteSpeechConformerAttention", "GraniteSpeechConformerBlock", "GraniteSpeechConformerDepthWiseConv1d"]


class GraniteSpeechConformerFeedForward(FeedForward):
    """`W₂ SiLU(W₁ norm(x))`."""

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        self.inner = inner = config.hidden_dim * config.feedforward_mult
        self.pre_norm = nn.LayerNorm(config.hidden_dim)
        self.silu = nn.SiLU()
        self.up_proj = LoraLinear(config.hidden_dim, inner)
        self.down_proj = LoraLinear(inner, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(..., width)` in and out."""
        return self.after_norm(self.pre_norm(hidden_states))

    def _first(self) -> nn.Module:
        return self.up_proj

    def _activated(self, hidden: Tensor) -> Tensor:
        return self.silu(hidden)

    def _finished(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.dropout(hidden)))


class GraniteSpeechConformerAttention(BlockAttention):
    """The attention, and the norm before it."""

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        inner = config.num_heads * config.dim_head
        self.num_heads, self.dim_head = config.num_heads, config.dim_head
        self.context_size, self.max_pos_emb = config.context_size, config.max_pos_emb
        self.pre_norm = nn.LayerNorm(config.hidden_dim)
        self.to_q = LoraLinear(config.hidden_dim, inner, bias=False)
        self.to_kv = LoraLinear(config.hidden_dim, inner * 2, bias=False)
        self.to_out = LoraLinear(inner, config.hidden_dim)
        self.rel_pos_emb = nn.Embedding(2 * config.max_pos_emb + 1, config.dim_head)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, attention_dists: Tensor | None = None, *, clips: Segments | None = None) -> Tensor:
        """Attend within blocks.

        Args:
            hidden_states: `(total_frames, width)` with `clips`, or `(clips, frames, width)`.
            attention_dists: `GraniteSpeechCTCEncoder.attention_dists` or None; the kernel computes the distances itself.
            clips: where each clip lies; None: a padded batch whose clips are all `frames` long.
        """
        self._check_distances(attention_dists)
        clips = Segments.of_batch(hidden_states) if clips is None else clips
        x = self.pre_norm(hidden_states)
        if x.dim() == 2:
            return self._attend_packed(x, clips, None, None)
        return self._attend_padded(x, clips, hidden_states.shape[1])

    def _projections(self) -> tuple[nn.Module, ...]:
        return self.to_q, self.to_kv

    def _separate(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.to_q(x), *self.to_kv(x).chunk(2, dim=-1)

    def _finished(self, attended: Tensor) -> Tensor:
        return self.dropout(self.to_out(attended))


class GraniteSpeechConformerDepthWiseConv1d(nn.Module):
    """The depthwise convolution, under the checkpoint's name. `GraniteSpeechConformerConvModule` applies its weight itself, unless
    there are hooks."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.padding = (kernel_size // 2, kernel_size // 2 - (kernel_size + 1) % 2)
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(clips, channels, frames)` in and out."""
        return self.conv(F.pad(hidden_states, self.padding))


class GraniteSpeechConformerConvModule(GatedConvolution):
    """The convolution, and the norm before it."""

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        inner = config.hidden_dim * config.conv_expansion_factor
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.up_conv = PointwiseConv1d(config.hidden_dim, inner * 2)
        self.glu = nn.GLU(dim=1)
        self.depth_conv = GraniteSpeechConformerDepthWiseConv1d(inner, config.conv_kernel_size)
        self.silu = nn.SiLU()
        self.batch_norm = nn.BatchNorm1d(inner)
        self.down_conv = PointwiseConv1d(inner, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, *, clips: Segments | None = None) -> Tensor:
        """Convolve each clip: `(total_frames, width)` with `clips`, or `(clips, frames, width)`; the same layout out."""
        clips = Segments.of_batch(hidden_states) if clips is None else clips
        if hidden_states.dim() == 2:
            return self.after_norm(self.norm(hidden_states), clips)
        if have_hooks(*self.children()):
            return self._convolve_in_steps(hidden_states, clips)
        return clips.pad(self.after_norm(self.norm(clips.pack(hidden_states)), clips), hidden_states.shape[1])

    @property
    def statistics(self) -> nn.BatchNorm1d:
        return self.batch_norm

    def _widened(self, x: Tensor) -> Tensor:
        return _pointwise(self.up_conv, x)

    def _taps(self) -> Tensor:
        return weight_of(self.depth_conv.conv).squeeze(1)

    def _finished(self, x: Tensor) -> Tensor:
        return self.dropout(_pointwise(self.down_conv, x))

    def _convolve_in_steps(self, x: Tensor, clips: Segments) -> Tensor:
        """The same with every module called as in transformers, on `(clips, channels, frames)`, for their hooks."""
        x = self.glu(self.up_conv(self.norm(x).transpose(1, 2)))
        x = self._normed_in_steps(self.depth_conv(without_padding(x, clips)), clips)
        return self.dropout(self.down_conv(self.silu(x)).transpose(1, 2))


def _pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of kernel size 1, channels last; peft may have wrapped it."""
    return conv.product(x) if type(conv) is PointwiseConv1d else linear(x, weight_of(conv).squeeze(2), conv.bias)


class GraniteSpeechConformerBlock(ConformerBlock):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm."""

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        self.ff1 = GraniteSpeechConformerFeedForward(config)
        self.attn = GraniteSpeechConformerAttention(config)
        self.conv = GraniteSpeechConformerConvModule(config)
        self.ff2 = GraniteSpeechConformerFeedForward(config)
        self.post_norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, hidden_states: Tensor, attention_dists: Tensor | None = None, *, clips: Segments | None = None) -> Tensor:
        """Arguments as for `GraniteSpeechConformerAttention`; the same layout out."""
        if hidden_states.dim() == 2 and clips is not None and attention_dists is None and has_kernels(hidden_states) and self.is_usual():
            return self.run(hidden_states, self.ff1.pre_norm(hidden_states), clips)[0]
        x = torch.add(hidden_states, self.ff1(hidden_states), alpha=0.5)
        x = added(x, self.attn(x, attention_dists=attention_dists, clips=clips))
        x = added(x, self.conv(x, clips=clips))
        x = added(x, self.ff2(x), multiplier=0.5)
        return self.post_norm(x)

    @property
    def parts(self) -> tuple[FeedForward, BlockAttention, GatedConvolution, FeedForward]:
        return self.ff1, self.attn, self.conv, self.ff2

    @property
    def norms(self) -> tuple[nn.LayerNorm, ...]:
        return self.ff1.pre_norm, self.attn.pre_norm, self.conv.norm, self.ff2.pre_norm, self.post_norm

    def _usual_types(self) -> tuple[type, ...]:
        return (
            GraniteSpeechConformerBlock,
            GraniteSpeechConformerFeedForward,
            GraniteSpeechConformerAttention,
            GraniteSpeechConformerConvModule,
            GraniteSpeechConformerFeedForward,
        )
