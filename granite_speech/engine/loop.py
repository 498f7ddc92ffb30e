"""An engine's thread: requests on their way to a worker, which runs the model. Callers submit from any thread."""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

import torch

from granite_speech.engine.counters import Counters
from granite_speech.engine.handle import Handle
from granite_speech.engine.runtime import current_device
from granite_speech.errors import EngineError
from granite_speech.modules.transfers import record_event

__all__ = ["LoopRequest", "LoopWorker", "WorkerLoop"]


class LoopRequest(Protocol):
    """What the loop knows of a request.

    Attributes:
        handle: what the caller holds.
        computed: an event on the GPU after which its inputs exist; None: they do.
    """

    handle: Handle
    computed: torch.cuda.Event | None


class LoopWorker(Protocol):
    """What does the work. The loop's thread alone calls `turn`, `add` and `cancel`."""

    @property
    def busy(self) -> bool:
        """Whether a turn has anything to do."""

    def requests(self) -> Sequence[LoopRequest]:
        """All requests that have not ended."""

    def add(self, request: Any) -> None:
        """A new request."""

    def cancel(self, request: Any) -> None:
        """End a request at the next turn."""

    def turn(self) -> None:
        """Do some of the work."""

    def snapshot(self) -> Counters:
        """The counters now."""


class WorkerLoop:
    """The worker's thread, and the requests on their way to it.

    Args:
        worker: of one model.
        device: of the model.
    """

    def __init__(self, worker: LoopWorker, device: torch.device):
        self.worker, self._device, self._process = worker, device, os.getpid()
        self._changed = threading.Condition()
        self._new: deque[LoopRequest] = deque()
        self._cancelled: deque[LoopRequest] = deque()
        self._calls: deque[tuple[Callable[[Any], None], Future[None]]] = deque()
        self._closing = self._cancels = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="granite-speech-engine", daemon=True)
        self._thread.start()

    def check_open(self) -> None:
        if self._error is not None:
            raise EngineError(
                got=f"a request to an engine whose worker failed with {self._error!r:.200}",
                expected="a running engine",
                remedy="Make a new Engine",
            ) from self._error
        if self._closing:
            raise EngineError(got="a request to a closed engine", expected="an open one", remedy="Make a new Engine")

    def submit(self, request: LoopRequest) -> None:
        # Its features may have been computed on another stream than the worker's.
        with current_device(self._device):
            request.computed = record_event() if self._device.type == "cuda" and torch.cuda.is_available() else None
        request.handle.on_cancel = partial(self._post, self._cancelled, request)
        self._post(self._new, request, check=True)

    def call(self, function: Callable[[Any], None]) -> None:
        """Have the worker's thread call a function, and wait for that."""
        called: Future[None] = Future()
        self._post(self._calls, (function, called), check=True)
        called.result()

    def close(self, cancel: bool) -> None:
        """End the thread, after the requests or, with `cancel`, without them."""
        if os.getpid() != self._process:
            return  # after a fork the thread does not exist, and the lock may never be released
        with self._changed:
            self._closing, self._cancels = True, self._cancels or cancel
            self._changed.notify()
        if threading.current_thread() is not self._thread:  # the last reference may be dropped there
            self._thread.join()

    def _post(self, queue: deque, item: Any, check: bool = False) -> None:
        with self._changed:
            if check:
                self.check_open()
            queue.append(item)
            self._changed.notify()

    def _run(self) -> None:
        try:
            with current_device(self._device), torch.no_grad():
                while self._take():
                    self.worker.turn()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._fail(error)

    def _take(self) -> bool:
        """Wait for work, and give it to the worker. False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self.worker.busy or self._new or self._cancelled or self._calls or self._closing)
            while self._new:
                request = self._new[0]
                if request.computed is not None:
                    request.computed.wait()
                self.worker.add(request)
                self._new.popleft()  # only now, so that an error above reaches the request
            cancelled = self.worker.requests() if self._cancels else list(self._cancelled)
            self._cancelled.clear()
            calls = list(self._calls)
            self._calls.clear()
            ends = self._closing and not self.worker.busy
        for request in cancelled:
            self.worker.cancel(request)
        for function, called in calls:
            try:
                called.set_result(function(self.worker))
            except Exception as error:
                called.set_exception(error)
        return not ends

    def _fail(self, error: BaseException) -> None:
        """End everything with the worker's error."""
        with self._changed:
            self._error = error
            requests = [*self.worker.requests(), *self._new]
            calls = list(self._calls)
            self._new.clear()
            self._calls.clear()
        for request in requests:
            request.handle.fail(error)
        for _, called in calls:
            called.set_exception(error)
