"""Everything that a borrowed GPU should do inside ten minutes, most informative first; each result is written when it is there."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench import results

__all__ = ["run"]

ROOT = Path(__file__).parents[1]
# Interpreted kernels would prove nothing here. The tests' own switch leaves a variable alone that is set.
ENVIRONMENT = {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}


@dataclass(frozen=True)
class Step:
    """One program, and the most seconds it may take of what is left."""

    name: str
    command: list[str]
    seconds: float


def steps(out: Path) -> list[Step]:
    python = sys.executable
    parity = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    kernels = [python, "-m", "bench", "kernels", "--out", str(out)]
    planned = [
        Step("parity", parity, 200),
        Step("kernels", [*kernels, "--no-compiled"], 150),
        Step("model", [python, "-m", "bench", "model", "--device", "cuda", "--dtype", "bfloat16", "--out", str(out)], 90),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        odd = [*parity[:-1], "tests/test_gpu.py", "-k", "small and float16"]
        planned.append(Step("sanitizer", [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *odd], 90))
    planned.append(Step("kernels beside torch.compile", kernels, 240))
    return planned


def run(out: Path, budget: float) -> int:
    """Run every step that fits into `budget` seconds; returns the number of steps that failed or were cut short.

    `out` takes the result files, one log a step, and `summary.json`, written anew after each step.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    summary: list[dict[str, object]] = []
    for step in steps(out):
        seconds = min(step.seconds, end - time.monotonic())
        if seconds < 10:
            summary.append({"step": step.name, "status": "no time left"})
        else:
            summary.append(_run_step(step, seconds, out / f"{step.name.replace(' ', '-')}.log"))
        print(json.dumps(summary[-1]), flush=True)
        (out / "summary.json").write_text(json.dumps({"run": results.describe_run(), "steps": summary}, indent=2) + "\n")
    return sum(one["status"] != 0 for one in summary)


def _run_step(step: Step, seconds: float, log: Path) -> dict[str, object]:
    start = time.monotonic()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                step.command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
            status: object = done.returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    return {"step": step.name, "status": status, "seconds": round(time.monotonic() - start, 1), "last line": lines[-1] if lines else ""}
