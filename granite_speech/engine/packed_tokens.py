"""Tokens of several prompts, packed, that a pass of the language model adds to their keys and values.

A prompt may be cut into pieces: the tokens of a piece come after keys that are stored already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from granite_speech.modules.cache import CacheStep, PagePool
from granite_speech.modules.forward import PackedPrompt
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.packing import Segments
from granite_speech.modules.rows import Rows
from granite_speech.modules.tokens import Tokens
from granite_speech.modules.transfers import on_device

__all__ = ["PackedTokens", "store_keys"]


@dataclass(frozen=True)
class PackedTokens:
    """New tokens of several sequences. All tensors but `vectors` are on the host.

    Attributes:
        lengths: new tokens of each sequence.
        past: keys of each sequence that are stored already.
        ids: `(total,)` int64.
        is_audio: `(total,)` bool, which tokens are audio.
        vectors: `(audio tokens, hidden)` on the device, in the order of the tokens; None: no audio.
        positions: `(total,)` int64, for the rotary embedding.
        has_audio: for each sequence, whether the adapter is on.
        block_table: `(sequences, pages)` int32, pages for all keys of each sequence.
    """

    lengths: Sequence[int]
    past: Sequence[int]
    ids: Tensor
    is_audio: Tensor
    vectors: Tensor | None
    positions: Tensor
    has_audio: Sequence[bool]
    block_table: Tensor

    @classmethod
    def of(cls, prompt: PackedPrompt, block_table: Tensor) -> Self:
        """Whole prompts, without earlier keys."""
        lengths, positions = prompt.rows.segments.lengths, prompt.rows.positions
        past = (0,) * len(lengths)
        return cls(lengths, past, prompt.ids, prompt.is_audio, prompt.vectors, positions, prompt.has_audio, block_table)

    @cached_property
    def kv_lens(self) -> Tensor:
        """`(sequences,)` int32, keys of each sequence with the new tokens."""
        return torch.tensor([old + new for old, new in zip(self.past, self.lengths, strict=True)], dtype=torch.int32)

    @cached_property
    def _sequence(self) -> Tensor:
        """`(total,)`: the sequence of each token."""
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))

    def slots(self, page_size: int) -> Tensor:
        """`(total,)` int64, where each token's key is stored: an index into a pool viewed as `(pages * page_size, ...)`."""
        place = torch.cat([torch.arange(old, old + new) for old, new in zip(self.past, self.lengths, strict=True)])
        return self.block_table[self._sequence, place // page_size].long() * page_size + place % page_size

    @property
    def adapter_index(self) -> Tensor:
        """`(total,)` int32, 0 for tokens with the adapter and −1 for those without."""
        return torch.tensor([0 if one else -1 for one in self.has_audio], dtype=torch.int32)[self._sequence]


@torch.no_grad()
def store_keys(model: Any, pool: PagePool, tokens: PackedTokens) -> None:
    """Run tokens through the language model for their keys and values alone."""
    device = model.device
    ids, positions, slots = (on_device(one, device) for one in (tokens.ids, tokens.positions, tokens.slots(pool.page_size)))
    embeddings = model.embed_tokens(ids)
    if tokens.vectors is not None:
        places = on_device(tokens.is_audio.nonzero().squeeze(1), device)
        embeddings = embeddings.index_copy(0, places, tokens.vectors.to(embeddings.dtype))
    table, kv_lens = (on_device(one, device) for one in (tokens.block_table, tokens.kv_lens))
    segments = Segments(tuple(tokens.lengths), device)
    layout = Tokens(
        segments=segments,
        positions=positions,
        adapter_index=None if all(tokens.has_audio) else on_device(tokens.adapter_index, device),
        step=CacheStep(pool, slots, table, kv_lens, has_past=any(tokens.past)),
        rows=Rows.of_segments(segments) if have_hooks(model.decoder) else None,
    )
    model.language_states(embeddings, layout)
