"""The references on this machine's CPU, beside torch.compile of them and the nearest library call, timed by pytest-benchmark.

Not collected with the tests: `python -m bench kernels` runs this file where there is no GPU.
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
from granite_kernels.op import Case, Operation
from granite_kernels.testing import assert_operation_accurate

from bench import results

__all__ = ["run", "table"]

WAYS = ("torch", "compiled", "library")
# A released shape beyond these takes a CPU seconds a call.
MOST_FLOPS, MOST_BYTES = 4e9, 1e8


def cases() -> list[tuple[Operation, Case]]:
    """The released shapes that a CPU is asked for."""
    pairs = [(operation, case) for operation in OPERATIONS.values() for case in operation.cases if case.released]
    costs = (operation.cost(**case.sizes(torch.float32)) for operation, case in pairs)
    return [pair for pair, cost in zip(pairs, costs, strict=True) if cost.flops <= MOST_FLOPS and cost.bytes <= MOST_BYTES]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("operation", "case"), [pytest.param(*pair, id=f"{pair[0].name}: {pair[1].name}") for pair in cases()])
def test_speed(benchmark: Any, operation: Operation, case: Case, way: str):
    inputs = case.inputs(torch.float32)
    benchmark.extra_info.update(operation=operation.name, case=case.name, way=way)
    if way == "library":
        call = operation.library(**inputs)
    else:
        assert_operation_accurate(operation, inputs, impl="torch")
        function = operation.reference if way == "torch" else torch.compile(operation.reference, dynamic=False)

        def call():
            return function(**inputs)

    with torch.no_grad():
        call()  # compiles, and fills the caches of the allocator
        benchmark(call)


def run(*, operations: list[str] | None, out: Path, options: tuple[str, ...] = ("--benchmark-min-rounds=7",)) -> str:
    """Measure, write the result file, and return the table.

    Args:
        options: of pytest-benchmark.

    Raises:
        SystemExit: a reference was wrong or a call failed; nothing is written.
    """
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "benchmark.json"
        chosen = " or ".join(f"{name}:" for name in operations or OPERATIONS)
        command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", chosen, f"--benchmark-json={raw}", "-p", "no:cacheprovider"]
        # Under pytest-xdist, which a test may run this from, pytest-benchmark measures nothing.
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        status = subprocess.run([*command, *options], cwd=Path(__file__).parents[1], env=alone, check=False).returncode
        if status != 0:
            raise SystemExit(f"pytest-benchmark ended with status {status}: nothing is written")
        measured = json.loads(raw.read_text())["benchmarks"]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in measured:
        operation, case, way = (one["extra_info"][name] for name in ("operation", "case", "way"))
        cost = OPERATIONS[operation].cost(**next(c for c in OPERATIONS[operation].cases if c.name == case).sizes(torch.float32))
        row = rows.setdefault((operation, case), {"operation": operation, "case": case, "flops": cost.flops, "bytes": cost.bytes})
        row.setdefault("seconds", {})[way] = {name: one["stats"][name] for name in ("median", "q1", "q3", "rounds")}
    result = {"kind": "kernels-cpu", "run": results.describe_run(), "dtype": "float32", "measurements": list(rows.values())}
    file = results.write(out, "kernels-cpu", result)
    return f"{table(result)}\n\n{file}"


def table(result: dict[str, Any]) -> str:
    """Markdown of one run on a CPU."""
    run = result["run"]
    head = f"{run['machine']}, {run['threads']} threads, {result['dtype']}, torch {run['versions']['torch']}, commit {run['commit'][:8]}:"
    titles = ["operation", "case", *(f"{way}, ms" for way in WAYS), "GFLOP/s", "GB/s"]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for one in result["measurements"]:
        medians = {way: one["seconds"][way]["median"] for way in WAYS if way in one["seconds"]}
        times = " | ".join(f"{medians[way] * 1e3:.2f}" if way in medians else "" for way in WAYS)
        rates = f"{one['flops'] / medians['torch'] / 1e9:.1f} | {one['bytes'] / medians['torch'] / 1e9:.1f}"
        rows.append(f"| `{one['operation']}` | {one['case']} | {times} | {rates} |")
    return "\n".join([head, "", *rows])
