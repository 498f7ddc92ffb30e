"""The GPU checks in one command, the most informative first, as many as fit into the time. Each result is written as soon as it exists."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench import results

__all__ = ["run"]

ROOT = Path(__file__).parents[1]
# tests/conftest.py turns Triton's interpreter on unless TRITON_INTERPRET is set.
SOURCES = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(SOURCES)}
LEAST_SECONDS = 10  # a step with less time left is not started


@dataclass(frozen=True)
class Step:
    """One program and its time limit in seconds."""

    name: str
    command: list[str]
    seconds: float


def steps(out: Path) -> list[Step]:
    python = sys.executable
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    # Nearly all of the time goes into compiling kernels, on one core each.
    parity = [*tests, "-n", str(max(1, min(14, (os.cpu_count() or 1) - 2))), "tests"]
    kernels = [python, "-m", "bench", "kernels", "--out"]
    model = [python, "-m", "bench", "model", "--device", "cuda", "--out", str(out)]
    planned = [
        Step("steps", [*model, "--part", "steps"], 120),
        Step("parity", parity, 300),
        Step("model", model, 220),
        # It ends before its limit, so that its rows are in the log.
        Step("tune", [python, "-m", "bench", "tune", str(out), "--seconds", "225"], 240),
        Step("kernels", [*kernels, str(out), "--no-compiled"], 240),
        Step("turboctc", [*model, "--part", "turboctc"], 90),
        Step("accelerated", [*model, "--part", "accelerated"], 120),
        Step("serving", [*model, "--part", "serving"], 90),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        small = [*tests, "tests/kernels/test_gpu.py", "-k", "small and float16"]
        planned.append(Step("sanitizer", [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *small], 90))
    # A separate folder: if this step is cut short, its file must not replace the complete one of the step above.
    # lora_linear is the only reference that torch.compile can compile.
    planned.append(Step("kernels and torch.compile", [*kernels, str(out / "compiled"), "--operation", "lora_linear"], 240))
    return planned


def run(out: Path, budget: float) -> int:
    """Run as many steps as fit into `budget` seconds; returns the number of steps that failed, were cut short or did not fit.

    `out` gets the result files, one log per step, and `summary.json`, which is rewritten after each step.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    summary: list[dict[str, object]] = []
    for step in steps(out):
        seconds = min(step.seconds, end - time.monotonic())
        if seconds < LEAST_SECONDS:
            summary.append({"step": step.name, "status": "no time left"})
        else:
            summary.append(_run_step(step, seconds, out / f"{step.name.replace(' ', '-')}.log"))
        print(json.dumps(summary[-1]), flush=True)
        (out / "summary.json").write_text(json.dumps({"run": results.describe_run(), "steps": summary}, indent=2) + "\n")
    return sum(entry["status"] != 0 for entry in summary)


def _run_step(step: Step, seconds: float, log: Path) -> dict[str, object]:
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: object = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            _kill_session(process)
    lines = log.read_text(errors="replace").splitlines()
    return {"step": step.name, "status": status, "seconds": round(time.monotonic() - start, 1), "last line": lines[-1] if lines else ""}


def _kill_session(process: subprocess.Popen) -> None:
    """Kill a step and its child processes: a survivor would share the GPU with the next step."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
