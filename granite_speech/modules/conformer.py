"""A block of the conformer encoder: half a feed-forward, attention, convolution, half a feed-forward, norm.

`forward` calls one module after another. With kernels, the encoder runs packed blocks in few launches instead
(`GraniteSpeechConformerBlock.run`): a residual sum and the norm after it are one, also from one block to the next.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from granite_kernels.int8_cpu import PackedInt8
from granite_kernels.op import accumulator
from torch import Tensor, nn

from granite_speech.config import GraniteSpeechEncoderConfig
from granite_speech.errors import UnsupportedError
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.add_norm import add_norm, has_kernels
from granite_speech.modules.autocast import autocast_dtype
from granite_speech.modules.few_sizes import linear
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.int8_weight import PointwiseConv1d, whole_of
from granite_speech.modules.packing import Segments
from granite_speech.modules.row_parts import number_of_parts
from granite_speech.modules.side_by_side import is_plain, side_by_side
from granite_speech.modules.transfers import on_device
from granite_speech.modules.wrapped_weights import weight_of

__all__ = [
    "GraniteSpeechConformerAttention",
    "GraniteSpeechConformerBlock",
    "GraniteSpeechConformerDepthWiseConv1d",
    "block_distances",
    "fold_batch_norms",
]


class GraniteSpeechConformerFeedForward(nn.Module):
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

    def run(self, x: Tensor) -> Tensor:
        """All but the norm, packed, with kernels."""
        if not self._has_kernel(x):
            return self.after_norm(x)
        hidden = OPERATIONS["silu_linear"].run(x, self.up_proj.weight, self.up_proj.bias)
        return self.dropout(self.down_proj(self.dropout(hidden)))

    def after_norm(self, x: Tensor) -> Tensor:
        """All but the norm."""
        parts = number_of_parts(x, self.inner)
        return self._after_norm(x) if parts == 1 else torch.cat([self._after_norm(part) for part in x.tensor_split(parts)])

    def _after_norm(self, x: Tensor) -> Tensor:
        hidden = self.up_proj(x)
        # Packed in place if no gradient needs the input, so that the encoder's widest tensor is not allocated twice.
        hidden = self.silu(hidden) if hidden.dim() == 3 else F.silu(hidden, inplace=not hidden.requires_grad)
        return self.dropout(self.down_proj(self.dropout(hidden)))

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether `silu_linear`, which has no backward, computes what the modules do."""
        up = self.up_proj
        if torch.is_grad_enabled() or type(up) is not LoraLinear or up.has_adapter:
            return False
        can_be_read = all(is_plain(one) and one.dtype == x.dtype for one in (up.weight, up.bias))
        return can_be_read and autocast_dtype(x.device) is None


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
        x = self.pre_norm(hidden_states)
        if x.dim() == 2:
            return self._attend_packed(x, clips, None, None)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.context_size))  # whole blocks, which is what hooks see in transformers
        q, k, v = map(clips.pack, self._heads(self.to_q(x), *self.to_kv(x).chunk(2, dim=-1)))
        distances = self._distances_after_hooks() if have_hooks(self.rel_pos_emb) else weight_of(self.rel_pos_emb)
        return self.dropout(self.to_out(clips.pad(self._attend(q, k, v, distances, clips), hidden_states.shape[1])))

    def run(self, x: Tensor, clips: Segments, blocks: Tensor | None) -> Tensor:
        """All but the norm, packed, with kernels.

        Args:
            x: `(total_frames, width)`.
            clips: where each clip lies.
            blocks: the table of `attention_blocks` for them; None: the kernel makes its own.
        """
        return self._attend_packed(x, clips, blocks, self._joined_weight())

    def _attend_packed(self, x: Tensor, clips: Segments, blocks: Tensor | None, weight: Tensor | None) -> Tensor:
        """The same; `weight` is that of q, k and v together, if they are one product."""
        packed = None if weight is not None else self._packed()
        if packed is not None:
            parts = packed.linear(x).chunk(3, dim=1)
        else:
            parts = (self.to_q(x), *self.to_kv(x).chunk(2, dim=1)) if weight is None else F.linear(x, weight).chunk(3, dim=1)
        return self.dropout(self.to_out(self._attend(*self._heads(*parts), weight_of(self.rel_pos_emb), clips, blocks)))

    def _joined_weight(self) -> Tensor | None:
        """`(3 * inner, width)`: the weights of q, k and v, if they lie side by side and are all that q, k and v depend on."""
        usable = self._are_alone() and not torch.is_grad_enabled() and self.to_q.weight_scale is self.to_kv.weight_scale is None
        return side_by_side(self.to_q.weight, self.to_kv.weight) if usable else None

    def _packed(self) -> PackedInt8 | None:
        """The same for packed int8 weights."""
        return whole_of([self.to_q.packed, self.to_kv.packed]) if self._are_alone() else None

    def _are_alone(self) -> bool:
        """Whether q, k and v depend on no more than the weights."""
        return not any(type(one) is not LoraLinear or one.has_adapter or one.bias is not None for one in (self.to_q, self.to_kv))

    def _heads(self, *parts: Tensor) -> Iterator[Tensor]:
        return (one.unflatten(-1, (self.num_heads, self.dim_head)) for one in parts)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, distances: Tensor, clips: Segments, blocks: Tensor | None = None) -> Tensor:
        """`(total_frames, inner)`, of packed q, k and v."""
        distances = distances.to(q.dtype)  # another dtype only under autocast, as in the convolution module
        options = {"context_size": self.context_size, "blocks": blocks}
        return OPERATIONS["block_attention"].run(q, k, v, distances, clips.cu_seqlens, **options).flatten(1)

    def _distances_after_hooks(self) -> Tensor:
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

    def after_norm(self, x: Tensor, clips: Segments, folded: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """All but the norm, packed.

        Args:
            x: `(total_frames, width)`.
            clips: where each clip lies.
            folded: this module's BatchNorm, of `fold_batch_norms`; None: fold it here, unless it is in training mode.
        """
        x = _pointwise(self.up_conv, x)
        taps, depthwise_conv = weight_of(self.depth_conv.conv).squeeze(1).to(x.dtype), OPERATIONS["depthwise_conv"].run
        if self.batch_norm.training:
            # The batch's own statistics are known only after the convolution: BatchNorm cannot be folded into it.
            x = F.silu(self.batch_norm(depthwise_conv(x, taps, None, None, clips.cu_seqlens)))
        else:
            scale, shift = fold_batch_norms([self.batch_norm])[0] if folded is None else folded
            x = depthwise_conv(x, taps, scale, shift, clips.cu_seqlens)
        return self.dropout(_pointwise(self.down_conv, x))

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

    def extra_repr(self) -> str:
        return OPERATIONS["depthwise_conv"].backend(self.up_conv.weight)


def _pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of kernel size 1, channels last; peft may have wrapped it."""
    return conv.product(x) if type(conv) is PointwiseConv1d else linear(x, weight_of(conv).squeeze(2), conv.bias)


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
        if hidden_states.dim() == 2 and clips is not None and attention_dists is None and has_kernels(hidden_states) and self.is_usual():
            return self.run(hidden_states, self.ff1.pre_norm(hidden_states), clips)[0]
        x = torch.add(hidden_states, self.ff1(hidden_states), alpha=0.5)
        x = _added(x, self.attn(x, attention_dists=attention_dists, clips=clips))
        x = _added(x, self.conv(x, clips=clips))
        x = _added(x, self.ff2(x), multiplier=0.5)
        return self.post_norm(x)

    def is_usual(self) -> bool:
        """Whether `run` computes what calls of the block and its parts do. Not if one is compiled, or wrapped in a module of PyTorch's
        (sharded, checkpointed), which has work to do at each call and passes its other methods on."""
        modules = (
            (self, GraniteSpeechConformerBlock),
            (self.ff1, GraniteSpeechConformerFeedForward),
            (self.attn, GraniteSpeechConformerAttention),
            (self.conv, GraniteSpeechConformerConvModule),
            (self.ff2, GraniteSpeechConformerFeedForward),
        )
        return all(type(one) is usual and one._compiled_call_impl is None for one, usual in modules)

    def run(
        self,
        x: Tensor,
        normed: Tensor,
        clips: Segments,
        *,
        blocks: Tensor | None = None,
        folded: tuple[Tensor, Tensor] | None = None,
        next_norm: nn.LayerNorm | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The block from its first norm to the next block's, packed, with kernels.

        Args:
            x: `(total_frames, width)`.
            normed: the first norm of x.
            clips: where each clip lies.
            blocks: for the attention.
            folded: for the convolution.
            next_norm: the next block's first norm.

        Returns:
            The block's result, and `next_norm` of it; None without `next_norm`.
        """
        x, normed = add_norm(x, self.ff1.run(normed), self.attn.pre_norm, multiplier=0.5)
        x, normed = add_norm(x, self.attn.run(normed, clips, blocks), self.conv.norm)
        x, normed = add_norm(x, self.conv.after_norm(normed, clips, folded), self.ff2.pre_norm)
        added = add_norm(x, self.ff2.run(normed), self.post_norm, next_norm, multiplier=0.5)
        return (added[1], None) if next_norm is None else added


def _added(x: Tensor, delta: Tensor, multiplier: float = 1.0) -> Tensor:
    """`x + multiplier * delta`; in place where no gradient needs x and, because hooks run padded, nobody else has it."""
    if x.dim() == 2 and x.dtype == delta.dtype and not torch.is_grad_enabled():
        return x.add_(delta, alpha=multiplier)
    return torch.add(x, delta, alpha=multiplier)


def fold_batch_norms(norms: Sequence[nn.BatchNorm1d]) -> list[tuple[Tensor, Tensor]]:
    """Running BatchNorm of each as `scale * x + shift`, both `(channels,)`, at least float32; folded together, in few launches."""
    if len(norms) == 1 or len({one.eps for one in norms}) > 1:  # several eps would have to be copied from the host
        return [_folded(one.weight, one.bias, one.running_mean, one.running_var, one.eps) for one in norms]
    names = ("weight", "bias", "running_mean", "running_var")
    stacked = (torch.stack([getattr(one, name) for one in norms]) for name in names)
    return list(zip(*_folded(*stacked, norms[0].eps), strict=True))


def _folded(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = accumulator(weight.dtype)
    scale = weight.to(wide) * torch.rsqrt(var.to(wide) + eps)
    return scale, bias.to(wide) - mean.to(wide) * scale
