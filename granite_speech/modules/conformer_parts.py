"""What the conformer blocks of both model families compute, whatever their modules are called.

The classes here have no submodules. Those of a family do, under the names of its checkpoints, and tell which is which.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from granite_kernels.int8_cpu import PackedInt8
from granite_kernels.op import accumulator
from torch import Tensor, nn

from granite_speech.errors import UnsupportedError
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.add_norm import add_norm
from granite_speech.modules.autocast import autocast_dtype
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.int8_weight import whole_of
from granite_speech.modules.packing import Bucket, Segments
from granite_speech.modules.row_parts import in_parts
from granite_speech.modules.side_by_side import is_plain, side_by_side
from granite_speech.modules.transfers import on_device
from granite_speech.modules.wrapped_weights import weight_of

__all__ = [
    "BlockAttention",
    "ConformerBlock",
    "FeedForward",
    "GatedConvolution",
    "added",
    "block_distances",
    "fold_batch_norms",
    "without_padding",
]


class FeedForward(nn.Module):
    """`W₂ f(W₁ x)`, f usually SiLU, without the norm before it."""

    inner: int  # width of the tensor between the two products
    is_silu = True

    def _activated(self, hidden: Tensor) -> Tensor:
        """f of the first product, by its module."""
        raise NotImplementedError

    def _finished(self, hidden: Tensor) -> Tensor:
        """Dropout and the second product of the first one's activation."""
        raise NotImplementedError

    def _first(self) -> nn.Module:
        """The layer of the first product."""
        raise NotImplementedError

    def run(self, x: Tensor) -> Tensor:
        """All but the norm, packed, with kernels."""
        if not self._has_kernel(x):
            return self.after_norm(x)
        up = self._first()
        return self._finished(OPERATIONS["silu_linear"].run(x, up.weight, up.bias))

    def after_norm(self, x: Tensor) -> Tensor:
        """All but the norm."""
        if x.dim() == 2 and x.device.type == "cpu" and not torch.is_grad_enabled():
            parts = in_parts(x, self.inner)
            if len(parts) > 1:
                return torch.cat([self._after_norm(part) for part in parts])
        return self._after_norm(x)

    def _after_norm(self, x: Tensor) -> Tensor:
        hidden = self._first()(x)
        # Packed in place if no gradient needs the input, so that the encoder's widest tensor is not allocated twice.
        is_padded = hidden.dim() == 3 or not self.is_silu
        return self._finished(self._activated(hidden) if is_padded else F.silu(hidden, inplace=not hidden.requires_grad))

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether `silu_linear`, which has no backward, computes what the modules do."""
        up = self._first()
        if not self.is_silu or torch.is_grad_enabled() or type(up) is not LoraLinear or up.has_adapter:
            return False
        can_be_read = all(one is None or (is_plain(one) and one.dtype == x.dtype) for one in (up.weight, up.bias))
        return can_be_read and autocast_dtype(x.device) is None


class BlockAttention(nn.Module):
    """Attention within blocks of `context_size` frames of a clip, with an embedding for each relative distance."""

    num_heads: int
    dim_head: int
    context_size: int
    max_pos_emb: int
    rel_pos_emb: nn.Embedding

    def _projections(self) -> tuple[nn.Module, ...]:
        """The layers of q, k and v, in this order; one may give several of them."""
        raise NotImplementedError

    def _separate(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, `(..., inner)` each, by calls of their layers."""
        raise NotImplementedError

    def _finished(self, attended: Tensor) -> Tensor:
        """The output projection, and dropout if the family has it."""
        raise NotImplementedError

    def run(self, x: Tensor, clips: Segments | Bucket, blocks: Tensor | None) -> Tensor:
        """All but the norm, packed, with kernels.

        Args:
            x: `(total_frames, width)`.
            clips: where each clip lies.
            blocks: the table of `attention_blocks` for them; None: the kernel makes its own.
        """
        return self._attend_packed(x, clips, blocks, self._joined_weight())

    def _attend_packed(self, x: Tensor, clips: Segments | Bucket, blocks: Tensor | None, weight: Tensor | None) -> Tensor:
        """The same; `weight` is that of q, k and v together, if they are one product."""
        packed = None if weight is not None else self._packed()
        if packed is not None:
            parts = packed.linear(x).chunk(3, dim=1)
        else:
            parts = self._separate(x) if weight is None else F.linear(x, weight).chunk(3, dim=1)
        return self._finished(self._attend(*self._heads(*parts), weight_of(self.rel_pos_emb), clips, blocks))

    def _attend_padded(self, x: Tensor, clips: Segments, frames: int) -> Tensor:
        """The same for `(clips, frames, width)`, by calls of the modules: for hooks, and callers of one module."""
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.context_size))  # whole blocks, which is what hooks see in transformers
        q, k, v = map(clips.pack, self._heads(*self._separate(x)))
        distances = self._distances_after_hooks() if have_hooks(self.rel_pos_emb) else weight_of(self.rel_pos_emb)
        return self._finished(clips.pad(self._attend(q, k, v, distances, clips), frames))

    def _joined_weight(self) -> Tensor | None:
        """`(3 * inner, width)`: the weights of q, k and v, if they lie side by side and are all that q, k and v depend on."""
        if torch.is_grad_enabled() or not self._are_alone() or any(one.weight_scale is not None for one in self._projections()):
            return None
        return side_by_side(*(one.weight for one in self._projections()))

    def _packed(self) -> PackedInt8 | None:
        """The same for packed int8 weights."""
        return whole_of([one.packed for one in self._projections()]) if self._are_alone() else None

    def _are_alone(self) -> bool:
        """Whether q, k and v depend on no more than the weights."""
        return not any(type(one) is not LoraLinear or one.has_adapter or one.bias is not None for one in self._projections())

    def _heads(self, *parts: Tensor) -> Iterator[Tensor]:
        return (one.unflatten(-1, (self.num_heads, self.dim_head)) for one in parts)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, distances: Tensor, clips: Segments | Bucket, blocks: Tensor | None = None) -> Tensor:
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
                got=f"distances of shape {tuple(given.shape)} other than those between the frames of a block",
                expected="encoder.attention_dists",
                remedy="Omit them",
            )

    def extra_repr(self) -> str:
        return f"context_size={self.context_size}, {OPERATIONS['block_attention'].backend(self.rel_pos_emb.weight)}"


def block_distances(context_size: int, max_pos_emb: int, device: torch.device) -> Tensor:
    """`(context_size, context_size)` int64: the row of `rel_pos_emb` for each query and key of a block."""
    places = torch.arange(context_size, device=device)
    return (places[:, None] - places[None]).clamp(-context_size, context_size) + max_pos_emb


class GatedConvolution(nn.Module):
    """`W₂ SiLU(BatchNorm(depthwise(GLU(W₁ x))))`; channels stay last, so the pointwise convolutions are matrix products."""

    stride = 1  # 2: of each clip's frames, half as many remain

    @property
    def statistics(self) -> nn.BatchNorm1d:
        """The BatchNorm."""
        raise NotImplementedError

    def _widened(self, x: Tensor) -> Tensor:
        """W₁ x, packed."""
        raise NotImplementedError

    def _taps(self) -> Tensor:
        """`(channels, kernel_size)`: the weight of the depthwise convolution."""
        raise NotImplementedError

    def _finished(self, x: Tensor) -> Tensor:
        """W₂ x, packed, and dropout if the family has it."""
        raise NotImplementedError

    def after_norm(
        self,
        x: Tensor,
        clips: Segments | Bucket,
        folded: tuple[Tensor, Tensor] | None = None,
        halved: Segments | Bucket | None = None,
    ) -> Tensor:
        """All but the norm, packed.

        Args:
            x: `(total_frames, width)`.
            clips: where each clip lies.
            folded: this module's BatchNorm, of `fold_batch_norms`; None: fold it here, unless it is in training mode.
            halved: with stride 2, `clips.halved()`.
        """
        x = self._widened(x)
        taps, convolve, norm = self._taps().to(x.dtype), OPERATIONS["depthwise_conv"].run, self.statistics
        options = {} if halved is None else {"stride": 2, "cu_seqlens_out": halved.cu_seqlens}
        if norm.training:
            # The batch's own statistics are known only after the convolution: BatchNorm cannot be folded into it.
            x = convolve(x, taps, None, None, clips.cu_seqlens, **options)
            x = F.silu(norm(x if halved is None else x[: halved.total]))  # statistics of frames alone
        else:
            scale, shift = fold_batch_norms([norm])[0] if folded is None else folded
            x = convolve(x, taps, scale, shift, clips.cu_seqlens, **options)
            x = x if halved is None else x[: halved.total]
        return self._finished(x)

    def _normed_in_steps(self, x: Tensor, clips: Segments) -> Tensor:
        """BatchNorm of `(clips, channels, frames)` by its module. In training the statistics are of frames alone, so it gets them as one
        clip."""
        if not self.statistics.training or clips.total == x.shape[0] * x.shape[2]:
            return self.statistics(x)
        packed = self.statistics(clips.pack(x.transpose(1, 2)).T[None])[0].T
        return clips.pad(packed, x.shape[2]).transpose(1, 2)

    def extra_repr(self) -> str:
        return OPERATIONS["depthwise_conv"].backend(self.statistics.weight)


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm."""

    @property
    def parts(self) -> tuple[FeedForward, BlockAttention, GatedConvolution, FeedForward]:
        """The modules of the four steps, in their order."""
        raise NotImplementedError

    @property
    def norms(self) -> tuple[nn.LayerNorm, ...]:
        """The norm before each step, and the one after the last."""
        raise NotImplementedError

    def _usual_types(self) -> tuple[type, ...]:
        """The classes of the block and of `parts`, as its family defines them."""
        raise NotImplementedError

    def is_usual(self) -> bool:
        """Whether `run` computes what calls of the block and its parts do. Not if one is compiled, or wrapped in a module of PyTorch's
        (sharded, checkpointed), which has work to do at each call and passes its other methods on."""
        modules = zip((self, *self.parts), self._usual_types(), strict=True)
        return all(type(one) is usual and one._compiled_call_impl is None for one, usual in modules)

    def run(
        self,
        x: Tensor,
        normed: Tensor,
        clips: Segments | Bucket,
        *,
        blocks: Tensor | None = None,
        folded: tuple[Tensor, Tensor] | None = None,
        next_norm: nn.LayerNorm | None = None,
        halved: Segments | Bucket | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The block from its first norm to the next block's, packed, with kernels.

        Args:
            x: `(total_frames, width)`.
            normed: the first norm of x.
            clips: where each clip lies.
            blocks: for the attention.
            folded: for the convolution.
            next_norm: the next block's first norm.
            halved: `clips.halved()`, for a block that halves the frames.

        Returns:
            The block's result, and `next_norm` of it; None without `next_norm`.
        """
        ff1, attention, convolution, ff2 = self.parts
        _, attention_norm, convolution_norm, ff2_norm, last_norm = self.norms
        x, normed = add_norm(x, ff1.run(normed), attention_norm, multiplier=0.5)
        x, normed = add_norm(x, attention.run(normed, clips, blocks), convolution_norm)
        pairs = None if halved is None else clips.pairs(halved)
        x, normed = add_norm(x, convolution.after_norm(normed, clips, folded, halved), ff2_norm, pairs=pairs)
        added = add_norm(x, ff2.run(normed), last_norm, next_norm, multiplier=0.5)
        return (added[1], None) if next_norm is None else added


def without_padding(x: Tensor, clips: Segments) -> Tensor:
    """`(clips, channels, frames)` with zeros after each clip's end."""
    if clips.total == x.shape[0] * x.shape[2]:
        return x
    ends = on_device(clips.lengths, x.device)
    return x.masked_fill(torch.arange(x.shape[2], device=x.device) >= ends[:, None, None], 0)


def added(x: Tensor, delta: Tensor, multiplier: float = 1.0) -> Tensor:
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
