"""How the tokens that a pass of the language model takes are laid out."""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.modules.cache import CacheStep
from granite_speech.modules.packing import Bucket, Segments
from granite_speech.modules.rotary import Rotary, signed
from granite_speech.modules.rows import Rows, pack_rows
from granite_speech.modules.transfers import on_device, on_host

__all__ = ["Tokens"]


@dataclass(frozen=True)
class Tokens:
    """Layout of a batch of tokens, as every layer needs it.

    Attributes:
        segments: where each sequence lies in the packed tokens; a Bucket only with a `step`.
        positions: `(total_tokens,)` int64, for the rotary embedding.
        adapter_index: int32, 0 with the adapter and −1 without, for each packed token, or for each token of the padded batch if
            the layers run padded; None: all tokens have it.
        step: this call's view of the cache; None: no cache.
        attentions: a list that takes each layer's softmax weights, one tensor `(heads, queries, keys)` per sequence.
        rows: where the packed tokens lie in the padded batch, if the layers run padded; None: they run packed.
    """

    segments: Segments | Bucket
    positions: Tensor
    adapter_index: Tensor | None = None
    step: CacheStep | None = None
    attentions: list[list[Tensor]] | None = None
    rows: Rows | None = None

    @classmethod
    def of_batch(cls, states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Self:
        """Of a padded batch `(batch, sequence, hidden)` that a caller gave to a layer.

        Args:
            states: the batch.
            attention_mask: `(batch, sequence)` of 0 and 1; None keeps all.
            position_ids: `(batch, sequence)` or `(1, sequence)`; None: counted along each row.

        Raises:
            InputError: another rank or shape.
        """
        if states.dim() != 3:
            raise InputError(
                got=f"hidden_states of shape {tuple(states.shape)}",
                expected="(batch, sequence, hidden)",
                remedy="Add the missing dimensions with unsqueeze",
            )
        mask, positions = on_host(attention_mask, position_ids)
        rows = pack_rows((states.shape[0], states.shape[1]), states.device, mask, positions, None)
        return cls(rows.segments, on_device(rows.positions, states.device), rows=rows)

    def for_padded_layers(self) -> Self:
        """The same with the adapter's index of every token of the padded batch."""
        if self.adapter_index is None:
            return self
        return replace(self, adapter_index=self.rows.pad(self.adapter_index).flatten())

    def pack_rotary(self, rotary: Rotary) -> Rotary:
        """transformers' cosine and sine `(batch or 1, sequence, head_dim)`, for the packed tokens."""
        shape = len(self.rows.segments.lengths), -1, -1
        cos, sin = (self.rows.pack(one.expand(shape)).unsqueeze(1) for one in rotary)
        return cos, signed(sin)
