"""What `python -m bench tune` prints: the rows of the tables of tiles, the times, and what was dropped or not tried."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from granite_kernels.launch import Tile
from granite_kernels.tiles import Key

from bench.tune_choice import Ratios, choose, row, tile_text
from bench.tune_plan import NO_TIME, find

__all__ = ["add_choices", "line", "markdown"]

# Chips that rows may name.
_CHIP = re.compile(r"\b(A100|H100|H200|B200)\b")
_STAND_IN = "**The times are stand-ins: no GPU was used, nothing was measured, and these rows must not be used.**"


def add_choices(result: dict[str, Any], ratios: Mapping[tuple[str, str], Ratios], unfinished: set[tuple[str, str, Key]]) -> None:
    """Choose from all that was timed so far: sets "chosen" and "ratio" of the keys, "following" and "rows" of the result."""
    entries = {(one["operation"], one["part"], tuple(one["key"])): one for one in result["keys"]}
    result["following"] = []
    for (operation, part), timed in ratios.items():
        waiting = [key for *name, key in unfinished if tuple(name) == (operation, part)]
        for key, tile in choose(find(operation, part), timed, waiting).items():
            if key in timed:
                chosen_ratio = next(ratio for one, ratio in timed[key] if one == tile)
                entries[operation, part, key] |= {"chosen": _plain(tile), "ratio": chosen_ratio}
            else:
                result["following"].append({"operation": operation, "part": part, "key": list(key), "chosen": _plain(tile)})
    result["rows"] = markdown(result)


def markdown(result: dict[str, Any]) -> str:
    """The times, the rows as Python, and lists of what was dropped and not tried."""
    run, stand_in = result["run"], result["timing"] != "graph"
    chosen = [one for one in result["keys"] if "chosen" in one]
    changed = sum(not _is_present(one) for one in chosen)
    head = [
        f"Tiles, {result['dtype']}: {run['machine']}, torch {run['versions']['torch']}, triton {run['versions']['triton']}, commit "
        f"{run['commit'][:8]}; {len(chosen)} keys timed, {changed} of them get another tile.",
        *([_STAND_IN] if stand_in else []),
    ]
    unit = "stand-in" if stand_in else "µs"
    times = [f"| table | key | case | present, {unit} | chosen, {unit} | chosen / present |", "|---|---|---|---|---|---|"]
    times += [text for one in chosen for text in _times(one)]
    rows = ["```python", *_rows(result), "```"]
    remarks = [f"- {text}." for text in _remarks(result)]
    return "\n".join([*head, "", *times, "", *rows, *([""] if remarks else []), *remarks])


def line(entry: dict[str, Any]) -> str:
    """A key in a line, as it is done."""
    name = f"{_table(entry)}, {tuple(entry['key'])}"
    if "chosen" not in entry:
        return f"{name}: {entry['not_tried']}"
    kept = "keeps its tile" if _is_present(entry) else f"{tile_text(_present(entry))} -> {tile_text(_chosen(entry))}"
    return f"{name}: {kept}, ratio {entry['ratio']:.3f}, {entry['seconds_timing']:.1f} s"


def _times(entry: dict[str, Any]) -> Iterator[str]:
    present, chosen = entry["tiles"][0]["seconds"], next(one["seconds"] for one in entry["tiles"] if one["tile"] == entry["chosen"])
    for case, seconds in chosen.items():
        before, now = present.get(case, {}).get("median"), seconds["median"]
        compared = f"{before * 1e6:.2f} | {now * 1e6:.2f} | {now / before:.3f}" if before else f"– | {now * 1e6:.2f} | –"
        yield f"| {_table(entry)} | {tuple(entry['key'])} | {case} | {compared} |"


def _rows(result: dict[str, Any]) -> Iterator[str]:
    date, machine = result["run"]["date"][:10], result["run"]["machine"]
    chip = _CHIP.search(machine)
    # Rows that name another chip, or none, use functions that do not exist, so that they cannot be pasted by mistake.
    if result["timing"] != "graph":
        source = ("stand_in", "no GPU", date)
    else:
        source = ("measured", chip.group(), date) if chip else ("timed", machine, date)
    followers = ("predicted", date) if source[0] == "measured" else source
    for table in dict.fromkeys(_table(one) for one in result["keys"] if "chosen" in one):
        yield f"# {table}"
        for one in result["keys"]:
            if _table(one) == table and "chosen" in one:
                yield f"{row(tuple(one['key']), _chosen(one), *source)}  # {_before(one)}"
        for one in result["following"]:
            if _table(one) == table:
                yield f"{row(tuple(one['key']), _chosen(one), *followers)}  # not timed, but has to agree"


def _before(entry: dict[str, Any]) -> str:
    if _is_present(entry):
        return "as before"
    compared = f"{entry['ratio']:.3f} of its time" if entry["tiles"][0]["baseline"] else "which could not be timed"
    return f"before: {tile_text(_present(entry))}, {compared}"


def _remarks(result: dict[str, Any]) -> Iterator[str]:
    for one in result["keys"]:
        if one["not_tried"]:
            yield f"{_table(one)}, {tuple(one['key'])} keeps its tile: {one['not_tried']}"
        if one["not_tried"] == NO_TIME:
            continue  # the same holds for all of its tiles
        for case, why in one["cases_not_timed"].items():
            yield f"{_table(one)}, {tuple(one['key'])} without {case}: {why}"
        for tile in one["tiles"]:
            if tile["dropped"]:
                yield f"{_table(one)}, {tuple(one['key'])} without {tile_text(Tile(**tile['tile']))}: {tile['dropped']}"
    for one in result["without_choice"]:
        yield f"{_table(one)}, {tuple(one['key'])}: {one['reason']}"


def _table(entry: dict[str, Any]) -> str:
    return f"{entry['operation']}, {entry['part']}"


def _is_present(entry: dict[str, Any]) -> bool:
    return entry["chosen"] == entry["tiles"][0]["tile"]


def _present(entry: dict[str, Any]) -> Tile:
    return Tile(**entry["tiles"][0]["tile"])


def _chosen(entry: dict[str, Any]) -> Tile:
    return Tile(**entry["chosen"])


def _plain(tile: Tile) -> dict[str, Any]:
    return {"blocks": dict(tile.blocks), "num_warps": tile.num_warps, "num_stages": tile.num_stages}
