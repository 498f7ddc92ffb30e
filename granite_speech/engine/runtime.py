"""What one model keeps between requests: pages, the state of the decode step, and captured graphs.

Parameters are the only source of truth. Graphs read them at their addresses, so a weight that changes in place changes the next
answer. When a parameter or a module is replaced or moved, everything that was captured is dropped.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from granite_kernels import OPERATIONS
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from granite_speech.engine.graphs import CudaCapture, Graphs
from granite_speech.engine.prefill import PromptBucket
from granite_speech.engine.state import DecodeState, StateSize
from granite_speech.modules import transfers
from granite_speech.modules.add_norm import has_kernels
from granite_speech.modules.autocast import autocast_dtype
from granite_speech.modules.cache import PagePool
from granite_speech.modules.encoder import GraniteSpeechCTCEncoder
from granite_speech.modules.int8_layers import pack_layers
from granite_speech.modules.language_model import GraniteModel
from granite_speech.modules.layers_in_use import LayersInUse
from granite_speech.modules.side_by_side import arrange
from granite_speech.modules.snapshot import Snapshot

__all__ = ["FollowedGraphs", "Runtime", "current_device"]

Capture = Callable[[Callable[[], None]], Callable[[], None]]


def _cuda_capture(device: torch.device) -> Capture | None:
    return CudaCapture(device) if device.type == "cuda" and torch.cuda.is_available() else None


class Runtime:
    """Pages, state and graphs of one model. A copy of the model gets a new one.

    Args:
        use_graphs: whether to capture graphs.
        page_size: tokens per page.

    Attributes:
        use_graphs: whether to capture graphs.
        make_capture: gives the function that captures on a device, or None if the device cannot.
        encoder_graphs: of the encoder and projector.
        decoder_graphs: of the language model: they read pages, and are dropped when those move.
        pool: pages of all answers in progress.
        state: of the decode step, once there was a request.
        layers: the model's, fused.
    """

    def __init__(self, use_graphs: bool = True, page_size: int = 64) -> None:
        self.use_graphs, self.page_size = use_graphs, page_size
        self.make_capture: Callable[[torch.device], Capture | None] = _cuda_capture
        self._lock = threading.Lock()
        self._sessions = threading.local()
        self.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.use_graphs, self.page_size)  # for copy and pickle: nothing else here is part of the model

    def clear(self) -> None:
        """Free all memory and drop all graphs."""
        self.encoder_graphs, self.decoder_graphs = Graphs(None), Graphs(None)
        self.pool: PagePool | None = None
        self.state: DecodeState | None = None
        self.layers: LayersInUse | None = None
        self._model: Snapshot | None = None
        self._pages: Tensor | None = None
        self._finished: torch.cuda.Event | None = None

    @contextmanager
    def session(self, model: nn.Module) -> Iterator["Runtime"]:
        """One request. Another at the same time, from a second thread or a streamer, gets a runtime of its own, without graphs."""
        with current_device(model.device):
            yield from self._session(model)

    def _session(self, model: nn.Module) -> Iterator["Runtime"]:
        if not self._lock.acquire(blocking=False):
            alone = Runtime(use_graphs=False)
            alone.follow(model)
            with self._entered(alone):
                yield alone
            return
        try:
            if self._finished is not None:
                self._finished.wait()  # the last request may have run on another stream, and its last step is not waited for
            self.follow(model)
            self.capture_wanted()
            with self._entered(self):
                yield self
        finally:
            if model.device.type == "cuda":
                self._finished = transfers.record_event()
            self._lock.release()

    @property
    def running(self) -> "Runtime | None":
        """The runtime of this thread's innermost session; None outside a session."""
        return getattr(self._sessions, "innermost", None)

    @contextmanager
    def _entered(self, runtime: "Runtime") -> Iterator[None]:
        before, self._sessions.innermost = self.running, runtime
        try:
            yield
        finally:
            self._sessions.innermost = before

    def follow(self, model: nn.Module) -> None:
        """Make pages and graphs fit the model as it is now, after moving its weights side by side if they are not."""
        if not model.training and type(model.decoder) is GraniteModel:
            arrange(model.decoder, model.language_model.lm_head)
            pack_layers(model)
            encoder = getattr(model, "encoder", None)
            # Without kernels the encoder calls its modules one by one, and does not read their weights as one matrix.
            if isinstance(encoder, GraniteSpeechCTCEncoder) and has_kernels(encoder.out.weight):
                arrange(encoder)
        if self.pool is None or (self.pool.keys[0].dtype, self.pool.keys[0].device) != (model.dtype, model.device):
            self.clear()
            self.pool = PagePool(model.text_config, dtype=model.dtype, device=model.device, page_size=self.page_size)
        if self.layers is None or self.layers.model is not model:
            self.layers = LayersInUse(model)
        self.layers.forget_copies()
        can_capture = self.use_graphs and _can_be_captured(model)
        if not can_capture or self._model is None or not self._model.is_current():
            capture = self.make_capture(model.device) if can_capture else None
            self._model = None if capture is None else Snapshot(model)
            if capture is not None and self._model.have_hooks():
                capture = None  # hooks are Python code that must run at every step
            self.encoder_graphs, self.decoder_graphs = Graphs(capture), Graphs(capture)

    def capture_wanted(self) -> None:
        """Capture what requests have asked for since the last time."""
        self.encoder_graphs.capture_wanted()
        self.decoder_graphs.capture_wanted()

    def decode_state(self, size: StateSize, vocab_size: int) -> DecodeState:
        """A state of at least this size on the present pages. Steps of an earlier state and graphs on earlier pages are dropped."""
        state = self.state
        size = size if state is None else size.union(state.size)
        if state is None or (state.vocab_size, state.size) != (vocab_size, size):
            self.state = DecodeState(size, vocab_size, self.pool)
        if self.state is not state:
            self.decoder_graphs.drop(keep=lambda key: isinstance(key, PromptBucket))
        self.follow_pages()
        return self.state

    def follow_pages(self) -> None:
        """Drop the graphs that read pages if those have moved, as they do when the pool grows."""
        if self._pages is not self.pool.keys[0]:
            self.decoder_graphs.drop()
            self._pages = self.pool.keys[0]


class FollowedGraphs:
    """Graphs of a model without pages, dropped when a parameter or module of it is replaced or moved.

    Attributes:
        graphs: of the model as it was at the last `follow`.
    """

    def __init__(self) -> None:
        self.graphs = Graphs(None)
        self._model: Snapshot | None = None

    def follow(self, model: nn.Module) -> None:
        """Make them fit the model as it is now."""
        if not model.training:
            pack_layers(model)
            if has_kernels(model.encoder.out.weight):
                arrange(model.encoder)
        can_capture = _can_be_captured(model)
        if not can_capture or self._model is None or not self._model.is_current():
            capture = _cuda_capture(model.device) if can_capture else None
            self._model = None if capture is None else Snapshot(model)
            has_hooks = capture is not None and self._model.have_hooks()
            self.graphs = Graphs(None if has_hooks else capture)


def current_device(device: torch.device) -> AbstractContextManager:
    """Makes a GPU this thread's current one: events and replays go to the current stream of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" and torch.cuda.is_available() else nullcontext()


def _can_be_captured(model: nn.Module) -> bool:
    """Whether no step needs Python or a value on the host. References of our operations read lengths there."""
    if model.training or every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return False
    if autocast_dtype(model.device) is not None:
        return False  # a graph has the dtypes of the call that it was captured in
    return all(one.resolve(None, model.device, model.dtype) == "triton" for one in OPERATIONS.values())
