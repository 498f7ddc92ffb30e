"""Many requests on one model: continuous batching. Callers submit from any thread; one worker thread runs the model."""

import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from granite_speech.engine.counters import Counters
from granite_speech.engine.cpu_threads import without_team
from granite_speech.engine.handle import Handle, check_process
from granite_speech.engine.loop import WorkerLoop
from granite_speech.engine.pages import PAGE_SIZE
from granite_speech.engine.requests import Prompt, Repetition, Request, engine_options
from granite_speech.engine.worker import Worker
from granite_speech.errors import InputError
from granite_speech.generation.stop_strings import StopStrings
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.recordings import samples_of
from granite_speech.inputs.requests import transcript_request

__all__ = ["Engine"]

_MAX_ROWS = {"cuda": 128, "cpu": 48}
_TOKENS_A_ROW = 1024
_LONGEST_PROMPT = 131_072  # 3.6 hours of audio
_SHARE_OF_FREE_MEMORY = 0.5


class Engine:
    """Answers many requests at once with one model. Requests join and leave between decode steps.

    What a request gets does not depend on the others: not its greedy tokens, and not those drawn with its seed. The model must
    not be moved, trained or given other modules or adapters while an engine uses it; weights may change in place between requests.
    Hooks see padded batches of the requests that happen to run together.

    `with Engine(model, processor) as engine:` closes it at the end. An engine that nobody holds any more, and every engine when the
    interpreter exits, cancels what is left and ends its thread. After a fork, the engine exists in the parent alone: in the child,
    everything raises EngineError.

    Args:
        model: in evaluation mode, on the device where it should run.
        processor: of the same checkpoint; None if requests come as `inputs` and nobody needs `Answer.text`.
        max_rows: answers in progress at once; others wait. 128 on a GPU and 48 on a CPU if omitted.
        max_pages: pages of keys and values, 16 tokens each, all allocated at once; if omitted, 1,024 tokens for each row, and no fewer
            than the model's context or 131,072 tokens, whichever is shorter, but at most half of the GPU's free memory. If they run
            out, requests wait, or begin again later; no answer changes.

    Raises:
        InputError: a model in training mode, or sizes that are not integers from 1.
    """

    def __init__(self, model: Any, processor: GraniteSpeechProcessor | None, max_rows: int | None = None, max_pages: int | None = None):
        if model.training:
            raise InputError(got="a model in training mode", expected="one in evaluation mode", remedy="Call model.eval() first")
        for name, size in (("max_rows", max_rows), ("max_pages", max_pages)):
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise InputError(got=f"{name}={size!r:.60}", expected="an integer from 1", remedy="Omit it for the default")
        max_rows = _MAX_ROWS.get(model.device.type, _MAX_ROWS["cuda"]) if max_rows is None else max_rows
        max_pages = _pages_by_default(model, max_rows) if max_pages is None else max_pages
        self.model, self.processor = model, processor
        self.max_rows, self.max_pages, self.page_size = max_rows, max_pages, PAGE_SIZE
        self._process = os.getpid()
        self._request_text: tuple[tuple[str, date], str] | None = None
        self._loop = WorkerLoop(Worker(model, max_rows, max_pages), model.device)
        # The thread refers to the loop alone, so that an engine that nobody holds is collected. This also runs at exit.
        self._finalizer = weakref.finalize(self, self._loop.close, cancel=True)

    def submit(
        self,
        text: str | None = None,
        audio: Any = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        sampling_rate: int | None = None,
        max_new_tokens: int = 400,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_on_repetition: bool = False,
        ctc: bool = False,
        **options: Any,
    ) -> Handle:
        """Ask for an answer. Decoding of files and log-mel features run in the caller's thread; then this returns at once.

        Args:
            text: a prompt with one `<|audio|>` for each clip; if omitted, the checkpoint's own request for a transcript.
            audio: a clip, or a list of them, as the processor takes them; or a file that `granite_speech.load_audio` reads, as a
                path, an open file or bytes.
            inputs: what the processor returned for one prompt, in place of text and audio.
            sampling_rate: of arrays in `audio`, in Hz; None for the processor's.
            max_new_tokens: most tokens of the answer. An answer also ends, with finish_reason "length", where max_pages would not
                hold it.
            temperature, top_k, top_p, seed: any of them asks for sampling; temperature 0 is greedy. The same seed draws the same
                tokens, whatever else the engine does; without one, it comes from torch's default generator.
            repetition_penalty: as for `generate`.
            stop: a string or strings that end the answer, and stay in it, as stop_strings for `generate`.
            stop_on_repetition: end an answer that repeats the same tokens: a block of up to 64, at least 4 times and 32 tokens.
            ctc: also give the log-probabilities of the encoder's CTC head, as `Answer.ctc_logprobs`.
            options: others of `generate` for one greedy or sampled answer, such as min_new_tokens or eos_token_id.

        Returns:
            A handle: wait for `result()`, iterate over token ids as they arrive, `await` it, or `cancel()` it.

        Raises:
            EngineError: the engine is closed, its worker has failed, or it belongs to another process.
            InputError, AudioError: inputs or options that cannot be used, or a prompt that max_pages cannot hold.
        """
        check_process(self._process)
        self._loop.check_open()
        call = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty, "seed": seed}
        call |= {"max_new_tokens": max_new_tokens, "stop_strings": stop} | options
        with torch.no_grad(), without_team() if self.model.device.type == "cpu" else nullcontext():
            inputs = self._inputs(text, audio, sampling_rate) if inputs is None else _alone(inputs, text, audio)
            request = self._request(Prompt.of(self.model, inputs), call)
        request.repetition, request.wants_ctc = Repetition() if stop_on_repetition else None, ctc
        if request.options.max_new_tokens == 0:
            request.handle.finish("length")
        else:
            self._loop.submit(request)
        return request.handle

    def _request(self, prompt: Prompt, call: dict[str, Any]) -> Request:
        options, tokens = engine_options(call, self.model, len(prompt.ids)), len(prompt.ids)
        room = self.max_pages * PAGE_SIZE - tokens
        if room < 0:
            raise InputError(
                got=f"a prompt of {tokens} tokens",
                expected=f"at most {self.max_pages * PAGE_SIZE}, which max_pages={self.max_pages} holds",
                remedy="Make the engine with more pages, or the recording shorter",
            )
        options = replace(options, max_new_tokens=min(options.max_new_tokens, room + 1))  # the last token needs no key
        stops = self._stops(options.stop_strings, prompt) if options.stop_strings else None
        return Request(prompt, options, _seed(call["seed"]), Handle(self, partial(_text, self.processor)), stops)

    def _stops(self, strings: tuple[str, ...], prompt: Prompt) -> StopStrings:
        if self.processor is None:
            raise InputError(
                got="stop strings for an engine without a processor",
                expected="one that gives the text of tokens",
                remedy="Make the engine with a processor",
            )
        return StopStrings(strings, self.processor, [prompt.ids.tolist()])

    def warmup(self) -> None:
        """Capture CUDA graphs of the greedy decode step for every number of rows. Otherwise each is captured when it first occurs.

        Stages for audio and prompts are captured after they first occur. Does nothing on a device without CUDA graphs.
        """
        check_process(self._process)
        self._loop.call(Worker.want_steps)

    def counters(self) -> Counters:
        """What the engine has done and is doing. The object does not change afterwards."""
        return self._loop.worker.snapshot()

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, finish those that there are, and end the thread. Closing twice does nothing.

        Args:
            cancel: cancel them instead; their handles then have finish_reason "cancelled".

        Raises:
            EngineError: in a process that was forked from the engine's.
        """
        check_process(self._process)
        self._loop.close(cancel)
        self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _inputs(self, text: str | None, audio: Any, sampling_rate: int | None) -> Mapping[str, Any]:
        """The processor's inputs of one prompt."""
        if self.processor is None or (text is None and audio is None):
            raise InputError(
                got="text and audio for an engine without a processor" if self.processor is None else "neither text nor audio",
                expected="a prompt",
                remedy="Make the engine with a processor, or pass inputs" if self.processor is None else "Pass text, audio or both",
            )
        if text is None:
            text = self._transcript_request()
        if audio is not None:
            audio, sampling_rate = samples_of(audio, self.processor, sampling_rate)
        return self.processor(text, audio, device=self.model.device, sampling_rate=sampling_rate)

    def _transcript_request(self) -> str:
        """The checkpoint's own request, rendered once a day: templates may name the date, and rendering takes half of a submit's time."""
        made_of = str(self.processor.chat_template), date.today()
        if self._request_text is None or self._request_text[0] != made_of:
            self._request_text = made_of, transcript_request(self.processor, model_type=self.model.config.model_type)
        return self._request_text[1]


def _pages_by_default(model: Any, max_rows: int) -> int:
    config = model.config.text_config
    tokens = max(max_rows * _TOKENS_A_ROW, min(config.max_position_embeddings, _LONGEST_PROMPT))
    pages = -(-tokens // PAGE_SIZE)
    if model.device.type != "cuda" or not torch.cuda.is_available():
        return pages
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.attention_head_dim
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(pages, int(free * _SHARE_OF_FREE_MEMORY) // (numbers * PAGE_SIZE * model.dtype.itemsize)))


def _alone(inputs: Mapping[str, Any], text: str | None, audio: Any) -> Mapping[str, Any]:
    if text is not None or audio is not None:
        raise InputError(
            got="inputs together with text or audio", expected="one of the two", remedy="Pass what the processor returned alone"
        )
    return inputs


def _text(processor: GraniteSpeechProcessor | None, ids: list[int]) -> str:
    return "" if processor is None else processor.decode(ids, skip_special_tokens=True)


def _seed(seed: int | None) -> int:
    """A seed as a signed number of 64 bits."""
    if seed is None:
        return int(torch.randint(-(1 << 63), (1 << 63) - 1, ()))
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise InputError(got=f"seed={seed!r:.60}", expected="an integer", remedy="Pass an integer, or omit it")
    return (int(seed) + (1 << 63)) % (1 << 64) - (1 << 63)
