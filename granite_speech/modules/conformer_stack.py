"""Conformer blocks one after another, with the CTC feedback in the middle: what the encoders of both model families have in common."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from torch import Tensor, nn

from granite_speech.modules.add_norm import add_norm, has_kernels
from granite_speech.modules.checkpointing import GradientCheckpointing, Recomputation
from granite_speech.modules.conformer_parts import ConformerBlock, fold_batch_norms
from granite_speech.modules.few_sizes import with_few_sizes
from granite_speech.modules.packing import Bucket, Segments
from granite_speech.modules.row_parts import in_parts

__all__ = ["ConformerEncoder"]


class ConformerEncoder(GradientCheckpointing, nn.Module):
    """Blocks, and the head whose probabilities are added to the output of the middle one.

    Attributes:
        layers: `ConformerBlock`s, or modules that were put in their place.
        out, out_mid: the CTC head, and the projection of its probabilities back to the blocks' width.
        recomputation: which blocks run again in the backward pass.
    """

    layers: nn.ModuleList
    out: nn.Module
    out_mid: nn.Module
    recomputation: Recomputation | None

    def _states(self, x: Tensor, clips: Segments | Bucket, taken: list[Tensor] | None) -> Iterator[tuple[Tensor, Segments | Bucket]]:
        """The input and every block's output, with the feedback, and where its clips lie.

        Args:
            x: the first block's input, packed, `(total_frames, width)`, or padded, `(clips, frames, width)`.
            clips: where each clip lies.
            taken: a list that takes the head's logits of the middle block's output, if there is a middle.
        """
        is_chain = x.dim() == 2 and has_kernels(x) and self._is_chain()
        return (self._chained if is_chain else self._one_by_one)(x, clips, taken)

    def _is_chain(self) -> bool:
        """Whether no block has to be called."""
        if self.training and self.recomputation is not None:
            return False
        return all(isinstance(one, ConformerBlock) and one.is_usual() for one in self.layers)

    def _one_by_one(self, x: Tensor, clips: Segments | Bucket, taken: list[Tensor] | None) -> Iterator[tuple[Tensor, Segments | Bucket]]:
        """From calls of the blocks: for hooks, wrappers, gradient checkpointing, and on a CPU."""
        recomputation = self.recomputation if self.training else None
        yield x, clips
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, clips=clips) if recomputation is None else recomputation.run(layer, number - 1, x, clips=clips)
            if self._halves(number):
                clips = clips.halved()
                x = with_few_sizes(x) if x.dim() == 2 and not self.training else x
            if number == len(self.layers) // 2:
                x = self._with_feedback(x, taken)
            yield x, clips

    def _chained(self, x: Tensor, clips: Segments | Bucket, taken: list[Tensor] | None) -> Iterator[tuple[Tensor, Segments | Bucket]]:
        """Packed, with kernels: a block ends with the first norm of the next."""
        yield x, clips
        norms = [one.parts[2].statistics for one in self.layers]
        folds = not any(one.training for one in norms)
        folded = fold_batch_norms(norms) if folds else [None] * len(norms)
        blocks = self._attention_blocks(x, clips)  # read in every layer
        following = [*(one.norms[0] for one in self.layers[1:]), None]
        normed = self.layers[0].norms[0](x)
        for number, (layer, norm) in enumerate(zip(self.layers, following, strict=True), 1):
            has_feedback = number == len(self.layers) // 2
            halved = clips.halved() if self._halves(number) else None
            options = {"blocks": blocks, "folded": folded[number - 1], "halved": halved}
            x, normed = layer.run(x, normed, clips, **options, next_norm=None if has_feedback else norm)
            if halved is not None:
                clips, blocks = halved, self._attention_blocks(x, halved)
            if has_feedback:
                x, normed = add_norm(x, self._feedback(x, taken), norm)
            yield x, clips

    def _attention_blocks(self, x: Tensor, clips: Segments | Bucket) -> Tensor:
        context_size = self.layers[0].parts[1].context_size
        return OPERATIONS["attention_blocks"].run(clips.cu_seqlens, total_frames=x.shape[0], context_size=context_size)

    def _halves(self, number: int) -> bool:
        """Whether the block of this number, from 1 on, halves each clip's frames."""
        return False

    def _with_feedback(self, x: Tensor, taken: list[Tensor] | None) -> Tensor:
        """The middle block's output and, projected back, what the CTC head makes of it."""
        return x + self._feedback(x, taken)

    def _feedback(self, x: Tensor, taken: list[Tensor] | None) -> Tensor:
        """The probabilities of the CTC head, projected back, `(..., width)`.

        Without gradients a few rows at a time: the probabilities are many times as wide as x.

        Args:
            x: the middle block's output.
            taken: as for `_states`.
        """
        is_whole = x.dim() != 2 or torch.is_grad_enabled() or taken is not None
        parts = (x,) if is_whole else in_parts(x, self.out_mid.in_features)
        projected = [self.out_mid(self._ctc_probabilities(part, taken)) for part in parts]
        return projected[0] if len(projected) == 1 else torch.cat(projected)

    def _ctc_probabilities(self, x: Tensor, taken: list[Tensor] | None) -> Tensor:
        """Softmax of the CTC head, `(..., entries)`; computed at least in float32 and rounded once to x's dtype."""
        logits = self.out(x)
        if taken is not None:
            taken.append(logits)
        return F.softmax(logits, dim=-1).to(x.dtype)  # float32 under autocast
