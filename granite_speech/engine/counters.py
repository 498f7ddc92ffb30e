"""What an engine has done and is doing, for its callers to read."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Counters"]


@dataclass
class Counters:
    """Numbers of an engine, at one moment.

    Attributes:
        waiting, prefilling, decoding: requests in each stage now; those that wait for their audio to be encoded count as waiting.
        submitted, finished, cancelled, failed: requests since the engine began; cancelled and failed ones are not finished.
        pages, pages_used, pages_remembered: pages in all, those that requests use, and those remembered for the next prompts.
        prompt_tokens: tokens run in prefills, those of resumed requests again; shared_tokens: tokens that needed none, because
            another request had computed their pages.
        shared_bytes: keys and values of shared_tokens.
        new_tokens: tokens of answers.
        audio_seconds: of encoded audio.
        steps: decode steps. rows: of all these steps together, so rows / steps answers went on at once.
        preempted: how often a request gave its pages to another one and began again later.
        seconds: time that the worker spent in each stage: "encode", "prefill", "decode", and "capture" of CUDA graphs. On a GPU it is
            the host's, which waits for the device only in "decode".
    """

    waiting: int = 0
    prefilling: int = 0
    decoding: int = 0
    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    pages: int = 0
    pages_used: int = 0
    pages_remembered: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    shared_bytes: int = 0
    new_tokens: int = 0
    audio_seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    preempted: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("encode", "prefill", "decode", "capture"), 0.0))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start
