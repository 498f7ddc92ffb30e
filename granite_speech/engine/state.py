"""The state of a decode step: one row for each answer in progress, in device tensors whose addresses never change.

A step reads and writes only these tensors, so it can be captured once and replayed. Between steps the host lets answers enter and
leave, writes the block table when a page is added, and moves rows together when some have ended.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from granite_speech.engine.fixed_shapes import power_of_2
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.sampling import seen_tokens
from granite_speech.modules.cache import PagePool
from granite_speech.modules.transfers import on_device

__all__ = ["STEPS", "DecodeState", "Row", "StateSize", "ladder", "tokens_and_logprobs"]

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


@dataclass(frozen=True)
class Row:
    """An answer as it enters a state.

    Attributes:
        options: of the request.
        prompt: tokens of the prompt.
        keys: stored so far.
        position: of the newest stored token, for the rotary embedding.
        has_audio: whether the adapter is on.
        token: the newest one, whose keys are not stored yet.
        origin: the request's row, whose random numbers the answer uses.
        seed: of the answer's own random numbers.
    """

    options: GenerationOptions
    prompt: int
    keys: int
    position: int
    has_audio: bool
    token: int = 0
    origin: int = 0
    seed: int = 0

    def integers(self, vocab_size: int) -> tuple[int, ...]:
        """Values of `_INT64`."""
        options = self.options
        top_k = min(options.top_k or vocab_size, vocab_size) if options.do_sample else 1
        return self.token, self.position, self.origin, self.seed, top_k

    def small_integers(self) -> tuple[int, ...]:
        """Values of `_INT32`."""
        options, end = self.options, self.prompt + self.options.max_new_tokens - 1
        adapter_index = 0 if self.has_audio else -1
        return self.keys, end, 1, adapter_index, self.prompt + options.min_new_tokens, int(options.do_sample)

    def numbers(self) -> tuple[float, ...]:
        """Values of `_FLOAT32`. Temperature and top_p of an answer that is not sampled have no effect."""
        options = self.options
        sampled = (options.temperature, 1 - options.top_p) if options.do_sample else (1.0, 0.0)
        return options.repetition_penalty, *sampled


# The vectors of a state, by dtype: `Row` has their values in this order.
_INT64 = ("tokens", "positions", "origin", "seeds", "top_k")
_INT32 = ("kv_lens", "limits", "active", "adapter_index", "earliest_ends", "sampled")
_FLOAT32 = ("penalty", "temperature", "top_p")


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
        sampled: `(rows,)` int32, 1 if tokens are drawn and 0 if the best is taken.
        penalty, temperature, top_p: `(rows, 1)` float32; top_p holds 1 − p.
        top_k: `(rows, 1)` int64.
        origin: `(rows,)` int64, the request's row, whose random numbers the answer uses.
        seeds: `(rows,)` int64, of answers that draw their own random numbers.
        record: `(STEPS, 2, rows)` int64, what the host reads of the last graph's steps: see `tokens_and_logprobs`.
        history: `(STEPS, rows)` int64, a view of it: the tokens; −1 for a row that was not active.
        logprobs: `(STEPS, rows)` float32, a view of it: the log-probabilities of the tokens; any number for a row that was not active.
        seen: `(rows, vocabulary + 1)` bool, tokens that prompt or answer have; made when a repetition penalty needs it.
        noise: `(rows, vocabulary)` float32, exponentially distributed; made when sampling needs it.
        vectors: `(rows, hidden)`, embeddings of newest tokens that are audio; made when a prompt ends with one.
        is_vector: `(rows,)` bool, the rows whose newest token is one of `vectors`; made with it.
        cu_seqlens: `(rows + 1,)` int32: one query for each row.
        counters: `(rows * heads,)` int32, zero between launches: scratch of `decode_attention`.
    """

    tokens: Tensor
    positions: Tensor
    origin: Tensor
    seeds: Tensor
    top_k: Tensor
    kv_lens: Tensor
    limits: Tensor
    active: Tensor
    adapter_index: Tensor
    earliest_ends: Tensor
    sampled: Tensor
    penalty: Tensor
    temperature: Tensor
    top_p: Tensor

    def __init__(self, size: StateSize, vocab_size: int, pool: PagePool):
        self.size, self.vocab_size, self.pool = size, vocab_size, pool
        self.device = pool.keys[0].device
        self.seen: Tensor | None = None
        self.noise: Tensor | None = None
        self.vectors: Tensor | None = None
        self.is_vector: Tensor | None = None
        rows = size.rows
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside it
            # One tensor for each dtype, so that answers enter and move in few copies.
            kinds = ((_INT64, torch.int64), (_INT32, torch.int32), (_FLOAT32, torch.float32))
            self._fields = [self._zeros(len(names), rows, dtype=dtype) for names, dtype in kinds]
            for (names, _), matrix in zip(kinds, self._fields, strict=True):
                for name, vector in zip(names, matrix, strict=True):
                    setattr(self, name, vector.unsqueeze(1) if name in ("top_k", *_FLOAT32) else vector)
            self.block_table = self._zeros(rows, size.pages, dtype=torch.int32)
            self.ends = self._zeros(rows, size.ends, dtype=torch.int64)
            self.record = self._zeros(STEPS, 2, rows, dtype=torch.int64)
            self.history, self.logprobs = tokens_and_logprobs(self.record)
            self.cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
            self.counters = self._zeros(rows * pool.num_heads, dtype=torch.int32)

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def enter(self, rows: Sequence[Row], places: Sequence[int] | None = None) -> None:
        """Begin or resume answers in these rows of the state; None: in the first ones. The block table is written separately."""
        at = None if places is None else on_device(list(places), self.device, torch.int64)
        values = ([one.integers(self.vocab_size) for one in rows], [one.small_integers() for one in rows], [one.numbers() for one in rows])
        for matrix, columns in zip(self._fields, values, strict=True):
            _put(matrix, torch.tensor(columns, dtype=matrix.dtype).T, at, dim=1)
        _put(self.ends, torch.tensor([self._ends(one.options) for one in rows]), at)

    def _ends(self, options: GenerationOptions) -> list[int]:
        """A row of `ends`."""
        inside = [one for one in options.eos_token_id if 0 <= one < self.vocab_size] or [-1]
        return inside + [inside[0]] * (self.size.ends - len(inside))

    def write_block_table(self, table: Tensor, places: Sequence[int] | None = None) -> None:
        """Write rows `(n, pages)` int32 on the host, to these rows of the block table; None: to the first ones."""
        _put(self.block_table, table, None if places is None else on_device(list(places), self.device, torch.int64))

    def see(self, ids: Tensor, kept: Tensor, places: Sequence[int] | None = None) -> None:
        """Note the tokens of rows for the repetition penalty. `(n, width)` each; kept is False for padding. None: of the first rows."""
        if self.seen is None:
            with torch.inference_mode(False):
                self.seen = self._zeros(self.size.rows, self.vocab_size + 1, dtype=torch.bool)
        at = None if places is None else on_device(list(places), self.device, torch.int64)
        _put(self.seen, seen_tokens(ids, kept, self.vocab_size), at)

    def place_vectors(self, vectors: Tensor, places: Sequence[int]) -> None:
        """The newest tokens of these rows are audio, with these embeddings `(n, hidden)`; those of all others are text."""
        with torch.inference_mode(False):
            if self.vectors is None or self.is_vector is None:
                self.vectors = self._zeros(self.size.rows, vectors.shape[1], dtype=vectors.dtype)
                self.is_vector = self._zeros(self.size.rows, dtype=torch.bool)
        at = on_device(list(places), self.device, torch.int64)
        self.vectors.index_copy_(0, at, vectors)
        self.is_vector.zero_()
        self.is_vector.index_fill_(0, at, True)

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
        for matrix in self._fields:
            matrix[:, :count].copy_(matrix.index_select(1, order))
        for tensor in (self.block_table, self.ends, *([] if self.seen is None else [self.seen])):
            tensor[:count].copy_(tensor.index_select(0, order))
        self.active[count:].zero_()

    def stop(self, rows: Sequence[int]) -> None:
        """End the answers of these rows."""
        self.active.index_fill_(0, on_device(list(rows), self.device, torch.int64), 0)

    def reset(self) -> None:
        """End all answers, and make a step harmless: it writes to page 0 alone."""
        self.active.zero_()
        self.kv_lens.zero_()

    def move_from(self, other: "DecodeState") -> None:
        """Take over the answers of a smaller state."""
        rows = other.size.rows
        for own, theirs in zip(self._fields, other._fields, strict=True):
            own[:, :rows].copy_(theirs)
        self.block_table[:rows, : other.size.pages].copy_(other.block_table)
        # An end token twice changes nothing.
        self.ends[:rows].copy_(torch.cat((other.ends, other.ends[:, :1].expand(-1, self.size.ends - other.size.ends)), dim=1))
        if other.seen is not None:
            with torch.inference_mode(False):
                self.seen = self._zeros(self.size.rows, self.vocab_size + 1, dtype=torch.bool)
            self.seen[:rows].copy_(other.seen)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Put the answers back after the block, in which steps may run."""
        tensors = [*self._fields, self.record, *([] if self.seen is None else [self.seen])]
        before = [one.clone() for one in tensors]
        try:
            yield
        finally:
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)


def tokens_and_logprobs(record: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `(steps, rows)` int64 and their log-probabilities `(steps, rows)` float32 of a record `(steps, 2, rows)`, or of its copy.

    They are one tensor, so that one transfer brings both.
    """
    tokens, logprobs = record.unbind(1)
    return tokens, logprobs.view(torch.float32)[:, : record.shape[2]]


def _put(target: Tensor, values: Tensor, at: Tensor | None, dim: int = 0) -> None:
    """Copy values to the indices `at` along a dimension, or to the first ones; along the others, to the first ones."""
    new = on_device(values.contiguous(), target.device, target.dtype)
    if at is None:
        target[tuple(map(slice, values.shape))].copy_(new)
    else:
        target.index_copy_(dim, at, new)
