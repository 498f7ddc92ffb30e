"""Chooses the tiles of every kernel on this GPU: `python -m bench tune OUT` writes a result file and prints the rows to paste.

All candidates of all keys that the released shapes look up are compiled in many processes (`bench.tune_plan`). Those of a key that has all
of its code are timed meanwhile, in one process: on the released cases of the key, in CUDA graphs with a cold L2 cache, after the results
were compared with their truth. The present tile comes first, so that all times are ratios in one run. Each key gets the tile with the
smallest geometric mean of these ratios.

Without a GPU everything happens as with one, except that the times are made up and nothing is compared. The file and the rows say so.
"""

import functools
import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from granite_kernels import OPERATIONS
from granite_kernels.launch import Tile, architecture
from granite_kernels.op import Draw
from granite_kernels.testing import assert_as_expected, expectations
from granite_kernels.tiles import Key

from bench import graphs, kernels, results, tune_plan, tune_table
from bench.audit_table import Finding
from bench.graphs import HostBoundError, HostWaitError
from bench.tune_choice import geometric_mean
from bench.tune_plan import Choice, Target, case_named, find
from bench.worker import Outcome, Worker

__all__ = ["run"]

# The device and architecture whose code is compiled without a GPU.
WITHOUT_GPU = 90
# A tile is not timed on further cases if it takes this many times as long as the present one on one of them.
HOPELESS = 1.5
# The most seconds of one timing. The first one in a process starts CUDA and computes the truth.
LONGEST = 60
REPLAYS = 10
# What the result file has of a compiled kernel.
_FOUND = ("kernel", "tile", "registers", "spilled", "shared")
# The copies of a kernel's inputs hold this part of what `bench.kernels` needs for library calls, which is 8 times the cache.
COLD, MOST_COPIES = 0.25, 200


@dataclass
class Trial:
    """A tile of a key: what was found out about it.

    Attributes:
        findings: of the configurations that only this tile needs.
        seconds: the median by case and direction, such as "4.1-2b, 1 row, forward", with percentiles.
        dropped: why it cannot be chosen, if so.
        baseline: it is timed even if it has been dropped, because the others' times are ratios to its.
    """

    tile: Tile
    findings: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    dropped: str = ""
    baseline: bool = False


def run(*, operations: list[str] | None, dtype: torch.dtype, seconds: float, out: Path) -> str:
    """Tune the tables of these operations, write the result file after each key, and return what to paste, as Markdown.

    Raises:
        SystemExit: Triton interprets kernels in this process, there is no operation of such a name, or `out` cannot be a folder.
    """
    end = time.monotonic() + seconds
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled. Run the tuner without it.")
    if unknown := set(operations or []) - OPERATIONS.keys():
        raise SystemExit(f"there is no operation {', '.join(sorted(unknown))}. Choose from {', '.join(OPERATIONS)}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{out} is to be a folder for the result file: {error.strerror}. Choose another.") from error
    on_gpu = torch.cuda.is_available()
    chip = architecture(torch.device("cuda")) if on_gpu else WITHOUT_GPU
    choices, jobs, without = tune_plan.plan(operations or list(OPERATIONS), dtype, chip, on_gpu)
    print(f"{len(choices)} keys, {sum(len(one.tiles) for one in choices)} tiles, {len(jobs)} compilations", flush=True)
    result = {
        "kind": "tune",
        "run": results.describe_run() | ({"machine": torch.cuda.get_device_name()} if on_gpu else {}),
        "architecture": chip,
        "dtype": str(dtype).removeprefix("torch."),
        "timing": "graph" if on_gpu else "stand-in",
        "method": _method(on_gpu),
        "seconds_allowed": seconds,
        "compilations": len(jobs),
        "without_choice": [{"operation": table.operation, "part": table.part, "key": key, "reason": why} for table, key, why in without],
        "keys": [],
    }
    write = functools.partial(results.write, out, _unused_kind(out, result["run"]))
    with tune_plan.Compilations(jobs, _processes(), end) as compilations, Worker() as worker:
        measure = functools.partial(_in_worker, worker) if on_gpu else stand_in
        file = tune(result, choices, compilations.found, measure, dtype, end, write)
    return f"{result['rows']}\n\n{file}"


def _unused_kind(out: Path, run: dict[str, Any]) -> str:
    """ "tune", or "tune-2" and so on if there is such a file: a run for another dtype or operation must not replace it."""
    kinds = itertools.chain(["tune"], (f"tune-{number}" for number in itertools.count(2)))
    return next(kind for kind in kinds if not results.file_of(out, kind, run).exists())


def _processes() -> int:
    """Compilations at once. Of many cores some stay free for the process that measures."""
    cores = os.cpu_count() or 1
    return max(cores - 3, min(cores, 2))


def _method(on_gpu: bool) -> list[str]:
    if not on_gpu:
        return ["Stand-ins for times, made up without a GPU: they say nothing about speed, and no result was compared with its truth"]
    return [
        f"Times are medians of {REPLAYS} replays of a CUDA graph of at least {graphs.LEAST_CALLS} calls, which cycle through copies of "
        f"their inputs that together hold {graphs.COLD * COLD:g} times the L2 cache, but at most {MOST_COPIES}",
        "The present tile of each key was timed first on each case. A ratio is the geometric mean of time / its time over the cases",
        f"A tile that took {HOPELESS} times as long on one case was not timed on the next ones",
    ]


def _in_worker(worker: Worker, target: Target, choice: Choice, tile: Tile, dtype: torch.dtype, seconds: float) -> Outcome:
    table = (choice.table.operation, choice.table.part)
    return worker.call(time_tile, target, table, choice.key, tile, dtype, seconds=seconds)


def tune(
    result: dict[str, Any],
    choices: list[Choice],
    found: Callable[[Iterable[Any]], dict[Any, Finding | str]],
    measure: Callable[..., Outcome],
    dtype: torch.dtype,
    end: float,
    write: Callable[[dict[str, Any]], Path],
) -> Path:
    """Time and choose, key by key; writes the result after each.

    Args:
        found: `found(configurations)` returns what was compiled, by configuration.
        measure: `measure(target, choice, tile, dtype, seconds)` times a tile within so many seconds.
    """
    ratios: dict[tuple[str, str], dict[Key, list[tuple[Tile, float]]]] = {}
    unfinished = {(choice.table, choice.key) for choice in choices}
    file = None
    for choice in choices:
        began = time.monotonic()
        trials, skipped = _trials(choice, found(set.union(choice.common, *choice.needs))), {}
        compiled = time.monotonic()
        not_tried = _time(choice, trials, skipped, measure, dtype, end)
        name = (choice.table.operation, choice.table.part)
        if not not_tried:
            ratios.setdefault(name, {})[choice.key] = _ratios(choice, trials)
            unfinished.discard((choice.table, choice.key))
        seconds = {"seconds_waiting": compiled - began, "seconds_timing": time.monotonic() - compiled}
        result["keys"].append(_entry(choice, trials) | {"not_tried": not_tried, "cases_not_timed": skipped} | seconds)
        tune_table.add_choices(result, ratios, {(table.operation, table.part, key) for table, key in unfinished})
        file = write(result)
        print(tune_table.line(result["keys"][-1]), flush=True)
    result.setdefault("rows", "No key has a choice.")
    return file or write(result)


def _trials(choice: Choice, found: dict[Any, Finding | str]) -> list[Trial]:
    trials = []
    for tile, needed, fault in zip(choice.tiles, choice.needs, tune_plan.faults(choice, found), strict=True):
        findings = [{name: getattr(found[one], name) for name in _FOUND} for one in needed if isinstance(found[one], Finding)]
        trials.append(Trial(tile, sorted(findings, key=str), dropped=fault))
    # A present tile that spills can still run, and is what the others have to be faster than.
    trials[0].baseline = len(trials[0].findings) == len(choice.needs[0])
    return trials


def _timed(trials: list[Trial]) -> list[Trial]:
    return [one for one in trials if one.baseline or not one.dropped]


def _usable(trials: list[Trial]) -> list[Trial]:
    return [one for one in trials if not one.dropped]


def _time(
    choice: Choice, trials: list[Trial], skipped: dict[str, str], measure: Callable[..., Outcome], dtype: torch.dtype, end: float
) -> str:
    """Time the usable tiles on every case, drop those that fail, and list skipped cases. Returns why not all was timed, if so."""
    if time.monotonic() >= end:
        return tune_plan.NO_TIME
    if len(_timed(trials)) < 2 or not _usable(trials):
        return "there is nothing to choose from"
    for target in choice.targets:
        for trial in _timed(trials):
            left = end - time.monotonic()
            outcome = measure(target, choice, trial.tile, dtype, min(left, LONGEST)) if left > 0 else Outcome()
            if time.monotonic() >= end:  # whatever it says, it may have been stopped
                return tune_plan.NO_TIME
            if why := outcome.values.get("no_times", ""):
                skipped[_name(target)] = why
                break
            _record(trials, trial, _name(target), outcome)
        if _name(target) in skipped:
            for trial in trials:
                trial.seconds.pop(_name(target), None)
    return "" if any(one.seconds for one in _usable(trials)) else "no tile could be timed"


def _record(trials: list[Trial], trial: Trial, case: str, outcome: Outcome) -> None:
    if wrong := outcome.not_timed or outcome.values.get("wrong"):
        trial.dropped, trial.baseline = trial.dropped or f"{case}: {wrong}", False
        return
    trial.seconds[case] = outcome.values
    first = next(one.seconds[case]["median"] for one in trials if case in one.seconds)
    if outcome.values["median"] > HOPELESS * first:
        trial.dropped = f"{case}: {outcome.values['median'] / first:.2f} times as long as the first tile"


def _name(target: Target) -> str:
    return f"{target.case}, {target.direction}"


def _ratios(choice: Choice, trials: list[Trial]) -> list[tuple[Tile, float]]:
    """Each usable tile's time as a multiple of the present tile's, or of the first usable one's if that has no times."""
    usable = _usable(trials)
    first = (trials[0] if trials[0].baseline else usable[0]).seconds
    return [(one.tile, geometric_mean(one.seconds[name]["median"] / first[name]["median"] for name in first)) for one in usable]


def _entry(choice: Choice, trials: list[Trial]) -> dict[str, Any]:
    """A key in the result file."""
    table = {"operation": choice.table.operation, "part": choice.table.part, "key": list(choice.key)}
    return table | {"source": choice.table.rows[choice.key].source, "tiles": [asdict(one) for one in trials]}


def time_tile(target: Target, table: tuple[str, str], key: Key, tile: Tile, dtype: torch.dtype) -> Outcome:
    """Time a case with a tile on a GPU, after a comparison of its results with their truth. Runs in the worker's process."""
    with find(*table).using({key: tile}):
        outcome = kernels.reported(_time_tile, target, dtype)
    if outcome.not_timed.startswith((HostBoundError.__name__, HostWaitError.__name__)):
        return Outcome({"no_times": outcome.not_timed})  # no fault of the tile, and the fastest may be the first to have it
    return outcome


def _time_tile(target: Target, dtype: torch.dtype) -> Outcome:
    operation = OPERATIONS[target.operation]
    try:
        copies, expected = _prepared(target.operation, target.case, dtype)
    except torch.OutOfMemoryError as error:
        return Outcome({"no_times": f"OutOfMemoryError: {str(error).splitlines()[0]}"})
    try:
        assert_as_expected(operation, copies[0], expected, impl="triton")
    except AssertionError as error:
        return Outcome({"wrong": str(error)})
    return kernels.time_copies(operation, copies, target.direction, "triton", REPLAYS)


# All tiles of a case are timed one after another, so its inputs and their truth are made once.
@functools.lru_cache(maxsize=1)
def _prepared(name: str, case_name: str, dtype: torch.dtype) -> tuple[list[dict[str, Any]], Any]:
    operation = OPERATIONS[name]
    case = case_named(operation, case_name)
    draw = DrawOnDevice(torch.Generator().manual_seed(0), dtype, torch.device(kernels.DEVICE))
    inputs = case.make(draw, **case.shape)
    return kernels.cold_copies(operation, case, inputs, dtype, int(COLD * graphs.l2_bytes()), MOST_COPIES), expectations(operation, inputs)


class DrawOnDevice(Draw):
    """Draws the large tensors on a GPU, which a CPU would take seconds for."""

    def normal(self, *size: int, std: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self.device.type != "cuda":
            return super().normal(*size, std=std, dtype=dtype)
        return (torch.randn(size, device=self.device) * std).to(dtype or self.dtype)


def stand_in(target: Target, choice: Choice, tile: Tile, dtype: torch.dtype, seconds: float) -> Outcome:
    """A made-up time, the same in every run."""
    number = zlib.crc32(repr((target, choice.table.part, choice.key, tile, dtype)).encode()) / 2**32
    return Outcome({"median": 1e-5 * (1 + 0.4 * number)})
