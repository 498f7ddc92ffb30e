"""Keys and values in pages: one pool per layer, and a block table of each sequence's pages (Kwon et al., arXiv 2309.06180).

The cache also has the rest of what a decode step needs about a sequence: how many keys it has, the position of its next token,
and whether it has audio and therefore the adapter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from granite_speech.config import GraniteConfig
from granite_speech.errors import InputError
from granite_speech.modules.packing import Segments
from granite_speech.modules.transfers import on_device

__all__ = ["CacheStep", "PagedCache"]


@dataclass(frozen=True)
class CacheStep:
    """One call's view of the cache: where its new tokens go, and the keys that its queries may read.

    Attributes:
        cache: the pages.
        slots: `(tokens,)` int64, each new token's index into a pool viewed as `(pages * page_size, ...)`.
        block_table: `(sequences, max_pages)` int32.
        kv_lens: `(sequences,)` int32, keys of each sequence, including the new ones.
        before: keys of each sequence before this call.
    """

    cache: "PagedCache"
    slots: Tensor
    block_table: Tensor
    kv_lens: Tensor
    before: list[int]

    @property
    def has_past(self) -> bool:
        """Whether any sequence had keys before this call."""
        return any(self.before)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store `(tokens, num_kv_heads, head_dim)` keys and values of one layer, detached."""
        for pool, new in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
            pool.flatten(0, 1).index_copy_(0, self.slots, new.detach())

    def undo(self) -> None:
        """Forget the new tokens, because the call failed. Their pages stay reserved."""
        self.cache.lengths = self.before


class PagedCache:
    """Keys and values of a batch of sequences.

    Args:
        config: of the language model.
        sequences: rows of the batch.
        dtype, device: of the pools.
        page_size: tokens per page.
    """

    def __init__(self, config: GraniteConfig, sequences: int, *, dtype: torch.dtype, device: torch.device, page_size: int = 64):
        self.page_size = page_size
        self.lengths = [0] * sequences  # keys of each sequence
        self.columns = 0  # width of the padded batch so far, for a caller that pads
        self.next_positions = [0] * sequences
        self.has_audio = [False] * sequences
        self._pages: list[list[int]] = [[] for _ in range(sequences)]
        self._total_pages = 0
        self._free: list[int] = []  # pages that belong to no sequence
        shape = (0, page_size, config.num_key_value_heads, config.attention_head_dim)
        with torch.inference_mode(False):  # see _grow
            self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
            self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def __len__(self) -> int:
        """Sequences in the batch."""
        return len(self.lengths)

    def get_seq_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    def reserve(self, capacities: list[int]) -> None:
        """Reserve pages for this many tokens of each sequence, so that the pools need not grow in later calls."""
        missing = [max(0, self._page_count(capacity) - len(pages)) for pages, capacity in zip(self._pages, capacities, strict=True)]
        if sum(missing) > len(self._free):
            # At least doubled, so that growth token by token copies the pools only a logarithmic number of times.
            self._grow(max(self._total_pages + sum(missing) - len(self._free), 2 * self._total_pages))
        for pages, count in zip(self._pages, missing, strict=True):
            pages += self._take(count)

    def _page_count(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _take(self, count: int) -> list[int]:
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _grow(self, pages: int) -> None:
        """Enlarge every pool. If memory runs out, all pools keep their former size."""
        # Inference mode is off here even if the caller uses it: a later call without it could not write to such tensors.
        with torch.inference_mode(False), torch.no_grad():
            try:
                for pools in (self.keys, self.values):
                    for layer, pool in enumerate(pools):
                        pools[layer] = pool.new_empty(pages, *pool.shape[1:])
                        pools[layer][: self._total_pages] = pool
            except BaseException:
                self.keys, self.values = ([pool[: self._total_pages] for pool in pools] for pools in (self.keys, self.values))
                raise
        self._free += range(self._total_pages, pages)
        self._total_pages = pages

    def reorder(self, rows: list[int]) -> None:
        """Make sequence i the old sequence `rows[i]`; an old sequence may be used any number of times, or not at all.

        Copies of a sequence share its full pages, which are never written again. The partly filled last page is copied for all
        but the first, since each will write its own tokens there. Pages without a sequence become free.
        """
        full = [length // self.page_size for length in self.lengths]
        held = [pages[: self._page_count(length)] for pages, length in zip(self._pages, self.lengths, strict=True)]
        self._pages = [held[row][: full[row]] for row in rows]
        in_use = {page for row in rows for page in held[row]}
        self._free = [page for page in range(self._total_pages) if page not in in_use]

        has_last, copies = set(), []
        for place, row in enumerate(rows):
            last = held[row][full[row] :]
            if row in has_last and last:
                copies.append((place, last[0]))
            else:
                self._pages[place] += last
                has_last.add(row)
        if len(copies) > len(self._free):
            self._grow(max(self._total_pages + len(copies) - len(self._free), 2 * self._total_pages))
        taken = self._take(len(copies))
        for (place, _), page in zip(copies, taken, strict=True):
            self._pages[place].append(page)
        if copies:
            source, target = (on_device(pages, self.keys[0].device) for pages in ([page for _, page in copies], taken))
            for pool in (*self.keys, *self.values):
                pool.index_copy_(0, target, pool.index_select(0, source))

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
        device = self.keys[0].device
        widest = max(map(len, self._pages), default=0)
        table = torch.tensor([pages + [0] * (widest - len(pages)) for pages in self._pages], dtype=torch.int32).view(len(self), widest)
        spans = [torch.arange(old, now) for old, now in zip(before, lengths, strict=True)]
        slots = [
            row[span // self.page_size] * self.page_size + span % self.page_size for row, span in zip(table.long(), spans, strict=True)
        ]
        step = CacheStep(
            cache=self,
            slots=on_device(torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64), device),
            block_table=on_device(table, device),
            kv_lens=on_device(lengths, device, torch.int32),
            before=before,
        )
        self.lengths = lengths
        return step
