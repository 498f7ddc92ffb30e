"""Device time of calls in a CUDA graph: once captured, a call's launches cost the host nothing that could be measured for the kernel.

Everything that needs a GPU is in `CapturedCalls`, `side_stream` and `l2_bytes`; tests on a CPU replace them.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

__all__ = ["HostBoundError", "HostWaitError", "copies_needed", "copy_rate", "matmul_rate", "side_stream", "time_calls"]

# Copies of the inputs that are used in turn: together this many times the L2 cache, counted by what the kernel must move. A
# library call does part of the work on at least two thirds of those bytes, so that its copies too are more than five times the cache.
COLD = 8
# Few and short calls would show the start of the graph instead.
LEAST_CALLS = 10
# The first replays upload the graph and let the host get ahead of the device.
WARM_UP = 3

Call = Callable[[], Any]


class HostWaitError(RuntimeError):
    """A call waits for the device on the host, which no CUDA graph can hold."""


class HostBoundError(RuntimeError):
    """The host takes longer to launch the graph than the device to run it: the replays would time the host."""


def copies_needed(bytes_moved: int, l2: int) -> int:
    """How many copies of a call's inputs keep the L2 cache cold when the calls use them in turn."""
    return max(1, math.ceil(COLD * l2 / bytes_moved))


def time_calls(calls: Sequence[Call], replays: int = 20) -> tuple[dict[str, float], list[Any]]:
    """Seconds of one call on the device, and what the calls returned.

    The calls are captured in order, repeated until there are `LEAST_CALLS`, and the graph is replayed; a result stays in memory,
    so that no call writes where the one before has just written. A call's time includes the gap to the next.

    Returns:
        Median, 20th and 80th percentile over the replays; and the results in the order of the captured calls.

    Raises:
        HostWaitError: a call waits for the device. Found before the capture begins, which it would break.
        HostBoundError: the graph is too short for this host.
    """
    captured = CapturedCalls([*calls] * math.ceil(LEAST_CALLS / len(calls)))
    seconds = sorted(captured.replay_seconds(replays))
    median, p20, p80 = (seconds[round(q * (len(seconds) - 1))] for q in (0.5, 0.2, 0.8))
    launch = captured.launch_seconds()
    if launch > median:
        raise HostBoundError(f"the graph takes {median * 1e6:.0f} µs on the device, and the host {launch * 1e6:.0f} µs to launch it")
    count = len(captured.results)
    return {"median": median / count, "p20": p20 / count, "p80": p80 / count}, captured.results


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy much larger than the L2 cache."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    seconds, _ = time_calls([lambda: target.copy_(source)])
    return 2 * source.numel() * source.element_size() / seconds["median"]


def matmul_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOPs a second of a product of two large random square matrices."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with torch.no_grad():
        seconds, _ = time_calls([lambda: torch.mm(a, b, out=out)])
    return 2 * size**3 / seconds["median"]


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextmanager
def side_stream() -> Iterator[None]:
    """Everything that is to be captured, inputs and forward passes included, happens within this.

    The default stream cannot be captured, and a backward runs on the stream of its forward. Leaving it also undoes what
    `torch.cuda.graph` leaves behind when a capture fails: it ends the capture before it restores the stream.
    """
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()


class CapturedCalls:
    """Calls in one CUDA graph, captured on the current stream, and what they return."""

    def __init__(self, calls: Sequence[Call]):
        for _ in range(2):  # compiles, loads modules, chooses algorithms and allocates workspaces, none of which may happen in a capture
            calls[0]()
        _refuse_host_waits(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
            self.results = [call() for call in calls]

    def replay_seconds(self, replays: int) -> list[float]:
        """Seconds of each replay. All are queued at once: a wait in between would add the launch of the next one."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + replays + 1)]
        events[0].record()
        for event in events[1:]:
            self._graph.replay()
            event.record()
        events[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)][WARM_UP:]

    def launch_seconds(self) -> float:
        """Seconds that the host takes to launch the graph while the device is idle."""
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._graph.replay()
            seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return sorted(seconds)[2]


def _refuse_host_waits(calls: Sequence[Call]) -> None:
    """Make every call once, with PyTorch's waits for the device forbidden.

    A wait inside a capture ends it in a way that PyTorch does not recover from: its allocator and random generators stay in
    capture mode, and the calls after it fail or hang.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise HostWaitError("it waits for the device on the host, to read an index tensor or to send one") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
