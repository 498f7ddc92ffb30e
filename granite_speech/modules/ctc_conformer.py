"""A block of TurboCTC's conformer encoder, with names and arithmetic of transformers' `GraniteSpeech5EncoderBlock`.

It differs from the 3.x and 4.x models' block in the names, in separate projections of q, k and v, and in where the norms are. A
subsampling block halves each clip's frames, rounded down: its depthwise convolution has a stride of 2, and its residual is the mean of
each pair of frames. The norms are of the block, so the encoder can run one as part of the sum before it (`ConformerBlock.run`).

Modules take the two layouts that `encoder.py` describes. A padded call without `clips` may have transformers' `attention_mask`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granite_speech.config_ctc import GraniteSpeech5EncoderConfig
from granite_speech.errors import UnsupportedError
from granite_speech.modules.activations import Activation
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.add_norm import has_kernels, mean_of_pairs
from granite_speech.modules.conformer_parts import (
    BlockAttention,
    ConformerBlock,
    FeedForward,
    GatedConvolution,
    added,
    without_padding,
)
from granite_speech.modules.ctc_masks import clips_of
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.packing import Segments
from granite_speech.modules.prompts import refuse_arguments
from granite_speech.modules.wrapped_weights import weight_of

__all__ = [
    "GraniteSpeech5EncoderAttention",
    "GraniteSpeech5EncoderBlock",
    "GraniteSpeech5EncoderConvolutionModule",
    "GraniteSpeech5EncoderFeedForward",
    "GraniteSpeech5EncoderSubsamplingBlock",
]


class GraniteSpeech5EncoderFeedForward(FeedForward):
    """`W₂ f(W₁ x)`."""

    def __init__(self, config: GraniteSpeech5EncoderConfig):
        super().__init__()
        self.inner = config.intermediate_size
        self.linear1 = LoraLinear(config.hidden_size, config.intermediate_size, bias=config.attention_bias)
        self.activation = Activation(config.hidden_act)
        self.linear2 = LoraLinear(config.intermediate_size, config.hidden_size, bias=config.attention_bias)
        self.activation_dropout = config.activation_dropout
        self.is_silu = config.hidden_act in ("silu", "swish")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(..., width)` in and out."""
        return self.after_norm(hidden_states)

    def _first(self) -> nn.Module:
        return self.linear1

    def _activated(self, hidden: Tensor) -> Tensor:
        return self.activation(hidden)

    def _finished(self, hidden: Tensor) -> Tensor:
        return self.linear2(F.dropout(hidden, self.activation_dropout, self.training))


class GraniteSpeech5EncoderAttention(BlockAttention):
    """Attention within blocks of a clip's frames."""

    def __init__(self, config: GraniteSpeech5EncoderConfig, layer_idx: int):
        super().__init__()
        inner = config.num_attention_heads * config.head_dim
        self.layer_idx = layer_idx
        self.num_heads, self.dim_head = config.num_attention_heads, config.head_dim
        self.context_size, self.max_pos_emb = config.context_size, config.max_position_embeddings
        self.attention_dropout = config.attention_dropout
        self.q_proj = LoraLinear(config.hidden_size, inner, bias=False)
        self.k_proj = LoraLinear(config.hidden_size, inner, bias=False)
        self.v_proj = LoraLinear(config.hidden_size, inner, bias=False)
        self.o_proj = LoraLinear(inner, config.hidden_size)
        self.rel_pos_emb = nn.Embedding(2 * config.max_position_embeddings + 1, config.head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        clips: Segments | None = None,
        **unknown: Any,
    ) -> tuple[Tensor, None]:
        """Attend within blocks.

        Args:
            hidden_states: `(total_frames, width)` with `clips`, or `(clips, frames, width)`.
            position_embeddings: `GraniteSpeech5Encoder.attention_dists` or None; the kernel computes the distances itself.
            attention_mask: `(clips, frames)`, 1 for frames and 0 for the padding after them; None: no clip is padded.
            clips: the same, known on the host.

        Returns:
            The same layout, and None in place of the weights, which are never in memory.
        """
        refuse_arguments(unknown, "GraniteSpeech5EncoderAttention.forward")
        self._check_distances(position_embeddings)
        clips = clips_of(hidden_states, attention_mask) if clips is None else clips
        if hidden_states.dim() == 2:
            return self._attend_packed(hidden_states, clips, None, None), None
        return self._attend_padded(hidden_states, clips, hidden_states.shape[1]), None

    def _projections(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def _separate(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _finished(self, attended: Tensor) -> Tensor:
        return self.o_proj(attended)

    def _attend(self, *arguments: Any) -> Tensor:
        if self.training and self.attention_dropout:
            raise UnsupportedError(
                got=f"training with attention_dropout={self.attention_dropout}",
                expected="attention_dropout 0, because the attention's weights are never in memory",
                remedy="Pass encoder_config={'attention_dropout': 0.0} to from_pretrained; activation_dropout works",
            )
        return super()._attend(*arguments)


class GraniteSpeech5EncoderConvolutionModule(GatedConvolution):
    """The convolution. With a stride of 2 it gives one frame for each pair; transformers' gives one for a last odd frame, too, which its
    block drops."""

    def __init__(self, config: GraniteSpeech5EncoderConfig, stride: int = 1):
        super().__init__()
        inner, kernel_size = config.hidden_size * config.conv_expansion_factor, config.conv_kernel_size
        self.stride = stride
        self.pointwise_lin1 = LoraLinear(config.hidden_size, inner * 2)
        # Its weight is read here, unless there are hooks.
        self.depthwise_conv = nn.Conv1d(inner, inner, kernel_size, stride, padding=(kernel_size - 1) // 2, groups=inner, bias=False)
        self.norm = nn.BatchNorm1d(inner)
        self.pointwise_lin2 = LoraLinear(inner, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, clips: Segments | None = None) -> Tensor:
        """Convolve each clip: `(total_frames, width)` with `clips`, or `(clips, frames, width)`; the same layout out.

        Args:
            hidden_states: frames.
            attention_mask, clips: as for `GraniteSpeech5EncoderAttention`.
        """
        clips = clips_of(hidden_states, attention_mask) if clips is None else clips
        halved = clips.halved() if self.stride == 2 else None
        if hidden_states.dim() == 2:
            return self.after_norm(hidden_states, clips, halved=halved)
        out, width = halved or clips, hidden_states.shape[1] // self.stride
        if have_hooks(*self.children()):
            return self._convolve_in_steps(hidden_states, clips, out)[:, :width]
        return out.pad(self.after_norm(clips.pack(hidden_states), clips, halved=halved), width)

    @property
    def statistics(self) -> nn.BatchNorm1d:
        return self.norm

    def _widened(self, x: Tensor) -> Tensor:
        return self.pointwise_lin1(x)

    def _taps(self) -> Tensor:
        return weight_of(self.depthwise_conv).squeeze(1)

    def _finished(self, x: Tensor) -> Tensor:
        return self.pointwise_lin2(x)

    def _convolve_in_steps(self, x: Tensor, clips: Segments, out: Segments) -> Tensor:
        """The same with every module called as in transformers, on `(clips, channels, frames)`, for their hooks."""
        x = F.glu(self.pointwise_lin1(x), dim=-1).transpose(1, 2)
        x = self._normed_in_steps(self.depthwise_conv(without_padding(x, clips)), out)
        return self.pointwise_lin2(F.silu(x).transpose(1, 2))


class GraniteSpeech5EncoderBlock(ConformerBlock):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm."""

    stride = 1

    def __init__(self, config: GraniteSpeech5EncoderConfig, layer_idx: int):
        super().__init__()
        self.feed_forward1 = GraniteSpeech5EncoderFeedForward(config)
        self.self_attn = GraniteSpeech5EncoderAttention(config, layer_idx)
        self.conv = GraniteSpeech5EncoderConvolutionModule(config, self.stride)
        self.feed_forward2 = GraniteSpeech5EncoderFeedForward(config)
        self.norm_feed_forward1 = nn.LayerNorm(config.hidden_size)
        self.norm_self_att = nn.LayerNorm(config.hidden_size)
        self.norm_conv = nn.LayerNorm(config.hidden_size)
        self.norm_feed_forward2 = nn.LayerNorm(config.hidden_size)
        self.norm_out = nn.LayerNorm(config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        *,
        clips: Segments | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Arguments as for `GraniteSpeech5EncoderAttention`; the same layout out."""
        refuse_arguments(unknown, f"{type(self).__name__}.forward")
        clips = clips_of(hidden_states, attention_mask) if clips is None else clips
        halved = clips.halved() if self.stride == 2 else None
        is_alone = hidden_states.dim() == 2 and position_embeddings is None
        if is_alone and has_kernels(hidden_states) and self.is_usual():
            return self.run(hidden_states, self.norm_feed_forward1(hidden_states), clips, halved=halved)[0]
        x = torch.add(hidden_states, self.feed_forward1(self.norm_feed_forward1(hidden_states)), alpha=0.5)
        x = added(x, self.self_attn(self.norm_self_att(x), position_embeddings, clips=clips)[0])
        delta = self.conv(self.norm_conv(x), clips=clips)
        x = added(x if halved is None else _halved(x, clips, halved), delta)
        x = added(x, self.feed_forward2(self.norm_feed_forward2(x)), multiplier=0.5)
        return self.norm_out(x)

    @property
    def parts(self) -> tuple[FeedForward, BlockAttention, GatedConvolution, FeedForward]:
        return self.feed_forward1, self.self_attn, self.conv, self.feed_forward2

    @property
    def norms(self) -> tuple[nn.LayerNorm, ...]:
        return self.norm_feed_forward1, self.norm_self_att, self.norm_conv, self.norm_feed_forward2, self.norm_out

    def _usual_types(self) -> tuple[type, ...]:
        feed_forward = GraniteSpeech5EncoderFeedForward
        block = GraniteSpeech5EncoderSubsamplingBlock if self.stride == 2 else GraniteSpeech5EncoderBlock
        return block, feed_forward, GraniteSpeech5EncoderAttention, GraniteSpeech5EncoderConvolutionModule, feed_forward


class GraniteSpeech5EncoderSubsamplingBlock(GraniteSpeech5EncoderBlock):
    """The same, with half of each clip's frames from the convolution on."""

    stride = 2


def _halved(x: Tensor, clips: Segments, halved: Segments) -> Tensor:
    """The mean of each pair of frames, in either layout."""
    if x.dim() == 2:
        return mean_of_pairs(x, clips.pairs(halved))
    return x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2)
