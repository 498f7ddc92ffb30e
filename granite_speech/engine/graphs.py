"""CUDA graphs of a model's fixed-shape work: captured once per shape, replayed on the same addresses, dropped together.

Launching a kernel costs the host 5 to 45 µs, and a decode step has more than a thousand launches. A captured step is one launch.
Captures need warm-up runs and take as long as an eager run, so a shape that is first seen inside a request runs eagerly, and is
captured before the next request.
"""

import gc
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol
from warnings import warn

import torch
from granite_kernels import KernelError

__all__ = ["CaptureWarning", "CudaCapture", "Graphs", "Stage"]


class Stage(Protocol):
    """Work of fixed shape on fixed addresses."""

    def run(self) -> None:
        """Do the work. It must not read from the device, and all that varies must be in the stage's tensors."""

    def reset(self) -> None:
        """Put the stage's tensors into a state in which `run` is harmless: it then runs twice to be captured."""


class CudaCapture:
    """Captures functions into CUDA graphs that share one memory pool.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture `function`; the result replays it on the current stream."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.no_grad():
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                function()  # compiles kernels, loads modules and creates handles, none of which can be captured
                self._stream.synchronize()
                self._capture(graph, function)
            torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, function: Callable[[], None]) -> None:
        collects = gc.isenabled()
        gc.disable()  # it might free another graph, which is not allowed in a capture
        try:
            # Another thread may use the GPU meanwhile; only this one's calls must be legal in a capture.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                self._abandon(graph)
                raise
            graph.capture_end()
        finally:
            if collects:
                gc.enable()

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed. Ending it raises too, before PyTorch's allocator has left the pool."""
        try:
            graph.capture_end()
        except RuntimeError:
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)


class CaptureWarning(UserWarning):
    """Work could not be captured in a CUDA graph. It runs without one: the results are the same, but it takes longer."""


@dataclass(frozen=True)
class _Captured:
    stage: Stage
    replay: Callable[[], None]


class Graphs:
    """The captured stages of one model.

    Args:
        capture: turns a function into one that replays it; None: nothing is ever captured.
    """

    def __init__(self, capture: Callable[[Callable[[], None]], Callable[[], None]] | None):
        self._capture = capture
        self._captured: dict[Hashable, _Captured] = {}
        self._wanted: dict[Hashable, Callable[[], Stage]] = {}

    @property
    def can_capture(self) -> bool:
        return self._capture is not None

    @property
    def has_wanted(self) -> bool:
        """Whether `capture_wanted` has anything to do."""
        return bool(self._wanted)

    def captured(self, key: Hashable) -> Stage | None:
        """The captured stage of this shape: fill its tensors, then `replay`."""
        found = self._captured.get(key)
        return None if found is None else found.stage

    def replay(self, key: Hashable) -> None:
        self._captured[key].replay()

    def keys(self) -> list[Hashable]:
        """Shapes of the captured stages."""
        return list(self._captured)

    def want(self, key: Hashable, make: Callable[[], Stage]) -> None:
        """Have the stage that `make` returns captured by the next `capture_wanted`."""
        if self.can_capture and key not in self._captured:
            self._wanted.setdefault(key, make)

    def capture_wanted(self) -> None:
        """Capture every stage that was asked for. Call it when no request is running."""
        while self._wanted:
            key, make = self._wanted.popitem()
            try:
                stage = make()
                stage.reset()
                replay = self._capture(stage.run)
            except (RuntimeError, KernelError) as error:
                self._capture = None
                self.drop()
                warn(f"no CUDA graphs from here on: capturing {key} failed with {error!r:.300}", CaptureWarning, stacklevel=2)
                return
            stage.reset()
            self._captured[key] = _Captured(stage, replay)

    def drop(self, keep: Callable[[Hashable], bool] = lambda key: False) -> None:
        """Forget captured and wanted stages, except those whose key `keep` accepts."""
        self._captured = {key: one for key, one in self._captured.items() if keep(key)}
        self._wanted = {key: one for key, one in self._wanted.items() if keep(key)}

    def __len__(self) -> int:
        """Captured stages."""
        return len(self._captured)
