"""Every operation's kernels on a GPU: against their bound, the reference, torch.compile of it, and the nearest library call.

What is timed has first been compared with float64 truth, on the very tensors. The L2 cache is cold: a flush before each call,
or, in a CUDA graph, a rotation over copies of the inputs that together are five times its size.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from granite_kernels import OPERATIONS
from granite_kernels.op import Case, Cost, Operation
from granite_kernels.testing import assert_operation_accurate

from bench import results

__all__ = ["predict", "run", "table"]

CATALOGUE = Path(__file__).parents[1] / "kernels/README.md"
QUANTILES = (0.5, 0.2, 0.8)
# A prediction's ceilings: an H200's copy and bfloat16 matrix rates. Stated, not measured by this program.
PREDICTED = {"machine": "NVIDIA H200", "bytes_a_second": 4.3e12, "flops_a_second": 790e12}
COLUMNS = ("triton", "torch", "compiled", "library")

Call = Callable[[], Any]


def run(*, operations: list[str] | None, dtype: torch.dtype, compiled: bool, out: Path) -> str:
    """Measure all released shapes, write the result file after each measurement, and return the table.

    Args:
        compiled: also time torch.compile of the references, which takes seconds a shape to compile.
    """
    rates = machine_rates(dtype)
    described = results.describe_run() | {"machine": torch.cuda.get_device_name()}
    result = {"kind": "kernels", "run": described, "dtype": str(dtype).removeprefix("torch."), "rates": rates, "measurements": []}
    pairs = [(OPERATIONS[name], case) for name in operations or OPERATIONS for case in OPERATIONS[name].cases if case.released]
    # Most informative first: the kernels of all shapes, then what they are compared with, then what takes long to compile.
    rounds = [("triton", "library"), ("torch",), *([("compiled",)] if compiled else [])]
    measurements = {}
    for ways in rounds:
        for operation, case in pairs:
            for direction in ("forward", "backward") if operation.differentiable else ("forward",):
                key = (operation.name, case.name, direction)
                if key not in measurements:
                    measurements[key] = begin(operation, case, dtype, direction, rates)
                    result["measurements"].append(measurements[key])
                measure(operation, case, dtype, direction, ways, measurements[key])
                file = results.write(out, "kernels", result)
    return f"{table(result)}\n\n{file}"


def begin(operation: Operation, case: Case, dtype: torch.dtype, direction: str, rates: dict[str, float]) -> dict[str, Any]:
    """What is known of a measurement before it: cost and bound. The backward's cost is not declared, so it has no bound."""
    one = {"operation": operation.name, "case": case.name, "direction": direction, "seconds": {}}
    if direction == "forward":
        cost = operation.cost(**case.sizes(dtype))
        one |= {"flops": cost.flops, "bytes": cost.bytes, "bound_seconds": bound_seconds(cost, **rates)}
    return one


def bound_seconds(cost: Cost, bytes_a_second: float, flops_a_second: float) -> float:
    """The time that a call cannot go below at these rates."""
    return max(cost.bytes / bytes_a_second, cost.flops / flops_a_second)


def machine_rates(dtype: torch.dtype) -> dict[str, float]:
    """This GPU's rates on random data: of a large copy, bytes read and written, and of a large matrix product."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size() / event_seconds(lambda: target.copy_(source))["median"]
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    multiplied = 2 * 8192**3 / event_seconds(lambda: a @ b)["median"]
    return {"bytes_a_second": copied, "flops_a_second": multiplied}


def measure(operation: Operation, case: Case, dtype: torch.dtype, direction: str, ways: tuple[str, ...], one: dict[str, Any]) -> None:
    """Time `ways` of one call, and note why where a way could not be timed."""
    inputs = case.inputs(dtype, "cuda")
    if "triton" in ways and direction == "forward":
        try:
            assert_operation_accurate(operation, inputs, impl="triton")
        except AssertionError as error:
            one["wrong"] = str(error)  # a wrong kernel has no speed
    if "wrong" in one:
        return
    for way in ways:
        if way == "library" and (direction == "backward" or operation.library is None):
            continue
        try:
            one["seconds"][way] = time_way(operation, inputs, direction, way)
            if way == "triton" and direction == "forward" and one["seconds"][way]["median"] < 200e-6:
                copies = rotation(operation, case, dtype, inputs)
                one["seconds"]["triton in a graph"] = graph_seconds(partial(operation.call, impl="triton"), copies)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            one.setdefault("failed", {})[way] = f"{type(error).__name__}: {error!s:.300}"


def time_way(operation: Operation, inputs: dict[str, Any], direction: str, way: str) -> dict[str, float]:
    if way == "library":
        return event_seconds(operation.library(**inputs))
    function = {
        "triton": partial(operation.call, impl="triton"),
        "torch": operation.reference,
        "compiled": torch.compile(operation.reference, dynamic=False),
    }[way]
    if direction == "forward":
        with torch.no_grad():
            return event_seconds(lambda: function(**inputs))
    leaves = {name: inputs[name].detach().requires_grad_() for name in operation.differentiable if inputs[name] is not None}
    out = function(**{**inputs, **leaves})
    incoming = torch.randn_like(out)
    wanted = list(leaves.values())
    return event_seconds(lambda: torch.autograd.grad(out, wanted, incoming, retain_graph=True, allow_unused=True))


def event_seconds(call: Call) -> dict[str, float]:
    """Median, 20th and 80th percentile between device events, the L2 cache flushed before each call."""
    return dict(zip(("median", "p20", "p80"), (ms / 1e3 for ms in triton.testing.do_bench(call, quantiles=list(QUANTILES))), strict=True))


def rotation(operation: Operation, case: Case, dtype: torch.dtype, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The inputs and copies of them, together five times the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(256, -(-5 * cache // operation.cost(**case.sizes(dtype)).bytes))
    copied = ({name: one.clone() if isinstance(one, torch.Tensor) else one for name, one in inputs.items()} for _ in range(count))
    return [inputs, *copied]


@torch.no_grad()
def graph_seconds(function: Callable[..., Any], copies: list[dict[str, Any]], replays: int = 20) -> dict[str, float]:
    """Seconds a call inside a CUDA graph that makes one call on each copy."""
    for inputs in copies[:2]:
        function(**inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in copies:
            function(**inputs)
    seconds = sorted(replay_seconds(graph, replays))
    return {name: seconds[round(q * (replays - 1))] / len(copies) for name, q in zip(("median", "p20", "p80"), QUANTILES, strict=True)}


def replay_seconds(graph: torch.cuda.CUDAGraph, replays: int) -> Iterator[float]:
    for number in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= 2:  # the first ones upload the graph
            yield start.elapsed_time(end) / 1e3


def table(result: dict[str, Any]) -> str:
    """Markdown of one run on a GPU."""
    run, rates = result["run"], result["rates"]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "triton"))
    head = (
        f"{run['machine']}, {result['dtype']}, {versions}, commit {run['commit'][:8]}; measured ceilings "
        f"{rates['bytes_a_second'] / 1e12:.2f} TB/s and {rates['flops_a_second'] / 1e12:.0f} TFLOP/s:"
    )
    names = [*COLUMNS, "triton in a graph"]
    rows = [
        f"| operation | case | | bound, µs | share of it | {' | '.join(f'{name}, µs' for name in names)} |",
        "|---" * (5 + len(names)) + "|",
    ]
    for one in result["measurements"]:
        seconds = {name: one["seconds"][name]["median"] for name in names if name in one["seconds"]}
        fastest = min((seconds[name] for name in ("triton", "triton in a graph") if name in seconds), default=None)
        bound = one.get("bound_seconds")
        share = f"{bound / fastest:.0%}" if bound and fastest else "wrong" if "wrong" in one else ""
        times = " | ".join(f"{seconds[name] * 1e6:.1f}" if name in seconds else "" for name in names)
        rows.append(
            f"| `{one['operation']}` | {one['case']} | {one['direction']} | {f'{bound * 1e6:.1f}' if bound else ''} | {share} | {times} |"
        )
    return "\n".join([head, "", *rows])


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
