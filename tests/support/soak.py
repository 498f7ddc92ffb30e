"""Many short requests to one engine: memory must not grow, and no page may be lost.

python -m tests.support.soak [REQUESTS]
"""

import gc
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from granite_speech import Engine
from tests.support.engine_requests import MODEL, TIMEOUT, answer, length, prompt

__all__ = ["Report", "soak"]

_PROMPTS, _AT_ONCE = 12, 50


@dataclass(frozen=True)
class Report:
    """What is left after the requests.

    Attributes:
        requests: how many there were.
        seconds: how long they took.
        wrong: answers that differ from those of `generate`.
        pages_used: by requests.
        living_handles: that should be gone, with their requests.
        memory_before, memory_after: resident bytes after the first fifth and at the end.
    """

    requests: int
    seconds: float
    wrong: int
    pages_used: int
    living_handles: int
    memory_before: int
    memory_after: int

    @property
    def growth(self) -> float:
        """Of the memory, as a part of what it was."""
        return self.memory_after / self.memory_before - 1


def soak(requests: int) -> Report:
    """Ask and wait, 50 requests at a time, for answers of 1 to 3 tokens."""
    asked = [(prompt(seed, tokens=4 + 3 * seed), length(1 + seed % 3)) for seed in range(_PROMPTS)]
    expected = [answer(inputs, **options) for inputs, options in asked]
    start, wrong, before, living = time.perf_counter(), 0, 0, weakref.WeakSet()
    with Engine(MODEL, None, max_rows=4, max_pages=32) as engine:
        for first in range(0, requests, _AT_ONCE):
            if before == 0 and first >= requests // 5:
                before = _resident()
            handles = []
            for number in range(first, min(first + _AT_ONCE, requests)):
                inputs, options = asked[number % _PROMPTS]
                handles.append(engine.submit(inputs=inputs, **options))
            living.update(handles)
            answers = [one.result(TIMEOUT).token_ids for one in handles]
            wrong += sum(given != expected[number % _PROMPTS] for number, given in enumerate(answers, first))
        seconds, after, used = time.perf_counter() - start, _resident(), engine.counters().pages_used
    del handles
    gc.collect()
    return Report(requests, seconds, wrong, used, len(living), before, after)


def _resident() -> int:
    gc.collect()
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = soak(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
    print(f"{report.requests:,} requests in {report.seconds:.1f} s, {report.wrong} wrong answers")
    print(f"left: {report.pages_used} pages in use, {report.living_handles} handles")
    print(f"memory {report.memory_before / 2**20:.1f} MiB, then {report.memory_after / 2**20:.1f} MiB: {report.growth:+.2%}")
