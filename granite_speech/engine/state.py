"""The state of a decode step: one row for each answer in progress, in device tensors whose addresses never change.

A step reads and writes only these tensors, so it can be captured once and replayed. The host fills rows before the first step,
writes the block table when a page is added, and moves rows together when some have ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from granite_speech.engine.fixed_shapes import power_of_2
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.sampling import seen_tokens
from granite_speech.modules.cache import PagedCache, PagePool
from granite_speech.modules.transfers import on_device

__all__ = ["STEPS", "DecodeState", "StateSize", "ladder"]

# The most steps that one graph makes.
STEPS = 8

_LADDER = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)


def ladder(rows: int) -> int:
    """The number of rows that a captured step for this many answers has."""
    return next((size for size in _LADDER if size >= rows), -(-rows // 32) * 32)


@dataclass(frozen=True)
class StateSize:
    """Sizes that are fixed while a state lives.

    Attributes:
        rows: answers in progress at once.
        pages: of one row.
        ends: tokens that can end an answer.
    """

    rows: int
    pages: int
    ends: int

    @classmethod
    def of(cls, rows: int, pages: int, ends: int) -> Self:
        """Sizes for a request, rounded up so that similar requests use the same state."""
        return cls(ladder(rows), max(8, power_of_2(pages)), max(4, power_of_2(ends)))

    def union(self, other: Self) -> Self:
        """The smallest sizes that cover both."""
        return type(self)(max(self.rows, other.rows), max(self.pages, other.pages), max(self.ends, other.ends))


class DecodeState:
    """Tensors of `size.rows` answers in progress. Row i of every tensor belongs to the same answer.

    Args:
        size: fixed sizes.
        vocab_size: columns of the logits.
        pool: pages of the keys and values.

    Attributes:
        tokens: `(rows,)` int64, the newest token of each answer, whose keys are not stored yet.
        positions: `(rows,)` int64, of the newest stored token, for the rotary embedding.
        kv_lens: `(rows,)` int32, keys stored.
        limits: `(rows,)` int32, the number of keys at which an answer has its last token.
        active: `(rows,)` int32, 1 while the answer goes on, then 0. A row that is not active writes to page 0 and reads nothing.
        adapter_index: `(rows,)` int32, 0 with the adapter and −1 without.
        block_table: `(rows, pages)` int32.
        ends: `(rows, ends)` int64, tokens that end the answer; −1 if there are none.
        earliest_ends: `(rows,)` int32, the number of keys from which on the answer may end.
        penalty, temperature, top_p: `(rows, 1)` float32; top_p holds 1 − p.
        top_k: `(rows, 1)` int64.
        origin: `(rows,)` int64, the request's row, whose random numbers the answer uses.
        history: `(STEPS, rows)` int64, the tokens of the last graph's steps; −1 for a row that was not active.
        seen: `(rows, vocabulary + 1)` bool, tokens that prompt or answer have; made when a repetition penalty needs it.
        noise: `(rows, vocabulary)` float32, exponentially distributed; made when sampling needs it.
        cu_seqlens: `(rows + 1,)` int32: one query for each row.
    """

    def __init__(self, size: StateSize, vocab_size: int, pool: PagePool):
        self.size, self.vocab_size, self.pool = size, vocab_size, pool
        self.device = pool.keys[0].device
        self.seen: Tensor | None = None
        self.noise: Tensor | None = None
        rows = size.rows
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside it
            self.tokens, self.positions, self.origin = (self._zeros(rows, dtype=torch.int64) for _ in range(3))
            self.kv_lens, self.limits, self.active, self.adapter_index, self.earliest_ends = (
                self._zeros(rows, dtype=torch.int32) for _ in range(5)
            )
            self.block_table = self._zeros(rows, size.pages, dtype=torch.int32)
            self.ends = self._zeros(rows, size.ends, dtype=torch.int64)
            self.penalty, self.temperature, self.top_p = (self._zeros(rows, 1, dtype=torch.float32) for _ in range(3))
            self.top_k = self._zeros(rows, 1, dtype=torch.int64)
            self.history = self._zeros(STEPS, rows, dtype=torch.int64)
            self.cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=self.device)

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def fill(self, cache: PagedCache, options: GenerationOptions) -> None:
        """Begin an answer to each sequence of `cache`, whose prompt it holds. The other rows are not active."""
        count, lengths = len(cache), torch.tensor(cache.lengths, dtype=torch.int32)
        inside = [one for one in options.eos_token_id if 0 <= one < self.vocab_size] or [-1]
        ends = inside + [inside[0]] * (self.size.ends - len(inside))
        self.active.zero_()
        self.kv_lens.zero_()
        self._write(self.active, torch.ones(count, dtype=torch.int32))
        self._write(self.kv_lens, lengths)
        self._write(self.limits, lengths + options.max_new_tokens - 1)
        self._write(self.earliest_ends, lengths + options.min_new_tokens)
        self._write(self.positions, torch.tensor(cache.next_positions) - 1)
        self._write(self.adapter_index, torch.tensor([0 if one else -1 for one in cache.has_audio], dtype=torch.int32))
        self._write(self.ends, torch.tensor(ends).expand(count, -1))
        self._write(self.origin, torch.arange(count))
        self.write_block_table(cache)
        self.penalty.fill_(options.repetition_penalty)
        self.temperature.fill_(options.temperature)
        self.top_p.fill_(1 - options.top_p)
        self.top_k.fill_(max(1, min(options.top_k, self.vocab_size)))

    def _write(self, target: Tensor, values: Tensor) -> None:
        target[: len(values)].copy_(on_device(values.contiguous(), self.device, target.dtype))

    def write_block_table(self, cache: PagedCache, rows: Sequence[int] | None = None) -> None:
        """Write the pages of the cache's sequences; row i has those of sequence `rows[i]` (None: i)."""
        table = cache.block_table(self.size.pages)
        self._write(self.block_table, table if rows is None else table[list(rows)])

    def see(self, ids: Tensor, kept: Tensor) -> None:
        """Note the tokens of each row's prompt for the repetition penalty. `(rows, width)` each; kept is False for padding."""
        if self.seen is None:
            with torch.inference_mode(False):
                self.seen = self._zeros(self.size.rows, self.vocab_size + 1, dtype=torch.bool)
        self.seen[: len(ids)].copy_(seen_tokens(ids, kept, self.vocab_size))

    def draw(self, rows: int, rng: torch.Generator | None) -> None:
        """Draw the random numbers of one step for a request of this many rows, ended ones included.

        So each answer gets the numbers that it would get if no other had ended.
        """
        if self.noise is None:
            with torch.inference_mode(False):
                self.noise = torch.ones(self.size.rows, self.vocab_size, dtype=torch.float32, device=self.device)
        self.noise[:rows].exponential_(1.0, generator=rng)

    def keep(self, rows: Sequence[int]) -> None:
        """Make row i the old row `rows[i]`. The rows after these are not active."""
        order, count = on_device(list(rows), self.device, torch.int64), len(rows)
        for tensor in (*self._per_row(), *([] if self.seen is None else [self.seen])):
            tensor[:count].copy_(tensor.index_select(0, order))
        self.active[count:].zero_()

    def stop(self, rows: Sequence[bool]) -> None:
        """End the answers of the rows that are True."""
        going_on = on_device([not one for one in rows], self.device, torch.int32)
        self.active[: len(rows)].mul_(going_on)

    def reset(self) -> None:
        """End all answers, and make a step harmless: it writes to page 0 alone."""
        self.active.zero_()
        self.kv_lens.zero_()

    def _per_row(self) -> tuple[Tensor, ...]:
        return (
            self.tokens,
            self.positions,
            self.kv_lens,
            self.limits,
            self.active,
            self.adapter_index,
            self.block_table,
            self.ends,
            self.earliest_ends,
            self.penalty,
            self.temperature,
            self.top_p,
            self.top_k,
            self.origin,
        )
