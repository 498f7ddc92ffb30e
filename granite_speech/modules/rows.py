"""Packing a padded batch of prompts: only the tokens that the attention mask keeps.

Everything that shapes depend on is computed here, on the host; later steps read nothing from the device.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.modules.cache import PADDING, PagedCache
from granite_speech.modules.packing import Segments
from granite_speech.modules.transfers import on_device

__all__ = ["Rows", "pack_rows"]


@dataclass(frozen=True)
class Rows:
    """Where the kept tokens of a padded batch lie, padded and packed.

    Attributes:
        width: columns of the padded batch.
        segments: the packed rows.
        kept: `(total,)` int64 on the host, each kept token's place in the flattened padded batch.
        positions: `(total,)` int64 on the host, for the rotary embedding.
        next_positions: position of each row's next token.
    """

    width: int
    segments: Segments
    kept: Tensor
    positions: Tensor
    next_positions: list[int]

    @classmethod
    def of_segments(cls, segments: Segments) -> "Rows":
        """The batch of these sequences, padded on the right. Positions of the tokens are not known here."""
        width = segments.longest
        columns = [torch.arange(row * width, row * width + length) for row, length in enumerate(segments.lengths)]
        kept = torch.cat(columns) if columns else torch.empty(0, dtype=torch.int64)
        return cls(width, segments, kept, torch.empty(0, dtype=torch.int64), [])

    @classmethod
    def single_tokens(cls, rows: int, device: torch.device) -> "Rows":
        """Rows of one token each, as in a decode step."""
        return cls.of_segments(Segments((1,) * rows, device))

    @cached_property
    def _index(self) -> Tensor:
        return on_device(self.kept, self.segments.device)

    @property
    def _is_full(self) -> bool:
        return self.segments.total == len(self.segments.lengths) * self.width

    def advance(self, cache: PagedCache) -> None:
        """Add these columns to the cache's count. Call this when nothing in the call can fail any more."""
        positions = torch.full((len(self.segments.lengths) * self.width,), PADDING, dtype=torch.int64)
        positions[self.kept] = self.positions
        cache.advance(positions.view(-1, self.width), self.next_positions)

    def pack(self, padded: Tensor) -> Tensor:
        """`(batch, width, ...)` → `(total, ...)`."""
        flat = padded.flatten(0, 1)
        return flat if self._is_full else flat.index_select(0, self._index)

    def pad(self, packed: Tensor) -> Tensor:
        """`(total, ...)` → `(batch, width, ...)`, zero where the mask is 0."""
        shape = (len(self.segments.lengths), self.width, *packed.shape[1:])
        if self._is_full:
            return packed.reshape(shape)
        return packed.new_zeros(shape).flatten(0, 1).index_copy(0, self._index, packed).view(shape)

    def places(self, columns: range | Tensor) -> Tensor:
        """`(batch, columns)` int64 on the host: the packed place of each row's token in these columns, −1 where the mask is 0.

        Args:
            columns: column numbers, counted from the end if negative; a tensor must be on the host.

        Raises:
            InputError: a column that the batch does not have.
        """
        wanted = torch.as_tensor(columns, dtype=torch.int64)
        if wanted.dim() != 1 or bool(((wanted < -self.width) | (wanted >= self.width)).any()):
            raise InputError(
                got=f"positions {wanted.tolist()!r:.100}",
                expected=f"a 1-D tensor of positions from {-self.width} to {self.width - 1}",
                remedy="Pass the number of last positions to keep, or a tensor of positions of this call",
            )
        place = torch.full((len(self.segments.lengths) * self.width,), -1, dtype=torch.int64)
        place[self.kept] = torch.arange(len(self.kept))
        return place.view(-1, self.width)[:, wanted]

    def pad_weights(self, weights: list[Tensor]) -> Tensor:
        """Attention weights, `(heads, queries, keys)` of each row → `(batch, heads, width, width)`, zero where the mask is 0."""
        padded = weights[0].new_zeros(len(weights), weights[0].shape[0], self.width, self.width)
        for row, (one, kept) in enumerate(zip(weights, self._index.split(self.segments.lengths), strict=True)):
            columns = kept - row * self.width
            padded[row, :, columns[:, None], columns] = one
        return padded


def pack_rows(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: PagedCache | None,
) -> Rows:
    """Find the tokens to keep and their positions.

    A row's positions count from its first kept column, masked columns after that included. They differ from transformers' only
    by a shift of the whole row, which does not affect rotary embeddings.

    Args:
        shape: `(batch, width)` of the tokens.
        attention_mask: on the host, of 0 and 1, `(batch, width)`, or wider by the columns already in the cache. None keeps all.
        position_ids: on the host, `(batch, width)` or `(1, width)`, used unchanged.
        cache: the earlier tokens.
    """
    batch, width = shape
    passed = 0 if cache is None else cache.columns
    mask = torch.ones(shape, dtype=torch.bool) if attention_mask is None else _checked_mask(attention_mask, shape, passed)
    kept = mask.flatten().nonzero().squeeze(1)
    lengths = mask.sum(1)
    next_positions = torch.tensor(cache.next_positions if cache is not None else [0] * batch, dtype=torch.int64)
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != width:
            raise _wrong("position_ids", position_ids, f"shape ({batch}, {width}) or (1, {width})")
        columns = position_ids.to(torch.int64).expand(batch, width)
        # Masked columns are padding, so a row continues after its last kept token.
        last = columns.masked_fill(~mask, -1).amax(1) if width else next_positions - 1
        next_positions = torch.where(lengths > 0, last + 1, next_positions)
    else:
        # A row without any earlier token counts from its first one in this call.
        fresh = torch.tensor([length == 0 for length in (cache.lengths if cache is not None else [0] * batch)], dtype=torch.bool)
        first = mask.int().argmax(1) if width else torch.zeros(batch, dtype=torch.int64)
        start = torch.where(fresh, -first, next_positions)
        columns = torch.arange(width) + start[:, None]
        next_positions = torch.where(fresh & (lengths == 0), 0, start + width)
    return Rows(width, Segments(tuple(lengths.tolist()), device), kept, columns.flatten()[kept], next_positions.tolist())


def _checked_mask(attention_mask: Tensor, shape: tuple[int, int], passed: int) -> Tensor:
    batch, width = shape
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] not in (width, passed + width):
        wider = f" or ({batch}, {passed + width}), with the columns already in past_key_values" if passed else ""
        raise _wrong("attention_mask", attention_mask, f"shape ({batch}, {width}){wider}")
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise _wrong("attention_mask", attention_mask, "values 0 (masked) and 1 (kept)")
    return attention_mask[:, attention_mask.shape[1] - width :].bool()


def _wrong(name: str, value: Tensor, expected: str) -> InputError:
    return InputError(
        got=f"{name} of shape {tuple(value.shape)} and dtype {value.dtype}", expected=expected, remedy="Use what the processor returns"
    )
