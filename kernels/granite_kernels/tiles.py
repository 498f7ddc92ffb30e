"""Tables of tiles: the tile of a launch, whether it was measured or predicted, and the candidates that `python -m bench tune` tries.

A kernel's file has its table, with the candidates next to it:

    _TILES = TileTable(
        "silu_product",
        "forward",
        {(80,): predicted(Tile({"BLOCK": 1024}, 4), "2026-11-27"), (90,): measured(Tile({"BLOCK": 1024}, 4), "H200", "2026-11-27"), ...},
        candidates=lambda key: [Tile({"BLOCK": block}, warps) for block in (512, 1024, 2048) for warps in (2, 4, 8)],
    )

and its launcher looks up `_TILES[architecture(x.device),]`.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from granite_kernels.launch import ARCHITECTURES, Tile

__all__ = ["TABLES", "Row", "TileTable", "measured", "predicted"]

Key = tuple[Any, ...]

# Every table, in the order in which the kernels' files are imported.
TABLES: list["TileTable"] = []


@dataclass(frozen=True)
class Row:
    """A tile of a table, and its source: "measured, H200, 2026-11-26" or "predicted, 2026-11-22"."""

    tile: Tile
    source: str


def measured(tile: Tile, chip: str, date: str) -> Row:
    """The fastest tile of those with which this kernel was timed on this chip; a file of that date in bench/results has the times."""
    return Row(tile, f"measured, {chip}, {date}")


def predicted(tile: Tile, date: str) -> Row:
    """A tile chosen from compiled code, from what the chip can hold, or from times of another kernel. This one was not timed with it."""
    return Row(tile, f"predicted, {date}")


class _Seen(threading.local):
    """The keys of a table that this thread looks up."""

    keys: set[Key] | None = None


class TileTable:
    """The tiles of one kernel.

    Args:
        operation: the operation's name.
        part: which of its kernels, in a word or two: "forward", "decode".
        rows: by key: the architecture (an entry of `launch.ARCHITECTURES`), then whatever else decides, such as bytes per element and a
            class of sizes.
        candidates: `candidates(key)` lists the tiles worth timing for a key. All have the constants of the key's own tile.
        alternatives: by key, candidates of other forms than the row's. The audit compiles them as it does the rows, so that a tuner may
            choose them on any chip.
        bits: names of constants that the bits of a result depend on, with "num_warps" for sums that warps share. Rows whose keys begin with
            the same two entries, architecture and bytes per element, agree in them, so that a sequence has the same bits in every batch.
        architectures: those on which the kernel runs.
    """

    def __init__(
        self,
        operation: str,
        part: str,
        rows: Mapping[Key, Row],
        *,
        candidates: Callable[[Key], Iterable[Tile]],
        alternatives: Mapping[Key, Sequence[Tile]] | None = None,
        bits: tuple[str, ...] = (),
        architectures: tuple[int, ...] = ARCHITECTURES,
    ):
        self.operation, self.part, self.rows, self.candidates, self.bits = operation, part, dict(rows), candidates, bits
        self.architectures = architectures
        self._changed: Mapping[Key, Tile] = {}
        self._seen = _Seen()
        self.alternatives = dict(alternatives or {})
        TABLES.append(self)

    def __getitem__(self, key: Key) -> Tile:
        if self._seen.keys is not None:
            self._seen.keys.add(key)
        return self._changed[key] if key in self._changed else self.rows[key].tile

    def bits_of(self, tile: Tile) -> tuple[int, ...]:
        """The values of `bits`."""
        return tuple(tile.num_warps if name == "num_warps" else tile.blocks[name] for name in self.bits)

    @contextmanager
    def using(self, changed: Mapping[Key, Tile]) -> Iterator[None]:
        """In this block, other tiles for some keys. In every thread: PyTorch runs a CUDA tensor's backward in one of its own."""
        before, self._changed = self._changed, changed
        try:
            yield
        finally:
            self._changed = before

    @contextmanager
    def lookups(self) -> Iterator[set[Key]]:
        """In this block and thread, collects the keys that are looked up."""
        before, self._seen.keys = self._seen.keys, set()
        try:
            yield self._seen.keys
        finally:
            self._seen.keys = before
