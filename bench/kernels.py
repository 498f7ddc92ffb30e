"""Times of every operation's kernels on a GPU, with their lower bound, the reference, torch.compile of it, and the nearest library call.

All times are of calls in a CUDA graph with a cold L2 cache (`bench.graphs`). A case is timed only after its result and gradients were
compared with their truth (`granite_kernels.testing`), and the results inside the graph must equal those outside bit for bit.
"""

import concurrent.futures
import contextlib
import copy
import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from granite_kernels import OPERATIONS
from granite_kernels.op import Case, Cost, Operation, Results, results_of
from granite_kernels.testing import assert_operation_accurate

from bench import graphs, kernels_table, results
from bench.graphs import Call, HostBoundError, HostWaitError
from bench.worker import Outcome, Worker

__all__ = ["cold_copies", "predict", "reported", "run", "time_copies"]

PREDICTIONS = Path(__file__).parents[1] / "kernels/AUDIT.md"
DEVICE = "cuda"
# Ceilings for predictions: an H200's copy rate and bfloat16 matmul rate. They are given, not measured by this program.
PREDICTED = {"machine": "NVIDIA H200", "bytes_a_second": 4.3e12, "flops_a_second": 790e12}
METHOD = [
    f"All times and the two ceilings were measured in CUDA graphs of at least {graphs.LEAST_CALLS} calls, which cycle through copies of "
    f"their inputs that together hold {graphs.COLD} times the L2 cache",
    f"At most {graphs.MOST_COPIES} copies, or {graphs.MOST_HELD / 1e9:.0f} GB of them: so calls of a few kilobytes, and lookups in a large "
    "table, find their inputs in the cache, as in a model, where the launch before has just written them",
    "A backward is torch.autograd.grad alone, after a forward outside the graph",
]
_INTEGERS = {2: torch.int16, 4: torch.int32}  # as NaN, which may stay in a cache, equals nothing
NOT_COMPILED = "not tried: torch.compile does not remove a host wait from the reference"


def run(*, operations: list[str] | None, dtype: torch.dtype, compiled: bool, out: Path) -> str:
    """Measure all released shapes, write the result file after each measurement, and return the table.

    Args:
        compiled: also time torch.compile of the references, which takes seconds per shape to compile.
    """
    with graphs.side_stream():
        rates = {"bytes_a_second": graphs.copy_rate(), "flops_a_second": graphs.matmul_rate(dtype)}
    torch.cuda.empty_cache()
    result = {
        "kind": "kernels",
        "run": results.describe_run() | {"machine": torch.cuda.get_device_name()},
        "dtype": str(dtype).removeprefix("torch."),
        "timing": "graph",
        "method": METHOD,
        "rates": rates,
        "measurements": [],
    }
    file, chosen = None, operations or list(OPERATIONS)
    compile_kernels(chosen, dtype)
    with Worker() as worker:
        for _ in measure(result["measurements"], chosen, dtype, compiled, rates, worker.call):
            file = results.write(out, "kernels", result)
    return f"{kernels_table.table(result)}\n\n{file}"


def compile_kernels(operations: list[str], dtype: torch.dtype) -> None:
    """Compile the kernels of all released shapes, in as many processes as there are cores: one compilation holds Python's lock.

    Triton keeps the result on disk. One that fails is reported where the shape is timed.
    """
    cases = [(name, case.name) for name in operations for case in OPERATIONS[name].cases if case.released]
    # Spawned: a forked child cannot use CUDA if its parent has.
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*cases, strict=True), [dtype] * len(cases)))


def _compile(name: str, case_name: str, dtype: torch.dtype) -> None:
    from granite_kernels.launch import architecture, precompile

    from bench.audit import launches  # needs Triton

    operation, device = OPERATIONS[name], torch.device(DEVICE)
    with contextlib.suppress(Exception):
        inputs = _case(operation, case_name).inputs(dtype, "meta")
        precompile(launches(operation, inputs, architecture(device)), device)


def measure(
    measurements: list[dict[str, Any]],
    operations: list[str],
    dtype: torch.dtype,
    compiled: bool,
    rates: dict[str, float],
    call: Callable[..., Outcome],
) -> Iterator[None]:
    """Fill `measurements` with one entry per shape and direction; yields after every change.

    Args:
        call: `call(function, *arguments)` returns the function's outcome, from a process that no earlier failure has made unusable.
    """
    entries: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, case, direction, variant in plan(operations, compiled):
        key = (name, case.name, direction)
        if key not in entries:
            entries[key] = new_entry(OPERATIONS[name], case, dtype, direction, rates)
            measurements.append(entries[key])
        entry = entries[key]
        if "wrong" in entry:
            continue
        if variant == "compiled" and _reference_waits(entries[name, case.name, "forward"]):
            outcome = Outcome(not_timed=NOT_COMPILED)
        else:
            outcome = call(time_variant, name, case.name, direction, variant, dtype)
        _record(entry, variant, outcome)
        yield


def _reference_waits(forward: dict[str, Any]) -> bool:
    return forward["not_timed"].get("torch", "").startswith(HostWaitError.__name__)


def _record(entry: dict[str, Any], variant: str, outcome: Outcome) -> None:
    if outcome.not_timed:
        entry["not_timed"][variant] = outcome.not_timed
    elif "wrong" in outcome.values:
        entry |= outcome.values | {"seconds": {}}
    else:
        entry["seconds"][variant] = outcome.values


def plan(operations: list[str], compiled: bool) -> Iterator[tuple[str, Case, str, str]]:
    """Operation, case, direction and variant of every measurement, the most informative first: the kernels of all shapes and the library
    calls, then the references, then the slow compilations."""
    cases = [(OPERATIONS[name], case) for name in operations for case in OPERATIONS[name].cases if case.released]
    for variants in (("triton", "library"), ("torch",), *([("compiled",)] if compiled else [])):
        for operation, case in cases:
            for variant in variants:
                if variant != "library" or operation.library is not None:
                    yield operation.name, case, "forward", variant
                if variant != "library" and operation.differentiable:
                    yield operation.name, case, "backward", variant


def new_entry(operation: Operation, case: Case, dtype: torch.dtype, direction: str, rates: dict[str, float]) -> dict[str, Any]:
    """An entry without times. A forward has its cost and lower bound; no operation declares its backward's cost."""
    entry = {"operation": operation.name, "case": case.name, "direction": direction, "seconds": {}, "not_timed": {}}
    if direction == "forward":
        cost = operation.cost(**case.sizes(dtype))
        entry |= {"flops": cost.flops, "bytes": cost.bytes, "bound_seconds": bound_seconds(cost, **rates)}
    return entry


def bound_seconds(cost: Cost, bytes_a_second: float, flops_a_second: float) -> float:
    """The shortest possible time of a call at these rates."""
    return max(cost.bytes / bytes_a_second, cost.flops / flops_a_second)


def time_variant(name: str, case_name: str, direction: str, variant: str, dtype: torch.dtype) -> Outcome:
    """Time one variant of one call. Runs in the worker's process."""
    return reported(_time_variant, OPERATIONS[name], case_name, direction, variant, dtype)


def reported(measure: Callable[..., Outcome], *arguments: Any) -> Outcome:
    """The outcome of a measurement on a side stream, or the reason why nothing was timed."""
    try:
        with graphs.side_stream():
            return measure(*arguments)
    except (HostWaitError, HostBoundError) as error:
        return Outcome(not_timed=f"{type(error).__name__}: {error}")
    except Exception as error:  # reported in place of a time; a new process makes the remaining measurements
        return Outcome(not_timed=_reason(error), unusable=True)


def _reason(error: BaseException) -> str:
    """The error and its causes, the first cause first: PyTorch reports the failed end of a capture after the error that broke it."""
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
    return text if error.__context__ is None else f"{_reason(error.__context__)}; then {text}"


def _time_variant(operation: Operation, case_name: str, direction: str, variant: str, dtype: torch.dtype) -> Outcome:
    case = _case(operation, case_name)
    if variant == "triton" and (fault := _fault(operation.name, case_name, dtype)):
        return Outcome({"wrong": fault})  # a wrong kernel is not timed
    copies = cold_copies(operation, case, _inputs(operation.name, case_name, dtype), dtype, graphs.l2_bytes())
    return time_copies(operation, copies, direction, variant)


def cold_copies(
    operation: Operation, case: Case, inputs: dict[str, Any], dtype: torch.dtype, l2: int, most: int = graphs.MOST_COPIES
) -> list[dict[str, Any]]:
    """As many copies of the inputs as keep a cache of `l2` bytes cold, within limits."""
    count = min(graphs.copies_needed(operation.cost(**case.sizes(dtype)).bytes, l2, _held(inputs)), most)
    # Each copy is then used once in a graph, so that what a call writes to its arguments can be compared.
    return input_copies(inputs, max(count, graphs.LEAST_CALLS) if operation.mutates else count)


def time_copies(operation: Operation, copies: list[dict[str, Any]], direction: str, variant: str, replays: int = 20) -> Outcome:
    """Time one variant of the calls on these copies of the inputs, which stay as they are."""
    calls, changed = make_calls(operation, copies, direction, variant), _Changed(operation, copies)
    expected = changed.after(calls[0]) if variant == "triton" else None
    seconds, outputs = graphs.time_calls(calls, replays, restore=changed.restore if operation.mutates else None)
    found = zip(outputs, itertools.cycle(changed.now), strict=False)
    is_wrong = variant == "triton" and not all(_same_bits(one, expected) for one in found)
    changed.restore()  # the next variant has the same inputs
    if is_wrong:
        return Outcome({"wrong": f"{direction}: the results inside a CUDA graph differ from those outside"})
    return Outcome(seconds | {"copies": len(copies), "calls": len(outputs)})


def _held(inputs: dict[str, Any]) -> int:
    """Bytes of memory of the tensors."""
    storages = (one.untyped_storage() for one in inputs.values() if isinstance(one, torch.Tensor))
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


class _Changed:
    """The arguments that calls write to, as they are now, for each copy of the inputs."""

    def __init__(self, operation: Operation, copies: list[dict[str, Any]]):
        self.now = [[one[name] for name in operation.mutates if one.get(name) is not None] for one in copies]
        self._before = [one.clone() for one in self.now[0]]

    def after(self, call: Call) -> tuple[Any, list[torch.Tensor]]:
        """What a call on the first copy returns and leaves there. The arguments are put back."""
        out = call()
        left = [one.clone() for one in self.now[0]]
        self.restore()
        return out, left

    def restore(self) -> None:
        for one in self.now:
            for now, before in zip(one, self._before, strict=True):
                now.copy_(before)


# All variants of a case are timed one after another, so its inputs are made and checked once.
@functools.lru_cache(maxsize=1)
def _inputs(name: str, case_name: str, dtype: torch.dtype) -> dict[str, Any]:
    return _case(OPERATIONS[name], case_name).inputs(dtype, DEVICE)


@functools.lru_cache(maxsize=1)
def _fault(name: str, case_name: str, dtype: torch.dtype) -> str:
    """How the kernels' result or gradients are wrong on a case's inputs; empty if they are right."""
    try:
        assert_operation_accurate(OPERATIONS[name], _inputs(name, case_name, dtype), impl="triton")
    except AssertionError as error:
        return str(error)
    return ""


def _case(operation: Operation, name: str) -> Case:
    return next(case for case in operation.cases if case.name == name)


def input_copies(inputs: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The inputs and `count - 1` copies. A copy keeps the strides and the sharing of memory, as between q, k and v of one projection."""
    return [inputs, *(copy.deepcopy(inputs) for _ in range(count - 1))]


def make_calls(operation: Operation, copies: list[dict[str, Any]], direction: str, variant: str) -> list[Call]:
    """One function without arguments for each copy of the inputs."""
    if variant == "library":
        return [operation.library(**inputs) for inputs in copies]
    function = partial(operation.call, impl="triton") if variant == "triton" else operation.reference
    if variant == "compiled":
        torch.compiler.reset()  # PyTorch stops compiling a function after eight shapes
        function = torch.compile(function, dynamic=False, fullgraph=True)
    if direction == "forward":
        return [torch.no_grad()(partial(function, **inputs)) for inputs in copies]
    return [_backward(function, operation.differentiable, inputs) for inputs in copies]


def _backward(function: Callable[..., Results], differentiable: tuple[str, ...], inputs: dict[str, Any]) -> Call:
    """The backward of a call; its forward runs here."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable if inputs[name] is not None}
    out = results_of(function(**{**inputs, **leaves}))
    rng = torch.Generator(out[0].device).manual_seed(1)
    incoming = [torch.randn(one.shape, generator=rng, device=one.device).to(one.dtype) for one in out]
    return partial(torch.autograd.grad, out, list(leaves.values()), incoming, retain_graph=True, allow_unused=True)


def _same_bits(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(*(one.view(_INTEGERS[one.itemsize]) if one.is_floating_point() else one for one in (left, right)))
    return left is right if left is None else all(map(_same_bits, left, right))


def predict() -> str:
    """Markdown of the shortest possible time of every released shape on an H200, from its cost alone: no GPU is needed."""
    rates = {name: PREDICTED[name] for name in ("bytes_a_second", "flops_a_second")}
    lines = [
        f"Predicted, not measured: bfloat16 on an {PREDICTED['machine']} at {rates['bytes_a_second'] / 1e12:.1f} TB/s and "
        f"{rates['flops_a_second'] / 1e12:.0f} TFLOP/s, each call by itself, launches not counted:",
        "",
        "| operation | case | GFLOP | MB | bound by | predicted least, µs |",
        "|---|---|---|---|---|---|",
    ]
    for operation in OPERATIONS.values():
        for case in operation.cases:
            if case.released:
                cost = operation.cost(**case.sizes(torch.bfloat16))
                seconds = bound_seconds(cost, **rates)
                limit = "memory" if cost.bytes / rates["bytes_a_second"] >= seconds else "tensor cores"
                sizes = f"{cost.flops / 1e9:.2f} | {cost.bytes / 1e6:.2f}"
                lines.append(f"| `{operation.name}` | {kernels_table.cell(case.name)} | {sizes} | {limit} | {seconds * 1e6:.1f} |")
    return "\n".join(lines)
