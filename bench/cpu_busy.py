"""The command line on a busy machine: as many processes that only spin as there are cores, and a quiet machine, in turns."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.embedded import SPEECH
from bench.turns import seconds_in_turns
from granite_speech.training import read_manifest

__all__ = ["measure"]

ROOT = Path(__file__).parents[1]
REPEATS = 40


def measure(rounds: int, repeats: int = REPEATS) -> dict[str, Any]:
    """Seconds from the first text of the command to its last, so that imports and loading are left out.

    Args:
        rounds: on a quiet and on a busy machine.
        repeats: how often each recorded clip is among the files.

    Raises:
        SystemExit: the command fails, or gives other words.
    """
    utterances = read_manifest(SPEECH / "manifest.jsonl") * repeats
    spinning = len(os.sched_getaffinity(0))
    taken: dict[str, list[float]] = {"quiet": [], "busy": []}

    def run(name: str, processes: int) -> None:
        with _spinning(processes):
            taken[name].append(_transcribe([str(one.audio) for one in utterances], [one.text for one in utterances]))

    whole = seconds_in_turns({"quiet": partial(run, "quiet", 0), "busy": partial(run, "busy", spinning)}, rounds)
    ratios = [busy / quiet for quiet, busy in zip(*taken.values(), strict=True)]
    return {
        "files": len(utterances),
        "spinning": spinning,
        "seconds": {name: statistics.median(each) for name, each in taken.items()},
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "seconds_with_imports": {name: statistics.median(each) for name, each in whole.items()},
    }


@contextmanager
def _spinning(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _transcribe(files: list[str], expected: list[str]) -> float:
    command = [sys.executable, "-m", "granite_speech.cli", "transcribe", "--quiet", *files]
    lines, times = [], []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            times.append(time.perf_counter())
            lines.append(line.strip())
        errors = process.stderr.read()
    texts = [text for line, text in pairwise(lines) if line.removesuffix(":") in files]
    if process.returncode != 0 or texts != expected:
        raise SystemExit(f"the command line failed, so nothing was timed: exit status {process.returncode}, {len(texts)} texts; {errors}")
    return times[-1] - times[0]
