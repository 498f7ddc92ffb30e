"""The tuner: what it drops, refuses, chooses and lists, and the rows that it prints. Only the clock and the compiler are replaced."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import torch
from granite_kernels import OPERATIONS
from granite_kernels.launch import Tile
from granite_kernels.tiles import TABLES, TileTable, measured, predicted

from bench import graphs, kernels, tune, tune_plan, tune_table
from bench.audit_table import Finding
from bench.tune_choice import choose, row
from bench.tune_plan import Choice, Target
from bench.worker import Outcome
from tests.bench.test_kernels import FakeCapture
from tests.support.paths import ROOT

RUN = {"date": "2026-01-02", "machine": "NVIDIA H200", "versions": {"torch": "2", "triton": "3"}, "commit": "0123456789abcdef"}
SILU = tune_plan.find("silu_product", "forward")
PRESENT, WIDE, NARROW = (Tile({"BLOCK": block}, 4) for block in (1024, 2048, 512))


@pytest.fixture
def table():
    """Two keys of one width and one of another, whose tiles must agree in PIECE, and candidates for each."""
    present = predicted(Tile({"BLOCK": 1, "PIECE": 1}, 4), "2026-01-01")
    tiles = [Tile({"BLOCK": block, "PIECE": piece}, 4) for piece in (1, 2) for block in (1, 2)]
    made = TileTable(
        "none", "none", dict.fromkeys([(90, 2, 0), (90, 2, 1), (90, 4, 0)], present), candidates=lambda key: tiles, bits=("PIECE",)
    )
    TABLES.remove(made)
    return made


def timed(table, key, *ratios):
    return {key: list(zip(table.candidates(key), ratios, strict=True))}


def shapes(chosen):
    return {key: (tile.blocks["BLOCK"], tile.blocks["PIECE"]) for key, tile in chosen.items()}


def test_the_fastest_tile_is_chosen_unless_it_gains_no_more_than_noise(table):
    assert shapes(choose(table, timed(table, (90, 4, 0), 1.0, 0.9, 0.95, 0.97))) == {(90, 4, 0): (2, 1)}
    assert shapes(choose(table, timed(table, (90, 4, 0), 1.0, 0.985, 1.2, 1.1))) == {(90, 4, 0): (1, 1)}
    # The present tile could not be used: the first usable one has ratio 1.
    assert shapes(choose(table, {(90, 4, 0): [(Tile({"BLOCK": 2, "PIECE": 1}, 4), 1.0)]})) == {(90, 4, 0): (2, 1)}


def test_keys_of_a_width_agree_in_what_bits_depend_on(table):
    first, second = timed(table, (90, 2, 0), 1.0, 0.9, 0.5, 0.8), timed(table, (90, 2, 1), 1.0, 0.8, 1.1, 0.9)
    # Each by itself would take another PIECE; √(0.5 · 0.9) is less than √(0.9 · 0.8).
    assert shapes(choose(table, first | second)) == {(90, 2, 0): (1, 2), (90, 2, 1): (2, 2)}
    # The best of all ratios does not decide: √(0.5 · 0.95) is more than 0.6.
    first_again, second_again = timed(table, (90, 2, 0), 1.0, 0.6, 0.5, 0.8), timed(table, (90, 2, 1), 1.0, 0.6, 0.95, 1.2)
    assert shapes(choose(table, first_again | second_again)) == {(90, 2, 0): (2, 1), (90, 2, 1): (2, 1)}
    # A key that no released case looks up follows, and is otherwise as before. One of another width does not.
    assert shapes(choose(table, first)) == {(90, 2, 0): (1, 2), (90, 2, 1): (1, 2)}
    # A gain by another PIECE that is only noise changes nothing.
    assert shapes(choose(table, timed(table, (90, 2, 0), 1.0, 0.9, 0.89, 1.0))) == {(90, 2, 0): (2, 1)}


def test_constants_do_not_change_for_keys_that_were_not_timed_or_have_no_such_candidate(table):
    first = timed(table, (90, 2, 0), 1.0, 0.9, 0.5, 0.8)
    assert shapes(choose(table, first, unfinished=[(90, 2, 1)])) == {(90, 2, 0): (2, 1)}
    assert shapes(choose(table, first, unfinished=[(90, 4, 0)]))[90, 2, 0] == (1, 2)
    every = table.candidates((90, 2, 0))
    table.candidates = lambda key: every[:2] if key == (90, 2, 1) else every
    assert shapes(choose(table, first)) == {(90, 2, 0): (2, 1)}


class Code(NamedTuple):
    """Stands for a configuration: the code that one tile needs."""

    name: str
    tile: str


def finding(**changes) -> Finding:
    fields = {"operation": "silu_product", "kernel": "k", "dtype": "bfloat16", "architecture": 90, "tile": "t", "released": True}
    return Finding(**fields, registers=9, spilled=0, shared=0, products={}, plain_products=0, loads={"128": 2}, **changes)


def choice(*tiles: Tile, cases=("one", "two"), table=SILU, key=(90,)) -> Choice:
    targets = [Target(table.operation, case, "forward") for case in cases]
    return Choice(table, key, list(tiles), targets, [{Code("k", str(tile))} for tile in tiles])


def tuned(tmp_path, choices, measure, *, end=float("inf"), found=None, stand_in=False):
    """The result and its file after `tune.tune`."""
    result = {"run": RUN, "dtype": "bfloat16", "timing": "stand-in" if stand_in else "graph", "without_choice": [], "keys": []}

    def write(now):
        (tmp_path / "tune.json").write_text(json.dumps(now))
        return tmp_path / "tune.json"

    def compiled(needed):
        return {one: (found or {}).get(one.tile, finding()) for one in needed}

    assert tune.tune(result, choices, compiled, measure, torch.float32, end, write) == tmp_path / "tune.json"
    assert json.loads((tmp_path / "tune.json").read_text())["rows"] == result["rows"]
    return result


def clock(seconds):
    """Measures by tile, or by tile and case."""

    def measure(target, choice, tile, dtype, limit):
        found = seconds[tile.blocks["BLOCK"]]
        found = found[target.case] if isinstance(found, dict) else found
        return found if isinstance(found, Outcome) else Outcome({"median": found})

    return measure


def rows(result, **names):
    """The printed rows, evaluated."""
    return eval("{" + result["rows"].split("```python\n")[1].split("```")[0] + "}", {"Tile": Tile, **names})


def test_printed_rows_are_python_for_the_chosen_tiles(tmp_path):
    norm = tune_plan.find("add_rms_norm", "warps")
    other = choice(Tile({}, 8), Tile({}, 4, 2), table=norm, key=(90, 2, 2048), cases=("a",))
    first = choice(PRESENT, WIDE, NARROW)
    times = clock({1024: {"one": 4e-6, "two": 1e-6}, 2048: {"one": 1e-6, "two": 1.4e-6}, 512: {"one": 4e-6, "two": 0.9e-6}})

    def measure(target, choice, tile, *rest):
        return times(target, choice, tile, *rest) if tile.blocks else Outcome({"median": 1e-6})

    result = tuned(tmp_path, [first, other], measure)
    # √(¼ · 1.4) of the present tile's time, although it is slower in one case.
    assert [one["ratio"] for one in result["keys"]] == [pytest.approx((1.4 / 4) ** 0.5), 1.0]
    assert rows(result, measured=measured) == {
        (90,): measured(WIDE, "H200", "2026-01-02"),
        (90, 2, 2048): measured(Tile({}, 8), "H200", "2026-01-02"),
    }
    assert "| silu_product, forward | (90,) | two, forward | 1.00 | 1.40 | 1.400 |" in result["rows"]
    assert row((90, "few"), Tile({"A": 1}, 4, 3), "predicted", "x") == '(90, "few"): predicted(Tile({"A": 1}, 4, 3), "x"),'


def test_rows_of_stand_ins_and_of_other_chips_cannot_be_pasted(tmp_path):
    result = tuned(tmp_path, [choice(PRESENT, WIDE)], tune.stand_in, stand_in=True)
    assert "stand-ins" in result["rows"] and "must not be used" in result["rows"] and "measured(" not in result["rows"]
    with pytest.raises(NameError, match="stand_in"):
        rows(result, measured=measured, predicted=predicted)
    assert "timed(" in tune_table.markdown(result | {"timing": "graph", "run": RUN | {"machine": "NVIDIA GH200 480GB"}})


def test_unusable_tiles_are_dropped_with_the_reason_and_not_timed(tmp_path):
    broken = Tile({"BLOCK": 7}, 4)
    found = {str(NARROW): dataclasses.replace(finding(), spilled=16), str(broken): "CompilationError: no"}
    result = tuned(tmp_path, [choice(PRESENT, NARROW, broken, WIDE)], clock({1024: 2e-6, 2048: 1e-6}), found=found)
    (entry,) = result["keys"]
    assert [one["dropped"] for one in entry["tiles"]] == ["", "k: spills 16 bytes a thread", "k: CompilationError: no", ""]
    assert entry["tiles"][1]["findings"] == [{"kernel": "k", "tile": "t", "registers": 9, "spilled": 16, "shared": 0}]
    assert '- silu_product, forward, (90,) without Tile({"BLOCK": 512}, 4): k: spills 16 bytes a thread.' in result["rows"]
    assert rows(result, measured=measured)[90,].tile == WIDE


def test_a_present_tile_that_spills_is_timed_for_comparison_and_not_chosen(tmp_path):
    found = {str(PRESENT): dataclasses.replace(finding(), spilled=16)}
    result = tuned(tmp_path, [choice(PRESENT, WIDE)], clock({1024: 2e-6, 2048: 2.5e-6}), found=found)
    assert rows(result, measured=measured)[90,].tile == WIDE and "1.250 of its time" in result["rows"]
    found = {str(PRESENT): "CompilationError: no"}
    result = tuned(tmp_path, [choice(PRESENT, WIDE, NARROW)], clock({2048: 2e-6, 512: 1e-6}), found=found)
    assert rows(result, measured=measured)[90,].tile == NARROW and "which could not be timed" in result["rows"]
    result = tuned(tmp_path, [choice(PRESENT, WIDE)], clock({}), found=found)
    assert result["keys"][0]["not_tried"] == "there is nothing to choose from"


def test_wrong_failing_and_hopeless_tiles_are_not_chosen(tmp_path):
    outcomes = {1024: 3e-6, 2048: {"one": 1e-6, "two": Outcome({"wrong": "RMS error"})}, 512: {"one": 5e-6}, 7: Outcome(not_timed="died")}
    result = tuned(tmp_path, [choice(PRESENT, WIDE, NARROW, Tile({"BLOCK": 7}, 4))], clock(outcomes))
    dropped = [one["dropped"] for one in result["keys"][0]["tiles"]]
    assert dropped == ["", "two, forward: RMS error", "one, forward: 1.67 times as long as the first tile", "one, forward: died"]
    assert rows(result, measured=measured)[90,].tile == PRESENT


def test_a_case_that_cannot_be_timed_counts_for_no_tile(tmp_path):
    too_quick = Outcome({"no_times": "HostBoundError: too quick"})
    result = tuned(tmp_path, [choice(PRESENT, WIDE)], clock({1024: {"one": 1e-6, "two": 2e-6}, 2048: {"one": too_quick, "two": 1e-6}}))
    assert rows(result, measured=measured)[90,].tile == WIDE
    assert result["keys"][0]["ratio"] == 0.5
    assert "without one, forward: HostBoundError: too quick" in result["rows"]


def test_what_is_not_reached_in_time_is_listed_and_keeps_its_tile(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])

    def measure(target, choice, tile, dtype, limit):
        assert limit <= 5.5 - now[0]
        now[0] += 1
        return Outcome({"median": 1e-6 if tile == WIDE else 2e-6})

    norm = tune_plan.find("add_rms_norm", "warps")
    late = [
        choice(Tile({}, 8), Tile({}, 16), table=norm, key=(90, 2, 2048)),
        choice(Tile({}, 2), Tile({}, 4), table=norm, key=(90, 2, 4096)),
    ]
    uncompiled = {str(Tile({}, 2)): "no time left", str(Tile({}, 4)): "no time left"}
    result = tuned(tmp_path, [choice(PRESENT, WIDE), *late], measure, end=5.5, found=uncompiled)
    assert [one["not_tried"] for one in result["keys"]] == ["", "no time left", "no time left"]
    assert rows(result, measured=measured) == {(90,): measured(WIDE, "H200", "2026-01-02")}
    assert len(result["keys"][1]["tiles"][0]["seconds"]) == 1, "what was measured is kept"
    assert result["rows"].endswith("- add_rms_norm, warps, (90, 2, 4096) keeps its tile: no time left.")


@pytest.fixture
def on_cpu(monkeypatch):
    """Times tiles of the smallest case in the interpreter, whose tiles are those of 80."""
    small = next(case for case in OPERATIONS["silu_product"].cases if not case.released)
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(graphs, "CapturedCalls", FakeCapture)
    monkeypatch.setattr(graphs, "side_stream", contextlib.nullcontext)
    monkeypatch.setattr(graphs, "l2_bytes", lambda: 1000)
    monkeypatch.setattr(FakeCapture, "made", [])
    tune._prepared.cache_clear()
    yield Target("silu_product", small.name, "forward")
    tune._prepared.cache_clear()


def time_tile(target, tile):
    return tune.time_tile(target, ("silu_product", "forward"), (80,), tile, torch.float32)


def test_the_tile_is_used_and_a_wrong_one_is_refused(on_cpu, monkeypatch):
    operation, used = OPERATIONS["silu_product"], []

    def call(x, impl):
        used.append(SILU[(80,)])
        return operation.call(x, impl=impl) * (1.01 if SILU[(80,)] == WIDE else 1)

    monkeypatch.setitem(OPERATIONS, "silu_product", dataclasses.replace(operation, call=call))
    outcome = time_tile(on_cpu, NARROW)
    assert outcome.values["median"] == pytest.approx(1e-3) and used and all(one == NARROW for one in used)
    made = len(FakeCapture.made)
    assert "RMS error" in time_tile(on_cpu, WIDE).values["wrong"] and len(FakeCapture.made) == made


def test_a_graph_that_is_too_quick_is_no_fault_of_the_tile(on_cpu, monkeypatch):
    monkeypatch.setattr(FakeCapture, "launch", 1.0)
    assert time_tile(on_cpu, NARROW).values["no_times"].startswith("HostBoundError")


class WorkerThatMaySleep:
    """In the place of `Worker`: a job is the seconds that it takes."""

    def call(self, function: object, job: float, *, seconds: float) -> Outcome:
        time.sleep(min(job, seconds))
        return Outcome(not_timed=f"stopped after {seconds:.1f} s") if job > seconds else Outcome({"finding": "done"})

    def __exit__(self, *_: object) -> None:
        pass


def test_a_compilation_that_hangs_is_stopped_and_the_others_are_not_late(monkeypatch):
    monkeypatch.setattr(tune_plan, "Worker", WorkerThatMaySleep)
    monkeypatch.setattr(tune_plan, "LONGEST", 0.1)
    with tune_plan.Compilations({"hangs": 9, "quick": 0}, 1, time.monotonic() + 2) as compilations:
        assert compilations.found(["hangs", "quick"]) == {"hangs": "stopped after 0.1 s", "quick": "done"}


def test_interpreted_kernels_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="Run the tuner without it"):
        tune.run(operations=None, dtype=torch.bfloat16, seconds=1, out=tmp_path)


PROGRAM = """
import sys
import time
from pathlib import Path

import torch
from granite_kernels.launch import Tile
from bench import tune, tune_plan

table = tune_plan.find("silu_product", "forward")
table.candidates = lambda key: [Tile({"BLOCK": 1024}, 4), Tile({"BLOCK": 8192}, 1)]
choices, jobs, without = tune_plan.plan(["silu_product"], torch.bfloat16, 90, False)
(choice,) = choices
assert without == [] and choice.key == (90,) and choice.tiles[0] == table.rows[90,].tile
assert {target.direction for target in choice.targets} == {"forward"} and len(choice.targets) == 6
found = {configuration: tune_plan.compile_job(job).values["finding"] for configuration, job in jobs.items()}
usable, spilling = tune_plan.faults(choice, found)
assert usable == "" and "spills" in spilling, spilling
choices, jobs, without = tune_plan.plan(["lora_linear"], torch.bfloat16, 90, False)
print({(one.table.part, target.direction) for one in choices for target in one.targets})
try:
    tune.run(operations=["no_such"], dtype=torch.bfloat16, seconds=1, out=None)
except SystemExit as error:
    print(error)
out = Path(sys.argv[1])
for _ in range(2):  # without a table
    print(tune.run(operations=["begin_step"], dtype=torch.bfloat16, seconds=1, out=out).splitlines()[-1])
try:
    tune.run(operations=["begin_step"], dtype=torch.bfloat16, seconds=1, out=next(out.iterdir()))
except SystemExit as error:
    print(error)
"""


def test_a_spilling_candidate_is_found_keys_are_looked_up_and_no_file_is_replaced(tmp_path):
    """In a new process, because in this one kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    parts, error, *files, no_folder = (line for line in done.stdout.splitlines() if not line.startswith("0 keys"))
    assert eval(parts) == {
        *(("few rows", "forward"), ("rows", "forward"), ("x·Aᵀ", "forward"), ("many rows", "forward")),
        *(("x·Aᵀ", "backward"), ("many rows", "backward")),
    }
    assert error.startswith("there is no operation no_such. Choose from ")
    assert len(set(files)) == 2 and {str(one) for one in tmp_path.iterdir()} == set(files)
    assert no_folder.endswith("is to be a folder for the result file: File exists. Choose another.")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_times_every_tile(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_processes", lambda: 2)
    text = tune.run(operations=["silu_product"], dtype=torch.bfloat16, seconds=200, out=tmp_path)
    (file,) = tmp_path.glob("tune-*.json")
    (entry,) = json.loads(file.read_text())["keys"]
    assert entry["not_tried"] == "" and entry["cases_not_timed"] == {}
    for one in entry["tiles"]:
        assert one["dropped"] or len(one["seconds"]) == 6
        assert all(0 < seconds["median"] < 1e-2 for seconds in one["seconds"].values())
    assert entry["tiles"][0]["dropped"] == "" and 0 < entry["ratio"] <= 1 and "stand_in(" not in text
