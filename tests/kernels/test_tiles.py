"""Tables of tiles: what every table must keep, and how a tile is replaced for a time."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from granite_kernels import OPERATIONS
from granite_kernels.launch import ARCHITECTURES, Tile
from granite_kernels.tiles import TABLES, TileTable, measured, predicted

assert OPERATIONS  # imports the kernels' files, which fill TABLES
EVERY = {f"{table.operation}, {table.part}": table for table in TABLES}


def test_every_table_has_a_name_of_its_own():
    assert len(EVERY) == len(TABLES) > 0
    assert {table.operation for table in TABLES} <= OPERATIONS.keys()


@pytest.mark.parametrize("name", EVERY)
def test_rows_have_a_source_and_cover_every_architecture(name):
    table = EVERY[name]
    assert {key[0] for key in table.rows} == set(table.architectures) <= set(ARCHITECTURES)
    by_chip = [{key[1:] for key in table.rows if key[0] == chip} for chip in table.architectures]
    assert all(keys == by_chip[0] for keys in by_chip)
    for row in table.rows.values():
        assert re.fullmatch(r"measured, (A100|H100|H200|B200), \d{4}-\d\d-\d\d|predicted, \d{4}-\d\d-\d\d", row.source)


@pytest.mark.parametrize("name", EVERY)
def test_candidates_have_the_constants_of_the_row_and_include_it(name):
    table = EVERY[name]
    for key, row in table.rows.items():
        candidates = list(table.candidates(key))
        assert row.tile in candidates, key
        assert len(candidates) == len({str(one) for one in candidates}), key
        assert all(one.blocks.keys() == row.tile.blocks.keys() for one in candidates), key


@pytest.mark.parametrize("name", [name for name in EVERY if EVERY[name].alternatives])
def test_alternatives_are_candidates_that_the_row_is_not(name):
    table = EVERY[name]
    for key, tiles in table.alternatives.items():
        assert table.rows[key].tile not in tiles
        assert all(tile in table.candidates(key) for tile in tiles)


@pytest.mark.parametrize("name", EVERY)
def test_rows_agree_in_what_bits_depend_on(name):
    table = EVERY[name]
    constants = {}
    for key, row in table.rows.items():
        found = table.bits_of(row.tile)
        assert constants.setdefault(key[:2], found) == found, key


def test_a_tile_is_replaced_in_a_block_in_every_thread_and_lookups_are_collected():
    usual, other = Tile({"BLOCK": 1}, 4), Tile({"BLOCK": 2}, 8)
    table = TileTable(
        "none", "none", {(80,): predicted(usual, "2026-01-01"), (90,): measured(usual, "H200", "2026-01-01")}, candidates=list
    )
    TABLES.remove(table)
    with table.lookups() as seen, table.using({(90,): other}):
        assert table[(90,)] is other
        assert table[(80,)] is usual
        with ThreadPoolExecutor(1) as another:
            assert another.submit(lambda: table[(90,)]).result() is other
    assert seen == {(80,), (90,)}
    assert table[(90,)] is usual
    assert table.rows[(90,)].source == "measured, H200, 2026-01-01"
