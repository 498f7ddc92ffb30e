"""Every operation's kernels on a GPU: against their bound, the reference, torch.compile of it, and the nearest library call.

Every time is of calls in a CUDA graph with a cold L2 cache (`bench.graphs`). A case is timed only after its result and gradients were
compared with float64 truth, and what a graph computes must have the bits of that result.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from granite_kernels import OPERATIONS
from granite_kernels.op import Case, Cost, Operation
from granite_kernels.testing import assert_operation_accurate

from bench import graphs, kernels_table, results
from bench.graphs import Call, HostBoundError, HostWaitError
from bench.worker import Outcome, Worker

__all__ = ["predict", "run"]

PREDICTIONS = Path(__file__).parents[1] / "kernels/AUDIT.md"
DEVICE = "cuda"
# A prediction's ceilings: an H200's copy and bfloat16 matrix rates. Stated, not measured by this program.
PREDICTED = {"machine": "NVIDIA H200", "bytes_a_second": 4.3e12, "flops_a_second": 790e12}
METHOD = [
    f"All times, and the machine's rates, are of CUDA graphs of at least {graphs.LEAST_CALLS} calls, which use in turn copies of the "
    f"inputs that are together {graphs.COLD} times the L2 cache",
    "A backward is torch.autograd.grad alone, after a forward outside the graph",
]
NOT_COMPILED = "not tried: torch.compile does not remove a host wait of the reference"


def run(*, operations: list[str] | None, dtype: torch.dtype, compiled: bool, out: Path) -> str:
    """Measure all released shapes, write the result file after each measurement, and return the table.

    Args:
        compiled: also time torch.compile of the references, which takes seconds a shape to compile.
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
    file = None
    with Worker() as worker:
        for _ in measure(result["measurements"], operations or list(OPERATIONS), dtype, compiled, rates, worker.call):
            file = results.write(out, "kernels", result)
    return f"{kernels_table.table(result)}\n\n{file}"


def measure(
    measurements: list[dict[str, Any]],
    operations: list[str],
    dtype: torch.dtype,
    compiled: bool,
    rates: dict[str, float],
    call: Callable[..., Outcome],
) -> Iterator[None]:
    """Fill `measurements`, one entry for each shape and direction; yields after every change.

    Args:
        call: `call(function, *arguments)` returns the function's outcome, from a process that earlier failures did not spoil.
    """
    entries: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, case, direction, way in plan(operations, compiled):
        key = (name, case.name, direction)
        if key not in entries:
            entries[key] = begin(OPERATIONS[name], case, dtype, direction, rates)
            measurements.append(entries[key])
        entry = entries[key]
        if "wrong" in entry:
            continue
        if way == "compiled" and entries[name, case.name, "forward"]["not_timed"].get("torch", "").startswith(HostWaitError.__name__):
            outcome = Outcome(not_timed=NOT_COMPILED)
        else:
            outcome = call(time_way, name, case.name, direction, way, dtype)
        if outcome.not_timed:
            entry["not_timed"][way] = outcome.not_timed
        elif "wrong" in outcome.found:
            entry |= outcome.found | {"seconds": {}}
        else:
            entry["seconds"][way] = outcome.found
        yield


def plan(operations: list[str], compiled: bool) -> Iterator[tuple[str, Case, str, str]]:
    """Operation, case, direction and way of every measurement, most informative first: the kernels of all shapes and the library, then
    the references, then what takes long to compile."""
    cases = [(OPERATIONS[name], case) for name in operations for case in OPERATIONS[name].cases if case.released]
    for ways in (("triton", "library"), ("torch",), *([("compiled",)] if compiled else [])):
        for operation, case in cases:
            for way in ways:
                if way != "library" or operation.library is not None:
                    yield operation.name, case, "forward", way
                if way != "library" and operation.differentiable:
                    yield operation.name, case, "backward", way


def begin(operation: Operation, case: Case, dtype: torch.dtype, direction: str, rates: dict[str, float]) -> dict[str, Any]:
    """What is known of a measurement before it: cost and bound. The backward's cost is not declared, so it has no bound."""
    one = {"operation": operation.name, "case": case.name, "direction": direction, "seconds": {}, "not_timed": {}}
    if direction == "forward":
        cost = operation.cost(**case.sizes(dtype))
        one |= {"flops": cost.flops, "bytes": cost.bytes, "bound_seconds": bound_seconds(cost, **rates)}
    return one


def bound_seconds(cost: Cost, bytes_a_second: float, flops_a_second: float) -> float:
    """The time that a call cannot go below at these rates."""
    return max(cost.bytes / bytes_a_second, cost.flops / flops_a_second)


def time_way(name: str, case_name: str, direction: str, way: str, dtype: torch.dtype) -> Outcome:
    """Time one way of making one call. Runs in the worker's process."""
    try:
        with graphs.side_stream():
            return _time_way(OPERATIONS[name], case_name, direction, way, dtype)
    except (HostWaitError, HostBoundError) as error:
        return Outcome(not_timed=f"{type(error).__name__}: {error}")
    except Exception as error:  # whatever a call raises is the reason why it has no time; a new process times the other calls
        return Outcome(not_timed=_reason(error), spoiled=True)


def _reason(error: BaseException) -> str:
    """What went wrong, first things first: PyTorch reports that it could not end a capture after what broke the capture."""
    said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
    return said if error.__context__ is None else f"{_reason(error.__context__)}; then {said}"


def _time_way(operation: Operation, case_name: str, direction: str, way: str, dtype: torch.dtype) -> Outcome:
    case = _case(operation, case_name)
    if way == "triton" and (fault := _fault(operation.name, case_name, dtype)):
        return Outcome({"wrong": fault})  # a wrong kernel has no speed
    count = graphs.copies_needed(operation.cost(**case.sizes(dtype)).bytes, graphs.l2_bytes())
    copies = rotation(_inputs(operation.name, case_name, dtype), count)
    calls = calls_of(operation, copies, direction, way)
    expected = calls[0]() if way == "triton" else None
    seconds, found = graphs.time_calls(calls)
    if way == "triton" and not all(_same_bits(one, expected) for one in found):
        return Outcome({"wrong": f"{direction}: the results inside a CUDA graph are not those outside"})
    return Outcome(seconds | {"copies": len(copies), "calls": len(found)})


# The ways of one case follow each other: its inputs are made and checked once.
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


def rotation(inputs: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The inputs and copies of them, `count` in all. A copy keeps the strides, and what shares memory: q, k and v of one projection do."""
    return [inputs, *(copy.deepcopy(inputs) for _ in range(count - 1))]


def calls_of(operation: Operation, copies: list[dict[str, Any]], direction: str, way: str) -> list[Call]:
    """One function of no arguments for each copy of the inputs."""
    if way == "library":
        return [operation.library(**inputs) for inputs in copies]
    function = partial(operation.call, impl="triton") if way == "triton" else operation.reference
    if way == "compiled":
        torch.compiler.reset()  # after eight shapes of one function PyTorch stops compiling it
        function = torch.compile(function, dynamic=False, fullgraph=True)
    if direction == "forward":
        return [torch.no_grad()(partial(function, **inputs)) for inputs in copies]
    return [_backward(function, operation.differentiable, inputs) for inputs in copies]


def _backward(function: Callable[..., torch.Tensor], differentiable: tuple[str, ...], inputs: dict[str, Any]) -> Call:
    """The backward of one call whose forward has run."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable if inputs[name] is not None}
    out = function(**{**inputs, **leaves})
    incoming = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device).to(out.dtype)
    return partial(torch.autograd.grad, out, list(leaves.values()), incoming, retain_graph=True, allow_unused=True)


def _same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one is other if one is None else all(map(_same_bits, one, other))


def predict() -> str:
    """Markdown of the least time of every released shape on an H200, from its cost alone: no GPU is needed."""
    rows = ["| operation | case | GFLOP | MB | bound by | predicted least, µs |", "|---|---|---|---|---|---|"]
    rates = {name: PREDICTED[name] for name in ("bytes_a_second", "flops_a_second")}
    for operation in OPERATIONS.values():
        for case in operation.cases:
            if case.released:
                cost = operation.cost(**case.sizes(torch.bfloat16))
                seconds = bound_seconds(cost, **rates)
                by = "memory" if cost.bytes / rates["bytes_a_second"] >= seconds else "tensor cores"
                rows.append(
                    f"| `{operation.name}` | {case.name} | {cost.flops / 1e9:.2f} | {cost.bytes / 1e6:.2f} | {by} | {seconds * 1e6:.1f} |"
                )
    head = (
        f"Predicted, not measured: bfloat16 on an {PREDICTED['machine']} at {PREDICTED['bytes_a_second'] / 1e12:.1f} TB/s and "
        f"{PREDICTED['flops_a_second'] / 1e12:.0f} TFLOP/s, each call by itself, launches not counted:"
    )
    return "\n".join([head, "", *rows])
