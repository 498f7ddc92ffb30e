"""Times of the references on this machine's CPU, with torch.compile of them and the nearest library call, by pytest-benchmark.

The test run does not collect this file; `python -m bench kernels` runs it on a machine without a GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from granite_kernels import OPERATIONS
from granite_kernels.op import Case, Operation, nbytes
from granite_kernels.testing import assert_operation_accurate

from bench import kernels_table, results

__all__ = ["run", "table"]

VARIANTS = ("torch", "compiled", "library")
# Larger released shapes take seconds per call on a CPU, or to make: a lookup moves few bytes, but needs its whole table.
MOST_FLOPS, MOST_BYTES, MOST_HELD = 4e9, 1e8, 4e8


def cases() -> list[tuple[Operation, Case]]:
    """The released shapes that are small enough for a CPU."""
    pairs = [(operation, case) for operation in OPERATIONS.values() for case in operation.cases if case.released]
    return [(operation, case) for operation, case in pairs if _is_small(operation, case.sizes(torch.float32))]


def _is_small(operation: Operation, sizes: dict[str, Any]) -> bool:
    cost, tensors = operation.cost(**sizes), (one for one in sizes.values() if isinstance(one, torch.Tensor))
    return cost.flops <= MOST_FLOPS and cost.bytes <= MOST_BYTES and nbytes(*tensors) <= MOST_HELD


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("operation", "case"), [pytest.param(*pair, id=f"{pair[0].name}: {pair[1].name}") for pair in cases()])
def test_speed(benchmark: Any, operation: Operation, case: Case, variant: str):
    inputs = case.inputs(torch.float32)
    benchmark.extra_info.update(operation=operation.name, case=case.name, variant=variant)
    if variant == "library":
        call = operation.library(**inputs)
    else:
        assert_operation_accurate(operation, inputs, impl="torch")
        function = operation.reference if variant == "torch" else torch.compile(operation.reference, dynamic=False)

        def call():
            return function(**inputs)

    with torch.no_grad():
        call()  # compiles, and fills the allocator's caches
        benchmark(call)


def run(*, operations: list[str] | None, out: Path, options: tuple[str, ...] = ("--benchmark-min-rounds=7",)) -> str:
    """Measure, write the result file, and return the table.

    Args:
        options: pytest-benchmark's options.

    Raises:
        SystemExit: a reference was wrong or a call failed; nothing is written.
    """
    measurements: dict[tuple[str, str], dict[str, Any]] = {}
    for benchmark in _benchmarks(operations or list(OPERATIONS), options):
        name, case_name, variant = (benchmark["extra_info"][key] for key in ("operation", "case", "variant"))
        if (name, case_name) not in measurements:
            case = next(case for case in OPERATIONS[name].cases if case.name == case_name)
            cost = OPERATIONS[name].cost(**case.sizes(torch.float32))
            entry = {"operation": name, "case": case_name, "flops": cost.flops, "bytes": cost.bytes, "seconds": {}}
            measurements[name, case_name] = entry
        seconds = {key: benchmark["stats"][key] for key in ("median", "q1", "q3", "rounds")}
        measurements[name, case_name]["seconds"][variant] = seconds
    result = {"kind": "kernels-cpu", "run": results.describe_run(), "dtype": "float32", "measurements": list(measurements.values())}
    file = results.write(out, "kernels-cpu", result)
    return f"{table(result)}\n\n{file}"


def _benchmarks(operations: list[str], options: tuple[str, ...]) -> list[dict[str, Any]]:
    """Run this file with pytest-benchmark; returns the "benchmarks" of its JSON file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        chosen = " or ".join(f"{name}:" for name in operations)
        command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", chosen, f"--benchmark-json={file}", "-p", "no:cacheprovider"]
        # pytest-benchmark measures nothing under pytest-xdist, which may be running the test that calls this.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        status = subprocess.run([*command, *options], cwd=Path(__file__).parents[1], env=environment, check=False).returncode
        if status != 0:
            raise SystemExit(f"pytest-benchmark ended with status {status}; nothing was written")
        return json.loads(file.read_text())["benchmarks"]


def table(result: dict[str, Any]) -> str:
    """Markdown of one CPU run."""
    run = result["run"]
    head = f"{run['machine']}, {run['threads']} threads, {result['dtype']}, torch {run['versions']['torch']}, commit {run['commit'][:8]}:"
    titles = ["operation", "case", *(f"{variant}, ms" for variant in VARIANTS), "GFLOP/s", "GB/s"]
    lines = [head, "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for entry in result["measurements"]:
        medians = {variant: seconds["median"] for variant, seconds in entry["seconds"].items()}
        times = " | ".join(f"{medians[variant] * 1e3:.2f}" if variant in medians else "" for variant in VARIANTS)
        rates = f"{entry['flops'] / medians['torch'] / 1e9:.1f} | {entry['bytes'] / medians['torch'] / 1e9:.1f}"
        lines.append(f"| `{entry['operation']}` | {kernels_table.cell(entry['case'])} | {times} | {rates} |")
    return "\n".join(lines)
