"""Requests that arrive over time, answered by an engine or in batches: how much audio per second, and how long each one takes."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self

from granite_speech.engine.counters import Counters
from granite_speech.engine.handle import Answer, Handle

__all__ = ["Load", "Served", "compare", "counted", "figures", "serve_in_batches", "serve_in_engine"]


@dataclass(frozen=True)
class Load:
    """Requests in order of arrival.

    Attributes:
        audio_seconds: of each request.
        arrivals: when each arrives, in seconds after the first one.
    """

    audio_seconds: tuple[float, ...]
    arrivals: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.arrivals)

    @classmethod
    def at_once(cls, audio_seconds: Sequence[float]) -> Self:
        """All requests arrive together."""
        return cls(tuple(audio_seconds), (0.0,) * len(audio_seconds))

    @classmethod
    def over_time(cls, audio_seconds: Sequence[float], rate: float) -> Self:
        """Random gaps, exponentially distributed and always the same ones, scaled to an exact rate.

        Args:
            audio_seconds: of each request.
            rate: seconds of audio that arrive per second.
        """
        rng = random.Random(0)
        times = list(accumulate((rng.expovariate(1) for _ in audio_seconds[1:]), initial=0.0))
        return cls(tuple(audio_seconds), tuple(one * sum(audio_seconds) / rate / times[-1] for one in times))


@dataclass(frozen=True)
class Served:
    """One run of a load.

    Attributes:
        answers: by request.
        completions: when each answer was complete, in seconds after the first arrival.
        counters: of the engine.
    """

    answers: list[Any]
    completions: list[float]
    counters: dict[str, Any] = field(default_factory=dict)


def serve_in_engine(load: Load, submit: Callable[[int], Handle]) -> Served:
    """Submit each request when it arrives. A thread for each waits for its answer, so that the completion is the answer's own.

    Args:
        load: the requests.
        submit: submits the request of this number.
    """

    def wait(handle: Handle) -> tuple[Answer, float]:
        return handle.result(), time.perf_counter()

    with ThreadPoolExecutor(len(load)) as pool:
        start = time.perf_counter()
        waiting = []
        for number, arrival in enumerate(load.arrivals):
            _sleep_until(start + arrival)
            waiting.append(pool.submit(wait, submit(number)))
        done = [one.result() for one in waiting]
    return Served([answer for answer, _ in done], [end - start for _, end in done])


def serve_in_batches(load: Load, answer: Callable[[range], list[Any]], size: int) -> Served:
    """Answer the requests in order of arrival, `size` together, as soon as the last one of these has arrived.

    Args:
        load: the requests.
        answer: answers the requests of these numbers.
        size: of a batch.
    """
    answers: list[Any] = []
    completions: list[float] = []
    start = time.perf_counter()
    for first in range(0, len(load), size):
        batch = range(first, min(first + size, len(load)))
        _sleep_until(start + load.arrivals[batch[-1]])
        answers += answer(batch)
        completions += [time.perf_counter() - start] * len(batch)
    return Served(answers, completions)


def _sleep_until(moment: float) -> None:
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)


def figures(load: Load, served: Served) -> dict[str, float]:
    """Seconds of audio per second, and seconds from arrival to completion: of all requests, and of those shorter than the median."""
    latencies = [end - arrival for end, arrival in zip(served.completions, load.arrivals, strict=True)]
    median = statistics.median(load.audio_seconds)
    short = [latency for latency, seconds in zip(latencies, load.audio_seconds, strict=True) if seconds < median]
    return {
        "audio_a_second": sum(load.audio_seconds) / max(served.completions),
        "p50_s": statistics.median(latencies),
        "p95_s": _p95(latencies),
        "short_p50_s": statistics.median(short),
        "short_p95_s": _p95(short),
    }


def _p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def compare(load: Load, systems: dict[str, Callable[[Load], Served]], rounds: int) -> dict[str, Any]:
    """Figures of one or two systems, "ours" and "reference", medians of rounds in alternating order, after one warm-up round.

    Counters are those of the round with the median throughput.
    """
    runs: dict[str, list[tuple[dict[str, float], Served]]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        # In alternating order, so that neither always finds the machine as the other left it.
        for name, serve in systems.items() if number % 2 else reversed(systems.items()):
            served = serve(load)
            if number > 0:
                runs[name].append((figures(load, served), served))
    found: dict[str, Any] = {}
    for name, pairs in runs.items():
        middle = sorted(pairs, key=lambda pair: pair[0]["audio_a_second"])[len(pairs) // 2][1]
        found[name] = {key: statistics.median(one[key] for one, _ in pairs) for key in pairs[0][0]}
        found[name] |= {"counters": middle.counters} if middle.counters else {}
    if "reference" in runs:
        both = zip(runs["ours"], runs["reference"], strict=True)
        ratios = [mine["audio_a_second"] / theirs["audio_a_second"] for (mine, _), (theirs, _) in both]
        found |= {"ratio": statistics.median(ratios), "ratios": [round(ratio, 4) for ratio in ratios]}
    return found


def counted(before: Counters, after: Counters) -> dict[str, Any]:
    """What an engine did between two readings of its counters."""
    totals = ("prompt_tokens", "shared_tokens", "new_tokens", "steps", "rows", "preempted")
    found: dict[str, Any] = {name: getattr(after, name) - getattr(before, name) for name in totals}
    found["rows_a_step"] = round(found.pop("rows") / max(1, found["steps"]), 2)
    found["seconds"] = {stage: round(seconds - before.seconds[stage], 4) for stage, seconds in after.seconds.items()}
    return found
