"""The tile that `python -m bench tune` chooses for each key, from times that are ratios in one run, and its row as Python source."""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from granite_kernels.launch import Tile
from granite_kernels.tiles import Key, TileTable

__all__ = ["Ratios", "choose", "geometric_mean", "row", "tile_text"]

# A smaller change is noise.
LEAST_GAIN = 0.02

# By key, each usable tile with its time as a multiple of the present tile's.
Ratios = Mapping[Key, list[tuple[Tile, float]]]


def choose(table: TileTable, ratios: Ratios, unfinished: Iterable[Key] = ()) -> dict[Key, Tile]:
    """The tile of each key with times; and of others, if constants that they must agree in change.

    Args:
        ratios: of keys for which all that should be timed was timed.
        unfinished: keys that also have to be timed. What must agree with them stays as it is.
    """
    chosen = {}
    for _, keys in groupby(sorted(table.rows, key=str), key=lambda key: str(key[:2]) if table.bits else key):
        group = list(keys)
        if timed := [key for key in group if key in ratios]:
            constants = _constants(table, group, timed, ratios, set(unfinished))
            chosen |= {key: _best(table, key, ratios[key], constants) for key in timed}
            if constants != table.bits_of(table.rows[timed[0]].tile):
                chosen |= {key: _with_constants(table, key, constants) for key in group if key not in ratios}
    return chosen


def _constants(table: TileTable, group: list[Key], timed: list[Key], ratios: Ratios, unfinished: set[Key]) -> tuple[int, ...]:
    """The constants that the group's keys must agree in with the best total; the present ones unless others gain enough."""
    present = table.bits_of(table.rows[timed[0]].tile)
    if unfinished & set(group):
        return present
    totals = {}
    for constants in dict.fromkeys(table.bits_of(tile) for tile, _ in ratios[timed[0]]):
        least = [min((ratio for tile, ratio in ratios[key] if table.bits_of(tile) == constants), default=math.inf) for key in timed]
        others = [key for key in group if key not in ratios]
        if math.inf not in least and all(_with_constants(table, key, constants) for key in others):
            totals[constants] = geometric_mean(least)
    best = min(totals, key=totals.get, default=present)
    return best if present not in totals or totals[best] <= (1 - LEAST_GAIN) * totals[present] else present


def _best(table: TileTable, key: Key, ratios: list[tuple[Tile, float]], constants: tuple[int, ...]) -> Tile:
    """The fastest tile with these constants; the present one if it is no slower than that within the noise."""
    present = table.rows[key].tile
    fitting = [(tile, ratio) for tile, ratio in ratios if table.bits_of(tile) == constants]
    best, least = min(fitting, key=lambda one: one[1], default=(present, 1.0))
    now = next((ratio for tile, ratio in fitting if tile == present), None)
    return best if now is None or least <= (1 - LEAST_GAIN) * now else present


def _with_constants(table: TileTable, key: Key, constants: tuple[int, ...]) -> Tile | None:
    """The candidate with these constants that is most like the present tile; None if there is none."""
    present = table.rows[key].tile
    fitting = [tile for tile in table.candidates(key) if table.bits_of(tile) == constants]
    return min(fitting, key=lambda tile: _differences(tile, present), default=None)


def _differences(tile: Tile, other: Tile) -> int:
    blocks = sum(tile.blocks[name] != value for name, value in other.blocks.items())
    return blocks + (tile.num_warps != other.num_warps) + (tile.num_stages != other.num_stages)


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def row(key: Key, tile: Tile, source: str, *arguments: str) -> str:
    """A table's row as Python source: `(90, 2): measured(Tile({"BLOCK": 64}, 4, 2), "H200", "2026-11-27"),`."""
    given = ", ".join([tile_text(tile), *map(_text, arguments)])
    return f"{_text(key)}: {source}({given}),"


def tile_text(tile: Tile) -> str:
    """A tile as Python source."""
    stages = f", {tile.num_stages}" if tile.num_stages != 1 else ""
    return f"Tile({json.dumps(dict(tile.blocks))}, {tile.num_warps}{stages})"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
