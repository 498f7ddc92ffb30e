"""The conformer CTC encoder, packed: frames of all clips in one tensor, `(total_frames, width)`.

Gulati et al., "Conformer" (arXiv 2005.08100), with block attention and Shaw's relative positions (arXiv 1803.02155), and
self-conditioned CTC in the middle (Nozaki and Komatsu, arXiv 2104.02724). Names and arithmetic are those of transformers'
`GraniteSpeechCTCEncoder`; a clip's result does not depend on the other clips.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from granite_kernels.op import accumulator
from torch import Tensor, nn

from granite_speech.config import GraniteSpeechEncoderConfig
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.outputs import BaseModelOutputWithPooling
from granite_speech.modules.packing import Segments, pack_clips
from granite_speech.modules.wrapped_weights import weight_of

__all__ = ["GraniteSpeechCTCEncoder"]


class GraniteSpeechConformerFeedForward(nn.Module):
    """`W₂ SiLU(W₁ norm(x))`."""

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        inner = config.hidden_dim * config.feedforward_mult
        self.pre_norm = nn.LayerNorm(config.hidden_dim)
        self.up_proj = LoraLinear(config.hidden_dim, inner)
        self.down_proj = LoraLinear(inner, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up_proj(self.pre_norm(x))
        # In place if no gradient needs the input, so that the encoder's widest tensor is not allocated twice.
        hidden = self.dropout(F.silu(hidden, inplace=not hidden.requires_grad))
        return self.dropout(self.down_proj(hidden))


class GraniteSpeechConformerAttention(nn.Module):
    """Attention within blocks of `context_size` frames of a clip, with an embedding for each relative distance."""

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        inner = config.num_heads * config.dim_head
        self.num_heads, self.dim_head, self.context_size = config.num_heads, config.dim_head, config.context_size
        self.pre_norm = nn.LayerNorm(config.hidden_dim)
        self.to_q = LoraLinear(config.hidden_dim, inner, bias=False)
        self.to_kv = LoraLinear(config.hidden_dim, inner * 2, bias=False)
        self.to_out = LoraLinear(inner, config.hidden_dim)
        self.rel_pos_emb = nn.Embedding(2 * config.max_pos_emb + 1, config.dim_head)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, clips: Segments) -> Tensor:
        x = self.pre_norm(x)
        heads = (x.shape[0], self.num_heads, self.dim_head)
        q = self.to_q(x).view(heads)
        k, v = (part.unflatten(1, heads[1:]) for part in self.to_kv(x).chunk(2, dim=1))
        out = OPERATIONS["block_attention"].run(q, k, v, weight_of(self.rel_pos_emb), clips.cu_seqlens, context_size=self.context_size)
        return self.dropout(self.to_out(out.flatten(1)))

    def extra_repr(self) -> str:
        return f"context_size={self.context_size}, {OPERATIONS['block_attention'].backend(self.to_q.weight)}"


class GraniteSpeechConformerDepthWiseConv1d(nn.Module):
    """Holds the depthwise weight under the checkpoint's name; `GraniteSpeechConformerConvModule` applies it."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=False)


class GraniteSpeechConformerConvModule(nn.Module):
    """`W₂ SiLU(BatchNorm(depthwise(GLU(W₁ norm(x)))))`; channels stay last, so the pointwise convolutions are matrix products."""

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        inner = config.hidden_dim * config.conv_expansion_factor
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.up_conv = nn.Conv1d(config.hidden_dim, inner * 2, 1)
        self.depth_conv = GraniteSpeechConformerDepthWiseConv1d(inner, config.conv_kernel_size)
        self.batch_norm = nn.BatchNorm1d(inner)
        self.down_conv = nn.Conv1d(inner, config.hidden_dim, 1)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, clips: Segments) -> Tensor:
        x = F.linear(self.norm(x), weight_of(self.up_conv).squeeze(2), self.up_conv.bias)
        taps, depthwise_conv = weight_of(self.depth_conv.conv).squeeze(1), OPERATIONS["depthwise_conv"].run
        if self.training:
            # The batch's own statistics are known only after the convolution: BatchNorm cannot be folded into it.
            x = F.silu(self.batch_norm(depthwise_conv(x, taps, None, None, clips.cu_seqlens)))
        else:
            x = depthwise_conv(x, taps, *self.folded_batch_norm(), clips.cu_seqlens)
        return self.dropout(F.linear(x, weight_of(self.down_conv).squeeze(2), self.down_conv.bias))

    def folded_batch_norm(self) -> tuple[Tensor, Tensor]:
        """Running BatchNorm as `scale * x + shift`, both `(channels,)`, at least float32."""
        norm = self.batch_norm
        wide = accumulator(norm.weight.dtype)
        scale = norm.weight.to(wide) * torch.rsqrt(norm.running_var.to(wide) + norm.eps)
        return scale, norm.bias.to(wide) - norm.running_mean.to(wide) * scale

    def extra_repr(self) -> str:
        return OPERATIONS["depthwise_conv"].backend(self.up_conv.weight)


class GraniteSpeechConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm."""

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        self.ff1 = GraniteSpeechConformerFeedForward(config)
        self.attn = GraniteSpeechConformerAttention(config)
        self.conv = GraniteSpeechConformerConvModule(config)
        self.ff2 = GraniteSpeechConformerFeedForward(config)
        self.post_norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, x: Tensor, clips: Segments) -> Tensor:
        x = torch.add(x, self.ff1(x), alpha=0.5)
        x = x + self.attn(x, clips)
        x = x + self.conv(x, clips)
        x = torch.add(x, self.ff2(x), alpha=0.5)
        return self.post_norm(x)


class GraniteSpeechCTCEncoder(nn.Module):
    """Log-mel frames to audio states, 50 per second."""

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        config.validate()
        self.config = config
        self.num_layers = config.num_layers
        self.input_linear = LoraLinear(config.input_dim, config.hidden_dim)
        self.layers = nn.ModuleList([GraniteSpeechConformerBlock(config) for _ in range(config.num_layers)])
        self.out = LoraLinear(config.hidden_dim, config.output_dim)
        self.out_mid = LoraLinear(config.output_dim, config.hidden_dim)

    def forward(
        self,
        hidden_states: Tensor,
        lengths: list[int] | Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Encode a padded batch; it is packed at once.

        Args:
            hidden_states: `(clips, frames, input_dim)` log-mel features, in the weights' dtype.
            lengths: each clip's true number of frames, on the host; None: `frames` each, as in transformers.
            output_hidden_states: also return the input projection and every block's output.
            return_dict: False returns a tuple.

        Returns:
            `last_hidden_state` `(clips, frames, output width)`, zero beyond a clip's length.
        """
        x, clips = pack_clips(hidden_states, lengths)
        collected = [] if output_hidden_states else None
        x = self.encode(x, clips, collected)
        padded = None if collected is None else tuple(clips.pad(one, hidden_states.shape[1]) for one in collected)
        output = BaseModelOutputWithPooling(last_hidden_state=clips.pad(x, hidden_states.shape[1]), hidden_states=padded)
        return output if return_dict else output.to_tuple()

    def encode(self, x: Tensor, clips: Segments, collected: list[Tensor] | None = None) -> Tensor:
        """Encode packed frames.

        Args:
            x: `(total_frames, input_dim)`.
            clips: where each clip lies.
            collected: a list that takes the input projection's and every block's output, `(total_frames, hidden_dim)`.

        Returns:
            `(total_frames, output width)`: the last block's output, after those of `cat_hidden_layers` if there are any.
        """
        for state in self.blocks(x, clips, collected):
            last = state
        return last

    def blocks(self, x: Tensor, clips: Segments, collected: list[Tensor] | None = None) -> Iterator[Tensor]:
        """`encode`, one block at a time, so that other work can run between the blocks of a long clip. The last value is the result."""
        wanted = set(self.config.cat_hidden_layers or ())
        exported = []
        x = self.input_linear(x)
        for number in range(self.num_layers + 1):
            if number > 0:
                x = self.layers[number - 1](x, clips)
            if number == self.num_layers // 2 and number > 0:
                x = x + self.out_mid(self.ctc_probabilities(x))
            # After the CTC feedback is added: transformers adds it in place, so the exported state includes it.
            if number in wanted:
                exported.append(x)
            if collected is not None:
                collected.append(x)
            if number < self.num_layers:
                yield x
        yield torch.cat([*exported, x], dim=1) if exported else x

    def ctc_probabilities(self, x: Tensor) -> Tensor:
        """Softmax of the CTC head, `(total_frames, output_dim)`; computed at least in float32, rounded to x's dtype."""
        return F.softmax(self.out(x), dim=-1, dtype=accumulator(x.dtype)).to(x.dtype)
