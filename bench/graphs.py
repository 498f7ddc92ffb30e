"""Device time of calls, measured in a CUDA graph so that the host's launch time is not counted.

Only `CapturedCalls`, `side_stream` and `l2_bytes` need a GPU; tests on a CPU replace them.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

__all__ = ["HostBoundError", "HostWaitError", "copies_needed", "copy_rate", "matmul_rate", "replay_seconds", "side_stream", "time_calls"]

# Calls cycle through copies of their inputs that together hold this many times the L2 cache, counted in bytes the kernel must move.
# A library call touches at least a sixth of those bytes, so its copies also exceed the cache.
COLD = 8
# Limits to that: copies, and bytes that they hold together. Only calls of a few kilobytes need more, or those that look up rows of a table.
MOST_COPIES, MOST_HELD = 2000, 16e9
# With fewer calls, the start of the graph would dominate.
LEAST_CALLS = 10
# The first replays upload the graph and let the host get ahead of the device.
WARM_UP = 3

Call = Callable[[], Any]


class HostWaitError(RuntimeError):
    """A call makes the host wait for the device, which cannot be captured in a CUDA graph."""


class HostBoundError(RuntimeError):
    """Launching the graph takes longer than running it, so the replays would measure the host."""


def copies_needed(bytes_moved: int, l2: int, held: int = 0) -> int:
    """Number of input copies that keep the L2 cache cold when the calls cycle through them, within the limits.

    Args:
        bytes_moved: by a call.
        l2: bytes of the cache.
        held: bytes of memory that its inputs take.
    """
    most = min(MOST_COPIES, int(MOST_HELD / held) if held else MOST_COPIES)
    return max(1, min(math.ceil(COLD * l2 / bytes_moved), most))


def time_calls(calls: Sequence[Call], replays: int = 20, restore: Callable[[], None] | None = None) -> tuple[dict[str, float], list[Any]]:
    """Seconds per call on the device, and the calls' results.

    The calls are captured in order, repeated until there are at least `LEAST_CALLS`, and the graph is replayed. All results stay in
    memory, so no call writes to memory that the previous one has just written. A call's time includes the gap before the next call.

    Args:
        restore: of calls that write to their arguments: puts these back. Then the graph is replayed once more, so that results and
            arguments are those of one call.

    Returns:
        Median, 20th and 80th percentile over the replays; and the results in the order of the captured calls.

    Raises:
        HostWaitError: a call makes the host wait. Raised before the capture, which the wait would break.
        HostBoundError: the graph is too short for this host.
    """
    captured = CapturedCalls([*calls] * math.ceil(LEAST_CALLS / len(calls)))
    seconds = sorted(captured.replay_seconds(replays))
    median, p20, p80 = (seconds[round(q * (len(seconds) - 1))] for q in (0.5, 0.2, 0.8))
    launch = captured.launch_seconds()
    if launch > median:
        raise HostBoundError(f"the graph takes {median * 1e6:.0f} µs on the device, but {launch * 1e6:.0f} µs to launch")
    if restore is not None:
        restore()
        captured.replay()
    count = len(captured.results)
    return {"median": median / count, "p20": p20 / count, "p80": p80 / count}, captured.results


def copy_rate() -> float:
    """Bytes per second, read plus written, for a copy much larger than the L2 cache."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    seconds, _ = time_calls([lambda: target.copy_(source)])
    return 2 * source.numel() * source.element_size() / seconds["median"]


def matmul_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of the product of two large random square matrices."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with torch.no_grad():
        seconds, _ = time_calls([lambda: torch.mm(a, b, out=out)])
    return 2 * size**3 / seconds["median"]


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def replay_seconds(replay: Callable[[], None], replays: int) -> list[float]:
    """Seconds of each replay on the current stream, after WARM_UP others.

    All are queued at once: waiting between them would add the next launch to the time.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UP + replays + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)][WARM_UP:]


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextmanager
def side_stream() -> Iterator[None]:
    """Run on a side stream everything to be captured, including making the inputs and forward passes.

    The default stream cannot be captured, and a backward pass runs on the stream of its forward pass. Leaving this context also
    restores the stream after a failed capture: `torch.cuda.graph` does not, because ending the capture fails first.
    """
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()


class CapturedCalls:
    """Calls captured in one CUDA graph on the current stream, and their results."""

    def __init__(self, calls: Sequence[Call]):
        for _ in range(2):  # compiles, loads modules, picks algorithms and allocates workspaces: not allowed during a capture
            calls[0]()
        _refuse_host_waits(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
            self.results = [call() for call in calls]

    def replay(self) -> None:
        """Make the calls again: they write to the same results."""
        self._graph.replay()

    def replay_seconds(self, replays: int) -> list[float]:
        """Seconds of each replay."""
        return replay_seconds(self._graph.replay, replays)

    def launch_seconds(self) -> float:
        """Seconds the host takes to launch the graph while the device is idle."""
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._graph.replay()
            seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return sorted(seconds)[2]


def _refuse_host_waits(calls: Sequence[Call]) -> None:
    """Make every call once in PyTorch's mode that refuses synchronizing operations.

    PyTorch does not recover from a synchronization inside a capture: its allocator and random generators stay in capture mode, and
    later calls fail or hang.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise HostWaitError("the host waits for the device, to read or send an index tensor") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
