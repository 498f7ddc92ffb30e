"""What `python -m bench tune` tries: the keys of the tables that the released shapes look up, their candidates, and the compilations.

A kernel is compiled once for all candidates and cases that need the same machine code. A candidate is dropped before anything is timed if
machine code that it alone needs spills, does not fit on the chip, or has another fault of the compile audit (`bench.audit.faults`).
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from granite_kernels import OPERATIONS
from granite_kernels.launch import Tile, compiled, recorded_launches
from granite_kernels.op import Case, Operation
from granite_kernels.testing import working_dtype
from granite_kernels.tiles import TABLES, Key, TileTable

from bench import audit
from bench.audit import Configuration
from bench.audit_table import Finding
from bench.worker import Outcome, Worker

__all__ = ["NO_TIME", "Choice", "Compilations", "Job", "Target", "case_named", "compile_job", "faults", "find", "ordered", "plan"]

# Operations by what a better tile is worth in a whole model, the most first. Those that are not listed come last.
ORDER = (
    *("block_attention", "depthwise_conv", "add_layer_norm", "silu_linear", "paged_attention", "window_attention", "decode_attention"),
    *("fused_linear", "add_rms_norm", "silu_product", "rotary_write", "split_linear", "lora_linear", "head_argmax"),
)
NO_TIME = "no time left"
# The most seconds of one compilation, which takes 2 to 8: whatever waits for it gets no other time.
LONGEST = 60


@dataclass(frozen=True)
class Target:
    """What is timed with each tile: a released case in one direction."""

    operation: str
    case: str
    direction: str


@dataclass
class Choice:
    """One key of a table, with the tiles to choose from.

    Args:
        tiles: the present one first.
        targets: the released cases that look up the key.
        needs: for each tile, the configurations that not all of the tiles need.
        common: the other configurations of the cases.
    """

    table: TileTable
    key: Key
    tiles: list[Tile]
    targets: list[Target]
    needs: list[set[Configuration]] = field(default_factory=list)
    common: set[Configuration] = field(default_factory=set)


@dataclass(frozen=True)
class Job:
    """A compilation, for another process: launch number `index` of a call with a changed table."""

    operation: str
    case: str
    dtype: torch.dtype
    architecture: int
    table: tuple[str, str]
    key: Key
    tile: Tile
    index: int
    on_gpu: bool


def ordered(operations: list[str]) -> list[str]:
    """The operations, the most important first."""
    return sorted(operations, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def plan(
    operations: list[str], dtype: torch.dtype, architecture: int, on_gpu: bool
) -> tuple[list[Choice], dict[Configuration, Job], list[tuple[TileTable, Key, str]]]:
    """The choices and the compilations that they need, in the order in which to make them; and keys without a choice, and why."""
    choices, jobs, without, inputs = [], {}, [], {}
    for name in ordered(operations):
        operation = OPERATIONS[name]
        inputs[name] = {case.name: case.inputs(dtype, "meta") for case in operation.cases if case.released}
        for choice in _choices(operation, inputs[name], architecture):
            if len(choice.tiles) == 1:
                without.append((choice.table, choice.key, "it has no other candidate"))
            elif not choice.targets:
                without.append((choice.table, choice.key, "only a forward in training looks it up, which is not timed"))
            else:
                choices.append(choice)
    # Backwards last: they take the longest, and only training has them.
    choices.sort(key=lambda choice: all(target.direction == "backward" for target in choice.targets))
    for choice in choices:
        _add_jobs(jobs, choice, inputs[choice.table.operation], dtype, architecture, on_gpu)
    return choices, jobs, without


def _choices(operation: Operation, inputs: dict[str, dict[str, Any]], architecture: int) -> list[Choice]:
    """The keys of the operation's tables that its cases look up."""
    found: dict[tuple[TileTable, Key], Choice] = {}
    tables = [table for table in TABLES if table.operation == operation.name]
    for case, given in inputs.items():
        with recorded_launches(architecture):
            for direction, call in audit.stages(operation, given):
                for table, key in _looked_up(tables, call):
                    choice = found.setdefault((table, key), Choice(table, key, _tiles(table, key), []))
                    if direction != "training":
                        choice.targets.append(Target(operation.name, case, direction))
    return sorted(found.values(), key=lambda choice: tables.index(choice.table))


def _looked_up(tables: list[TileTable], call: Callable[[], object]) -> Iterator[tuple[TileTable, Key]]:
    with ExitStack() as stack:
        seen = [(table, stack.enter_context(table.lookups())) for table in tables]
        call()
    for table, keys in seen:
        for key in sorted(keys, key=str):
            yield table, key


def _tiles(table: TileTable, key: Key) -> list[Tile]:
    present = table.rows[key].tile
    return [present, *(one for one in table.candidates(key) if one != present)]


def _add_jobs(
    jobs: dict[Configuration, Job],
    choice: Choice,
    inputs: dict[str, dict[str, Any]],
    dtype: torch.dtype,
    architecture: int,
    on_gpu: bool,
) -> None:
    """Add the compilations of a choice, and fill in what each tile needs."""
    operation, cases = OPERATIONS[choice.table.operation], dict.fromkeys(target.case for target in choice.targets)
    table = (choice.table.operation, choice.table.part)
    for tile in choice.tiles:
        needed = set()
        with choice.table.using({choice.key: tile}):
            for case in cases:
                for index, launch in enumerate(audit.launches(operation, inputs[case], architecture)):
                    computed = str(working_dtype(inputs[case])).removeprefix("torch.")
                    configuration = audit.configuration(operation.name, launch, computed, architecture, released=True)
                    needed.add(configuration)
                    job = Job(operation.name, case, dtype, architecture, table, choice.key, tile, index, on_gpu)
                    jobs.setdefault(configuration, job)
        choice.needs.append(needed)
    choice.common = set.intersection(*choice.needs)
    choice.needs = [needed - choice.common for needed in choice.needs]


def find(operation: str, part: str) -> TileTable:
    """The table of this name."""
    return next(table for table in TABLES if (table.operation, table.part) == (operation, part))


def case_named(operation: Operation, name: str) -> Case:
    return next(case for case in operation.cases if case.name == name)


class Compilations:
    """Compiles in other processes, in the order of the jobs, until the time `end`, while this one measures.

    A child that dies takes only its own job with it, and is replaced.
    """

    def __init__(self, jobs: dict[Configuration, Job], processes: int, end: float):
        self._end, self._workers, self._own = end, [], threading.local()
        self._pool = ThreadPoolExecutor(processes, initializer=self._start)
        self._futures = {configuration: self._pool.submit(self._compile, job) for configuration, job in jobs.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.__exit__(*error)

    def found(self, needed: Iterable[Configuration]) -> dict[Configuration, Finding | str]:
        """By configuration what its machine code has, or why there is none. Waits for these compilations."""
        wait([self._futures[one] for one in needed], max(self._end - time.monotonic(), 0))
        done = {one: self._futures[one] for one in needed}
        return {one: future.result() if future.done() else NO_TIME for one, future in done.items()}

    def _start(self) -> None:
        self._own.worker = Worker()
        self._workers.append(self._own.worker)

    def _compile(self, job: Job) -> Finding | str:
        left = self._end - time.monotonic()
        outcome = self._own.worker.call(compile_job, job, seconds=min(left, LONGEST)) if left > 0 else Outcome()
        return NO_TIME if time.monotonic() >= self._end else outcome.values.get("finding") or outcome.not_timed


def compile_job(job: Job) -> Outcome:
    """Compile one kernel and read its machine code. On a GPU, Triton keeps what it compiled on disk, where later calls find it."""
    operation = OPERATIONS[job.operation]
    try:
        with find(*job.table).using({job.key: job.tile}):
            inputs = case_named(operation, job.case).inputs(job.dtype, "meta")
            launch = audit.launches(operation, inputs, job.architecture)[job.index]
        computed = str(working_dtype(inputs)).removeprefix("torch.")
        configuration = audit.configuration(operation.name, launch, computed, job.architecture, released=True)
        return Outcome({"finding": audit.read(configuration, compiled(launch) if job.on_gpu else audit.compile_without_gpu(configuration))})
    except Exception as error:  # a candidate that does not compile is dropped, and the reason listed
        lines = str(error).strip().splitlines()
        return Outcome(not_timed=f"{type(error).__name__}: {lines[0] if lines else ''}"[:300])


def faults(choice: Choice, found: dict[Configuration, Finding | str]) -> list[str]:
    """For each tile, why it cannot be used; empty if it can."""
    return ["; ".join(dict.fromkeys(_faults(needed, found))) for needed in choice.needs]


def _faults(needed: set[Configuration], found: dict[Configuration, Finding | str]) -> Iterator[str]:
    for configuration in sorted(needed, key=lambda one: (one.name, one.tile)):
        finding = found[configuration]
        yield from (f"{configuration.name}: {fault}" for fault in ([finding] if isinstance(finding, str) else audit.faults(finding)))
