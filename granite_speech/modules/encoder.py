"""The conformer CTC encoder. Inside the model it runs packed: frames of all clips in one tensor, `(total_frames, width)`.

Gulati et al., "Conformer" (arXiv 2005.08100), with block attention and Shaw's relative positions (arXiv 1803.02155), and
self-conditioned CTC in the middle (Nozaki and Komatsu, arXiv 2104.02724). Names and arithmetic are those of transformers'
`GraniteSpeechCTCEncoder`; a clip's result does not depend on the other clips.

Every module of a model takes two layouts, told apart by the rank of its input:

- **Packed**, `(total, width)`, with a record of where each clip or sequence lies (`Segments`, `Tokens`). Nothing is computed for
  padding. The model runs like this by itself.
- **Padded**, `(clips, frames, width)`, as in transformers. This is for callers who call a module themselves, and for hooks: if there
  is one (`hooks.have_hooks`), the encoder, the projector or the language model that has it runs padded.

Most modules work on each frame alone and do not care. Those that mix frames (attention, convolution) pack a padded input, run the
same kernel, and pad its result, so both layouts give the same values.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from granite_kernels.op import accumulator
from torch import Tensor, nn

from granite_speech.config import GraniteSpeechEncoderConfig
from granite_speech.errors import UnsupportedError
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.checkpointing import GradientCheckpointing, Recomputation
from granite_speech.modules.encoder_files import EncoderFiles
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.outputs import BaseModelOutputWithPooling
from granite_speech.modules.packing import Segments, pack_clips
from granite_speech.modules.prompts import refuse_arguments
from granite_speech.modules.transfers import on_device
from granite_speech.modules.wrapped_weights import weight_of

__all__ = ["GraniteSpeechCTCEncoder"]


class GraniteSpeechConformerFeedForward(nn.Module):
    """`W₂ SiLU(W₁ norm(x))`."""

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        inner = config.hidden_dim * config.feedforward_mult
        self.pre_norm = nn.LayerNorm(config.hidden_dim)
        self.silu = nn.SiLU()
        self.up_proj = LoraLinear(config.hidden_dim, inner)
        self.down_proj = LoraLinear(inner, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = self.up_proj(self.pre_norm(hidden_states))
        # Packed in place if no gradient needs the input, so that the encoder's widest tensor is not allocated twice.
        hidden = self.silu(hidden) if hidden.dim() == 3 else F.silu(hidden, inplace=not hidden.requires_grad)
        return self.dropout(self.down_proj(self.dropout(hidden)))


class GraniteSpeechConformerAttention(nn.Module):
    """Attention within blocks of `context_size` frames of a clip, with an embedding for each relative distance."""

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
        x, heads = self.pre_norm(hidden_states), (self.num_heads, self.dim_head)
        is_padded = x.dim() == 3
        if is_padded:
            x = F.pad(x, (0, 0, 0, -x.shape[1] % self.context_size))  # whole blocks, which is what hooks see in transformers
        q, k, v = (part.unflatten(-1, heads) for part in (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1)))
        table = weight_of(self.rel_pos_emb)
        if is_padded:
            q, k, v = map(clips.pack, (q, k, v))
            table = self._table_after_hooks() if have_hooks(self.rel_pos_emb) else table
        table = table.to(q.dtype)  # another dtype only under autocast, as in the convolution module
        out = OPERATIONS["block_attention"].run(q, k, v, table, clips.cu_seqlens, context_size=self.context_size)
        out = out.flatten(1)
        return self.dropout(self.to_out(clips.pad(out, hidden_states.shape[1]) if is_padded else out))

    def _table_after_hooks(self) -> Tensor:
        """The embeddings of distances, looked up with the module, which transformers calls for every query and key of a block."""
        distances = block_distances(self.context_size, self.max_pos_emb, self.rel_pos_emb.weight.device)
        looked_up, last = self.rel_pos_emb(distances), self.context_size - 1
        # Every distance once: those before the first query's own in the first row, the others in the first column.
        used = torch.cat((looked_up[0].flip(0), looked_up[1:, 0]))
        before, _, after = weight_of(self.rel_pos_emb).tensor_split((self.max_pos_emb - last, self.max_pos_emb + last + 1))
        table = torch.cat((before, used, after))
        if not torch.equal(table[distances], looked_up):
            raise UnsupportedError(
                got="a hook on rel_pos_emb that changes one distance in different ways",
                expected="one embedding for each distance",
                remedy="Change rel_pos_emb.weight, or the output of the attention",
            )
        return table

    def _check_distances(self, given: Tensor | None) -> None:
        if given is None:
            return
        usual = block_distances(self.context_size, self.max_pos_emb, given.device)
        if given.shape != usual.shape or not torch.equal(given.to(usual.dtype), usual):
            raise UnsupportedError(
                got=f"attention_dists of shape {tuple(given.shape)} with other distances",
                expected="the distances between the frames of a block, encoder.attention_dists",
                remedy="Omit attention_dists",
            )

    def extra_repr(self) -> str:
        return f"context_size={self.context_size}, {OPERATIONS['block_attention'].backend(self.to_q.weight)}"


def block_distances(context_size: int, max_pos_emb: int, device: torch.device) -> Tensor:
    """`(context_size, context_size)` int64: the row of `rel_pos_emb` for each query and key of a block."""
    places = torch.arange(context_size, device=device)
    return (places[:, None] - places[None]).clamp(-context_size, context_size) + max_pos_emb


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


class GraniteSpeechConformerConvModule(nn.Module):
    """`W₂ SiLU(BatchNorm(depthwise(GLU(W₁ norm(x)))))`; channels stay last, so the pointwise convolutions are matrix products."""

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        inner = config.hidden_dim * config.conv_expansion_factor
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.up_conv = nn.Conv1d(config.hidden_dim, inner * 2, 1)
        self.glu = nn.GLU(dim=1)
        self.depth_conv = GraniteSpeechConformerDepthWiseConv1d(inner, config.conv_kernel_size)
        self.silu = nn.SiLU()
        self.batch_norm = nn.BatchNorm1d(inner)
        self.down_conv = nn.Conv1d(inner, config.hidden_dim, 1)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, *, clips: Segments | None = None) -> Tensor:
        """Convolve each clip: `(total_frames, width)` with `clips`, or `(clips, frames, width)`; the same layout out."""
        clips = Segments.of_batch(hidden_states) if clips is None else clips
        if hidden_states.dim() == 2:
            return self._convolve(hidden_states, clips)
        if have_hooks(*self.children()):
            return self._convolve_in_steps(hidden_states, clips)
        return clips.pad(self._convolve(clips.pack(hidden_states), clips), hidden_states.shape[1])

    def _convolve(self, x: Tensor, clips: Segments) -> Tensor:
        x = F.linear(self.norm(x), weight_of(self.up_conv).squeeze(2), self.up_conv.bias)
        taps, depthwise_conv = weight_of(self.depth_conv.conv).squeeze(1).to(x.dtype), OPERATIONS["depthwise_conv"].run
        if self.batch_norm.training:
            # The batch's own statistics are known only after the convolution: BatchNorm cannot be folded into it.
            x = F.silu(self.batch_norm(depthwise_conv(x, taps, None, None, clips.cu_seqlens)))
        else:
            x = depthwise_conv(x, taps, *self.folded_batch_norm(), clips.cu_seqlens)
        return self.dropout(F.linear(x, weight_of(self.down_conv).squeeze(2), self.down_conv.bias))

    def _convolve_in_steps(self, x: Tensor, clips: Segments) -> Tensor:
        """The same with every module called as in transformers, on `(clips, channels, frames)`, for their hooks."""
        x = self.glu(self.up_conv(self.norm(x).transpose(1, 2)))
        is_ragged = clips.total < x.shape[0] * x.shape[2]
        if is_ragged:
            x = self._without_padding(x, clips)
        x = self.depth_conv(x)
        if is_ragged and self.batch_norm.training:
            # The statistics are of frames alone, so BatchNorm gets them as one clip.
            packed = self.batch_norm(clips.pack(x.transpose(1, 2)).T[None])[0].T
            x = clips.pad(packed, x.shape[2]).transpose(1, 2)
        else:
            x = self.batch_norm(x)
        return self.dropout(self.down_conv(self.silu(x)).transpose(1, 2))

    @staticmethod
    def _without_padding(x: Tensor, clips: Segments) -> Tensor:
        """`(clips, channels, frames)` with zeros after each clip's end."""
        ends = on_device(clips.lengths, x.device)
        return x.masked_fill(torch.arange(x.shape[2], device=x.device) >= ends[:, None, None], 0)

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

    def forward(self, hidden_states: Tensor, attention_dists: Tensor | None = None, *, clips: Segments | None = None) -> Tensor:
        """Arguments as for `GraniteSpeechConformerAttention`; the same layout out."""
        x = torch.add(hidden_states, self.ff1(hidden_states), alpha=0.5)
        x = x + self.attn(x, attention_dists=attention_dists, clips=clips)
        x = x + self.conv(x, clips=clips)
        x = torch.add(x, self.ff2(x), alpha=0.5)
        return self.post_norm(x)


class GraniteSpeechCTCEncoder(GradientCheckpointing, EncoderFiles):
    """Log-mel frames to audio states, 50 per second."""

    main_input_name = "input_features"

    def __init__(self, config: GraniteSpeechEncoderConfig):
        super().__init__()
        config.validate()
        self.config = config
        self.num_layers = config.num_layers
        self.input_linear = LoraLinear(config.input_dim, config.hidden_dim)
        self.layers = nn.ModuleList([GraniteSpeechConformerBlock(config) for _ in range(config.num_layers)])
        self.out = LoraLinear(config.hidden_dim, config.output_dim)
        self.out_mid = LoraLinear(config.output_dim, config.hidden_dim)
        self.recomputation: Recomputation | None = None

    @property
    def attention_dists(self) -> Tensor:
        """`block_distances`, which transformers' encoder passes to its blocks."""
        return block_distances(self.config.context_size, self.config.max_pos_emb, self.out.weight.device)

    def forward(
        self,
        hidden_states: Tensor,
        lengths: list[int] | Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Encode a padded batch; it is packed at once, unless there are hooks.

        Args:
            hidden_states: `(clips, frames, input_dim)` log-mel features, in the weights' dtype.
            lengths: each clip's true number of frames, on the host; None: `frames` each, as in transformers.
            output_hidden_states: also return the input projection and every block's output.
            output_attentions: False or None; the kernel has no weights to return.
            return_dict: False returns a tuple.

        Returns:
            `last_hidden_state` `(clips, frames, output width)`, zero beyond a clip's length.
        """
        refuse_arguments(unknown, "GraniteSpeechCTCEncoder.forward")
        if output_attentions:
            raise UnsupportedError(
                got="output_attentions=True for the encoder",
                expected="output_attentions of the language model",
                remedy="Omit it; the encoder's attention kernel never has the weights in memory",
            )
        x, clips = pack_clips(hidden_states, lengths)
        width, is_padded = hidden_states.shape[1], have_hooks(*self.children())
        collected = [] if output_hidden_states else None
        x = self.encode(clips.pad(x, width) if is_padded else x, clips, collected)
        # States of padding are cleared in both layouts.
        x, *every = (clips.pad(clips.pack(one) if is_padded else one, width) for one in (x, *(collected or ())))
        output = BaseModelOutputWithPooling(last_hidden_state=x, hidden_states=None if collected is None else tuple(every))
        return output.to_tuple() if return_dict is False else output

    def encode(self, x: Tensor, clips: Segments, collected: list[Tensor] | None = None) -> Tensor:
        """Encode frames.

        Args:
            x: packed, `(total_frames, input_dim)`, or padded, `(clips, frames, input_dim)`.
            clips: where each clip lies.
            collected: a list that takes the input projection's and every block's output, `(..., hidden_dim)`.

        Returns:
            `(..., output width)`, in the same layout: the last block's output, after those of `cat_hidden_layers` if there are any.
        """
        for state in self.blocks(x, clips, collected):
            last = state
        return last

    def blocks(self, x: Tensor, clips: Segments, collected: list[Tensor] | None = None) -> Iterator[Tensor]:
        """`encode`, one block at a time, so that other work can run between the blocks of a long clip. The last value is the result."""
        wanted = set(self.config.cat_hidden_layers or ())
        exported = []
        x = self.input_linear(x)
        recomputation = self.recomputation if self.training else None
        for number in range(self.num_layers + 1):
            if number > 0 and recomputation is None:
                x = self.layers[number - 1](x, clips=clips)
            elif number > 0:
                x = recomputation.run(self.layers[number - 1], number - 1, x, clips=clips)
            if number == self.num_layers // 2 and number > 0:
                x = self._with_feedback(x)
            # After the CTC feedback is added: transformers adds it in place, so the exported state includes it.
            if number in wanted:
                exported.append(x)
            if collected is not None:
                collected.append(x)
            if number < self.num_layers:
                yield x
        yield torch.cat([*exported, x], dim=-1) if exported else x

    def _with_feedback(self, x: Tensor) -> Tensor:
        """The middle block's output and, projected back, what the CTC head makes of it."""
        # Padded: there are hooks. One that keeps this block's output finds the feedback in it afterwards, because transformers adds in
        # place. autograd forbids that where a backward hook has made the output a view.
        if x.dim() == 2 or x._is_view():
            return x + self.out_mid(self.ctc_probabilities(x))
        return x.add_(self.out_mid(self.ctc_probabilities(x.clone())))

    def ctc_probabilities(self, x: Tensor) -> Tensor:
        """Softmax of the CTC head, `(..., output_dim)`; computed at least in float32, rounded to x's dtype."""
        return F.softmax(self.out(x), dim=-1, dtype=accumulator(x.dtype)).to(x.dtype)
