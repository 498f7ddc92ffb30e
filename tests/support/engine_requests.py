"""Requests to an engine of a small model, their answers without one, and a gate that stops the engine's thread at a given call."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from granite_speech import Engine
from tests.support.small_models import AUDIO, small_model, text

__all__ = ["TIMEOUT", "Gate", "answer", "in_thread", "is_at_rest", "length", "prompt", "spoken_prompt"]

TIMEOUT = 60.0
MODEL = small_model()


def prompt(seed: int, tokens: int = 6) -> dict[str, Any]:
    """A prompt without audio."""
    return {"input_ids": text(tokens, torch.Generator().manual_seed(seed))[None]}


def spoken_prompt(seed: int, frames: int) -> dict[str, Any]:
    """A prompt with one clip."""
    rng = torch.Generator().manual_seed(seed)
    audio = torch.full((MODEL.projector.tokens(frames),), AUDIO)
    features = torch.randn(1, frames, MODEL.config.encoder_config.input_dim, generator=rng)
    return {"input_ids": torch.cat((text(3, rng), audio, text(4, rng)))[None], "input_features": features}


def length(tokens: int) -> dict[str, int]:
    """Options for an answer of exactly so many tokens."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens}


def answer(inputs: dict[str, Any], **options: Any) -> list[int]:
    """What `generate` answers to this prompt alone."""
    return MODEL.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


def is_at_rest(engine: Engine) -> bool:
    """Whether nothing is left of any request, and every request was counted once."""
    now = engine.counters()
    assert (now.waiting, now.prefilling, now.decoding, now.pages_used) == (0, 0, 0, 0)
    assert now.submitted == now.finished + now.cancelled + now.failed
    return True


def in_thread(function: Callable[..., Any], *given: Any) -> Future[Any]:
    """Call a function in a new thread, for which nobody waits at exit: a call that hangs fails its test alone."""
    result: Future[Any] = Future()

    def call() -> None:
        try:
            result.set_result(function(*given))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return result


class Gate:
    """Stops the thread that makes one of the calls of a function, until the gate is opened. Use it in a `with` block.

    Args:
        owner, name: the function's class or module, and its name there.
        call: which call is stopped, from 1.
    """

    def __init__(self, owner: Any, name: str, call: int = 1):
        self._patch, self._calls = pytest.MonkeyPatch(), 0
        self._reached, self._opened = threading.Event(), threading.Event()
        function = getattr(owner, name)

        def stop_or_call(*given: Any, **named: Any) -> Any:
            self._calls += 1
            if self._calls == call:
                self._reached.set()
                assert self._opened.wait(TIMEOUT), "nobody opened the gate"
            return function(*given, **named)

        self._patch.setattr(owner, name, stop_or_call)

    def wait(self) -> None:
        """Wait until a thread is stopped."""
        assert self._reached.wait(TIMEOUT), "no thread came to the gate"

    def open(self) -> None:
        """Let it go on."""
        self._opened.set()

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self._patch.undo()
