"""Keys and values in pages: one pool per layer, and a block table of each sequence's pages (Kwon et al., arXiv 2309.06180).

The cache also has the rest of what a decode step needs about a sequence: how many keys it has, the position of its next token,
and whether it has audio and therefore the adapter.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from granite_speech.config import GraniteConfig
from granite_speech.errors import InputError
from granite_speech.modules.packing import Segments
from granite_speech.modules.transfers import on_device

__all__ = ["PADDING", "CacheStep", "PagePool", "PagedCache"]

PADDING = torch.iinfo(torch.int64).min  # in the place of the position of a column without a token


class PagePool:
    """Pages of keys and values, `(pages, page_size, num_kv_heads, head_dim)` for each layer, and which of them are free.

    Page 0 is never handed out: in a step of fixed shape, rows that belong to no sequence write there.

    Args:
        config: of the language model.
        dtype, device: of the pages.
        page_size: tokens per page.

    Attributes:
        keys, values: one tensor per layer; other tensors after the pool has grown.
        total: pages, page 0 included.
        num_heads: of the queries.
    """

    def __init__(self, config: GraniteConfig, *, dtype: torch.dtype, device: torch.device, page_size: int = 64):
        self.page_size, self.total, self.num_heads = page_size, 0, config.num_attention_heads
        self._free: list[int] = []
        shape = (0, page_size, config.num_key_value_heads, config.attention_head_dim)
        with torch.inference_mode(False):  # see _grow
            self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
            self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def count(self, tokens: int) -> int:
        """Pages that hold this many tokens of one sequence."""
        return -(-tokens // self.page_size)

    def require(self, pages: int) -> None:
        """Grow until this many pages are free."""
        missing = pages - len(self._free)
        if missing > 0 and self._is_unused():
            self._grow(1 + pages)
        elif missing > 0:
            # At least doubled, so that growth token by token copies the pools only a logarithmic number of times.
            self._grow(max(self.total + missing, 2 * self.total))

    def _is_unused(self) -> bool:
        return len(self._free) == max(0, self.total - 1)

    def take(self, pages: int) -> list[int]:
        """Hand out pages."""
        self.require(pages)
        taken, self._free = self._free[:pages], self._free[pages:]
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Pages that no sequence uses any more."""
        self._free = sorted({*self._free, *pages})

    def _grow(self, total: int) -> None:
        """Enlarge every pool. If memory runs out, all pools keep their former size."""
        kept = self.total
        if self._is_unused():
            # There is nothing to copy. Free the old pools before the new ones need memory.
            self.keys, self.values = ([pool[:0].clone() for pool in pools] for pools in (self.keys, self.values))
            self._free, self.total, kept = [], 0, 0
        # Inference mode is off here even if the caller uses it: a later call without it could not write to such tensors.
        with torch.inference_mode(False), torch.no_grad():
            try:
                for pools in (self.keys, self.values):
                    for layer, pool in enumerate(pools):
                        pools[layer] = pool.new_empty(total, *pool.shape[1:])
                        pools[layer][:kept] = pool
            except BaseException:
                self.keys, self.values = ([pool[:kept] for pool in pools] for pools in (self.keys, self.values))
                raise
        self._free += range(max(kept, 1), total)
        self.total = total


@dataclass(frozen=True)
class CacheStep:
    """One call's view of the cache: where its new tokens go, and the keys that its queries may read.

    Attributes:
        pool: the pages.
        slots: `(tokens,)` int64, each new token's index into a pool viewed as `(pages * page_size, ...)`; None in a decode step that
            finds the place in the block table.
        block_table: `(sequences, max_pages)` int32.
        kv_lens: `(sequences,)` int32, keys of each sequence, including the new ones.
        has_past: whether queries must read keys from pages, because some are not from this call.
    """

    pool: PagePool
    slots: Tensor | None
    block_table: Tensor
    kv_lens: Tensor
    has_past: bool

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store `(tokens, num_kv_heads, head_dim)` keys and values of one layer, detached."""
        for pool, new in ((self.pool.keys[layer], keys), (self.pool.values[layer], values)):
            # The dtypes differ only under autocast.
            pool.flatten(0, 1).index_copy_(0, self.slots, new.detach().to(pool.dtype))


class PagedCache:
    """Keys and values of a batch of sequences.

    Args:
        config: of the language model.
        sequences: rows of the batch.
        dtype, device: of the pools.
        page_size: tokens per page.
        pool: pages to use, shared with other caches; None: pages of its own.
    """

    def __init__(
        self,
        config: GraniteConfig,
        sequences: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = 64,
        pool: PagePool | None = None,
    ):
        self.pool = pool or PagePool(config, dtype=dtype, device=device, page_size=page_size)
        self.lengths = [0] * sequences  # keys of each sequence
        self.columns = 0  # width of the padded batch so far, for a caller that pads
        self._positions = torch.empty(sequences, 0, dtype=torch.int64)  # of every column's token
        self.next_positions = [0] * sequences
        self.has_audio = [False] * sequences
        self._pages: list[list[int]] = [[] for _ in range(sequences)]

    @property
    def keys(self) -> list[Tensor]:
        return self.pool.keys

    @property
    def values(self) -> list[Tensor]:
        return self.pool.values

    @property
    def page_size(self) -> int:
        return self.pool.page_size

    def __len__(self) -> int:
        """Sequences in the batch."""
        return len(self.lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included; in steps that do not pad, the tokens of the longest sequence."""
        return max(self.columns, max(self.lengths, default=0))

    def advance(self, positions: Tensor, next_positions: list[int]) -> None:
        """Count the columns of a call whose tokens are stored.

        Args:
            positions: `(sequences, columns)` on the host, `PADDING` for a masked column.
            next_positions: of each sequence.
        """
        self._positions = torch.cat((self._positions, positions), dim=1)
        self.columns, self.next_positions = self._positions.shape[1], next_positions

    def crop(self, max_length: int | None = None, *, tokens_to_remove: int | None = None) -> None:
        """Forget the last columns, as a step that checks a draft does with the tokens that it refuses.

        Args:
            max_length: columns to keep; negative: columns to remove. 0 removes none, as in transformers 5.
            tokens_to_remove: columns to remove, as a negative number: the name in transformers 5.17 and 5.23.

        Raises:
            InputError: no integer, both arguments, tokens_to_remove above 0, or a cache whose sequences share pages that would be
                written again.
        """
        [*given] = (one for one in (max_length, tokens_to_remove) if one is not None)
        if len(given) != 1 or type(given[0]) is not int or (tokens_to_remove or 0) > 0:
            values = ", ".join(f"{one!r:.60}" for one in given)
            remedy = "Pass the number of columns to keep, or the number to remove as a negative one"
            raise InputError(got=f"crop({values})", expected="one integer, at most 0 for tokens_to_remove", remedy=remedy)
        [columns] = given
        kept = self._positions[:, : columns if columns > 0 else max(0, self.columns + columns)]
        if kept.shape[1] == self._positions.shape[1]:
            return
        lengths = (kept != PADDING).sum(1).tolist()
        written = [page for pages, length in zip(self._pages, lengths, strict=True) for page in pages[length // self.page_size :]]
        held = [page for pages in self._pages for page in pages]
        if any(held.count(page) > 1 for page in set(written)):
            raise InputError(
                got="crop of a cache after reorder",
                expected="sequences that share no page beyond the columns to keep",
                remedy="Crop first, or run the rows again without past_key_values",
            )
        self._positions, self.columns, self.lengths = kept, kept.shape[1], lengths
        # A row without tokens begins again.
        lasts = kept.amax(1).tolist() if kept.shape[1] else [PADDING] * len(self)
        self.next_positions = [0 if last == PADDING else last + 1 for last in lasts]

    def reserve(self, capacities: list[int]) -> None:
        """Reserve pages for this many tokens of each sequence, so that later calls need none."""
        missing = [max(0, self.pool.count(capacity) - len(pages)) for pages, capacity in zip(self._pages, capacities, strict=True)]
        self.pool.require(sum(missing))
        for pages, count in zip(self._pages, missing, strict=True):
            pages += self.pool.take(count)

    def release(self) -> None:
        """Give all pages back. The cache is empty afterwards."""
        self.pool.give_back(page for pages in self._pages for page in pages)
        self._pages = [[] for _ in self._pages]
        self.lengths = [0] * len(self)

    def block_table(self, width: int | None = None) -> Tensor:
        """`(sequences, width)` int32 on the host: the pages of each sequence, then zeros. None: as wide as needed."""
        width = max(map(len, self._pages), default=0) if width is None else width
        return torch.tensor([pages + [0] * (width - len(pages)) for pages in self._pages], dtype=torch.int32).view(len(self), width)

    def reorder(self, rows: list[int]) -> None:
        """Make sequence i the old sequence `rows[i]`; an old sequence may be used any number of times, or not at all.

        Copies of a sequence share its full pages, which are never written again. The partly filled last page is copied for all
        but the first, since each will write its own tokens there. Pages without a sequence become free.
        """
        full = [length // self.page_size for length in self.lengths]
        before = {page for pages in self._pages for page in pages}
        held = [pages[: self.pool.count(length)] for pages, length in zip(self._pages, self.lengths, strict=True)]
        self._pages = [held[row][: full[row]] for row in rows]
        self.pool.give_back(before - {page for row in rows for page in held[row]})

        has_last, copies = set(), []
        for place, row in enumerate(rows):
            last = held[row][full[row] :]
            if row in has_last and last:
                copies.append((place, last[0]))
            else:
                self._pages[place] += last
                has_last.add(row)
        taken = self.pool.take(len(copies))
        for (place, _), page in zip(copies, taken, strict=True):
            self._pages[place].append(page)
        if copies:
            source, target = (on_device(pages, self.keys[0].device) for pages in ([page for _, page in copies], taken))
            for pool in (*self.keys, *self.values):
                pool.index_copy_(0, target, pool.index_select(0, source))

        self._positions = self._positions[rows]
        self.lengths, self.next_positions, self.has_audio = (
            [values[row] for row in rows] for values in (self.lengths, self.next_positions, self.has_audio)
        )

    def begin(self, new: Segments) -> CacheStep:
        """Reserve pages for new tokens of each sequence and count them. An error changes nothing."""
        if len(new.lengths) != len(self):
            raise InputError(
                got=f"{len(new.lengths)} rows for past_key_values of {len(self)}",
                expected="the rows of the call that made the cache, in the same order",
                remedy="Pass the same batch, or no past_key_values",
            )
        before = self.lengths
        lengths = [old + more for old, more in zip(before, new.lengths, strict=True)]
        self.reserve(lengths)
        device, page_size = self.keys[0].device, self.page_size
        table = self.block_table()
        spans = [torch.arange(old, now) for old, now in zip(before, lengths, strict=True)]
        slots = [row[span // page_size] * page_size + span % page_size for row, span in zip(table.long(), spans, strict=True)]
        step = CacheStep(
            pool=self.pool,
            slots=on_device(torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64), device),
            block_table=on_device(table, device),
            kv_lens=on_device(lengths, device, torch.int32),
            has_past=any(before),
        )
        self.lengths = lengths
        return step
