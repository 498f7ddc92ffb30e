"""`generate`: one packed prefill of all prompts, then one token per row and step through the paged cache."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from granite_kernels.launch import Launch, recorded_launches
from torch import Tensor

from granite_speech.engine.beams import search_beams
from granite_speech.engine.decoding import Decoding, Prompts, prepare
from granite_speech.engine.encoding import encode
from granite_speech.engine.prefill import prefill
from granite_speech.engine.runtime import Runtime
from granite_speech.engine.warmup import silence
from granite_speech.errors import InputError
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.stop_strings import StopStrings
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.outputs import BaseModelOutputWithPooling, GenerateOutput
from granite_speech.modules.packing import Segments
from granite_speech.modules.prompts import ModelInputs
from granite_speech.modules.transfers import on_device

__all__ = ["Generation", "launches_of_generate"]


class Generation:
    """`generate`, for a model with `states`, `decoder`, `language_model` and `text_config`."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        input_features_lengths: list[int] | Tensor | None = None,
        generation_config: Any = None,
        *,
        generator: torch.Generator | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Answer prompts greedily, by sampling or with beam search, as transformers 5.17 does.

        Args:
            input_ids, attention_mask, input_features, input_features_mask, input_features_lengths: the prompts, padded on the
                left, as the processor returns them. An answer does not depend on its prompt's padding or neighbours; neither
                does a repetition penalty.
            generation_config: a dictionary of options, or an object with options as attributes.
            generator: source of random numbers, on the model's device; torch's default generator if omitted.
            streamer: an object with `put(ids)` and `end()`, for one prompt with one answer and no beams. `put` gets the prompt
                `(1, columns)`, then each new token `(1,)`, on the host.
            tokenizer: gives the text of tokens, for stop_strings; the processor's.
            options: those of `GenerationOptions`, for example max_new_tokens, do_sample and num_beams. They override
                generation_config, which overrides the checkpoint's generation_config.json, which overrides the token ids of the
                text configuration. None means not set.

        Returns:
            `(batch * num_return_sequences, prompt + new tokens)` in the dtype of input_ids, prompts included, the answers to one
            prompt next to each other; with return_dict_in_generate a `GenerateOutput` that holds it.

        Raises:
            InputError: an unknown option, one out of range, options that contradict each other, or inputs that `forward` refuses.
        """
        inputs = ModelInputs(
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_features=input_features,
            input_features_mask=input_features_mask,
            input_features_lengths=input_features_lengths,
            use_cache=True,
        )
        self.switch_by_audio(input_features is not None)
        try:
            return self._answer(inputs, options, generation_config, generator, streamer, tokenizer)
        finally:
            # Also after an error: another thread may be waiting for the end.
            if callable(getattr(streamer, "end", None)):
                streamer.end()

    def _answer(
        self, inputs: ModelInputs, call: dict[str, Any], generation_config: Any, rng: torch.Generator | None, streamer: Any, tokenizer: Any
    ) -> Tensor | GenerateOutput:
        ids = inputs.input_ids
        _check_ids(ids)
        options = GenerationOptions.resolve(call, generation_config, self.generation_config, self.text_config, ids.shape[1])
        _check_generator(rng, self.device)
        _check_tokenizer(options, tokenizer)
        _check_streamer(streamer, options, len(ids))
        host = inputs.on_host()
        _check_padding(host.attention_mask)
        if streamer is not None:
            streamer.put(host.input_ids)
        shown = ids.repeat_interleave(options.num_return_sequences, 0)
        if options.max_new_tokens == 0 or len(ids) == 0:
            output = GenerateOutput(shown)
        else:
            with self.runtime.session(self) as runtime, _prefill(self, runtime, options, inputs, host, tokenizer) as prompts:
                if options.num_beams == 1:
                    output = Decoding(self, runtime, options, prompts, rng, streamer).run()
                else:
                    output = search_beams(self, options, prompts, rng)
            output.sequences = torch.cat((shown, output.sequences.to(ids.dtype)), dim=1)
        return output if options.return_dict_in_generate else output.sequences

    def get_audio_features(self, *arguments: Any, **options: Any) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            return super().get_audio_features(*arguments, **options)
        with self.runtime.session(self):
            return super().get_audio_features(*arguments, **options)

    def encode_packed(self, frames: Tensor, clips: Segments) -> tuple[Tensor, Tensor, Segments]:
        running = self.runtime.running
        # Outside a session another thread may be using the stages.
        return super().encode_packed(frames, clips) if running is None else encode(self, running.encoder_graphs, frames, clips)

    def warmup(
        self,
        rows: Sequence[int] = (1,),
        seconds: Sequence[float] = (10.0,),
        *,
        text_tokens: int = 48,
        max_new_tokens: int = 200,
        **options: Any,
    ) -> None:
        """Compile kernels and capture CUDA graphs. Otherwise the first request of a size runs without graphs.

        Requests of other sizes or options are right too; what they need is captured after the first of them. On a device without
        CUDA graphs this runs one request, which compiles what can be compiled.

        Args:
            rows: numbers of answers in one call of `generate`.
            seconds: lengths of the clips, one in each prompt.
            text_tokens: tokens of a prompt without its audio.
            max_new_tokens, options: of the requests, as for `generate`. Steps depend on which rules choose a token, so pass
                do_sample, repetition_penalty and the like if requests have them.

        Raises:
            InputError: options that `generate` refuses, or sizes that no request has.
        """
        if not rows or not seconds or min(rows) < 1 or min(seconds) <= 0:
            raise InputError(
                got=f"warmup(rows={list(rows)!r:.100}, seconds={list(seconds)!r:.100})",
                expected="at least one number of rows from 1, and one length above 0",
                remedy="Pass the sizes that requests will have",
            )
        with torch.no_grad():
            # Largest first: a state that grows later would drop the graphs of the smaller one.
            for count, length in sorted(product(rows, seconds), reverse=True):
                self._rehearse(silence(self, count, length, text_tokens), {"max_new_tokens": max_new_tokens, **options})
                if not self.runtime.decoder_graphs.can_capture:
                    return
            with self.runtime.session(self):
                pass  # captures what was asked for

    def _rehearse(self, inputs: ModelInputs, call: dict[str, Any]) -> None:
        columns = inputs.input_ids.shape[1]
        options = GenerationOptions.resolve(call, None, self.generation_config, self.text_config, columns)
        with self.runtime.session(self) as runtime, _prefill(self, runtime, options, inputs, inputs.on_host(), None) as prompts:
            # With its own generator, so that a warm-up does not change what a request draws.
            Decoding(self, runtime, options, prompts, torch.Generator(self.device).manual_seed(0), None).rehearse()

    @property
    def runtime(self) -> Runtime:
        """Pages, decode state and graphs, which stay between requests."""
        if "_runtime" not in self.__dict__:
            self.__dict__["_runtime"] = Runtime()  # not a submodule: it has no parameters and is not saved
        return self.__dict__["_runtime"]

    @property
    def use_graphs(self) -> bool:
        """Whether steps are captured in CUDA graphs, where the device can. Set it to False to run everything eagerly."""
        return self.runtime.use_graphs

    @use_graphs.setter
    def use_graphs(self, value: bool) -> None:
        self.runtime.use_graphs = bool(value)


@contextmanager
def _prefill(
    model: Generation, runtime: Runtime, options: GenerationOptions, inputs: ModelInputs, host: ModelInputs, tokenizer: Any
) -> Iterator[Prompts]:
    """Run the prompts. Their pages are given back at the end of the block.

    Args:
        model: the model.
        runtime: whose pages to use.
        options: of the request.
        inputs: the prompts, on the model's device, with use_cache.
        host: `inputs.on_host()`.
        tokenizer: for stop strings.
    """
    copies = max(options.num_beams, options.num_return_sequences)
    ids, host_ids = inputs.input_ids, host.input_ids
    kept = torch.ones_like(host_ids, dtype=torch.bool) if host.attention_mask is None else host.attention_mask != 0
    lengths = [length for length in kept.sum(1).tolist() for _ in range(copies)]
    prepare(runtime, options, lengths, model.text_config.vocab_size)
    cache = PagedCache(model.text_config, len(ids), dtype=model.dtype, device=model.device, pool=runtime.pool)
    try:
        inputs, host = (replace(one, past_key_values=cache) for one in (inputs, host))
        prompt = model.pack_prompt(inputs, host)
        cache.reserve(list(prompt.rows.segments.lengths))
        logits = prefill(model, runtime.decoder_graphs, prompt, inputs)
        if copies > 1:
            cache.reorder([row for row in range(len(cache)) for _ in range(copies)])
            logits, ids, host_ids, kept = (one.repeat_interleave(copies, 0) for one in (logits, ids, host_ids, kept))
        stops = None
        if options.stop_strings:
            texts = [row[keep].tolist() for row, keep in zip(host_ids, kept, strict=True)]
            stops = StopStrings(options.stop_strings, tokenizer, texts)
        yield Prompts(cache, logits, ids, on_device(kept, model.device), stops)
    finally:
        cache.release()


@torch.no_grad()
def launches_of_generate(model: Generation, inputs: Mapping[str, Any], architecture: int, max_new_tokens: int) -> list[Launch]:
    """The kernel launches of `generate`'s prefill and one decode step, recorded without weights and without a GPU.

    Args:
        model: on the meta device, in the dtype of the call.
        inputs: as the processor returns them, on the CPU.
        architecture: of the GPU, as `granite_kernels.launch.architecture` gives it.
        max_new_tokens: of the call.
    """
    host = ModelInputs(**inputs, use_cache=True)
    on_meta = replace(host, **{name: one.to("meta") for name, one in inputs.items() if isinstance(one, Tensor)})
    text_config, columns = model.text_config, host.input_ids.shape[1]
    options = GenerationOptions.resolve({"max_new_tokens": max_new_tokens}, None, model.generation_config, text_config, columns)
    with (
        recorded_launches(architecture) as launches,
        model.runtime.session(model) as runtime,
        _prefill(model, runtime, options, on_meta, host, None) as prompts,
    ):
        Decoding(model, runtime, options, prompts, None, None).rehearse()
    return launches


def _check_ids(input_ids: Any) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        shape = f" and shape {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else ""
        raise InputError(
            got=f"input_ids of type {type(input_ids).__name__}{shape}",
            expected="a tensor (batch, sequence)",
            remedy="Use what the processor returns",
        )
    if input_ids.shape[1] == 0:
        raise InputError(got="empty prompts", expected="at least one token in each", remedy="Give the model a text to continue")


def _check_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and not bool(attention_mask[:, -1:].all()):
        raise InputError(got="prompts padded on the right", expected="padding on the left", remedy="Set tokenizer.padding_side = 'left'")


def _check_generator(generator: Any, device: torch.device) -> None:
    if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != device.type):
        where = f" on {generator.device}" if isinstance(generator, torch.Generator) else ""
        raise InputError(
            got=f"generator of type {type(generator).__name__}{where}",
            expected=f"a torch.Generator on {device.type}",
            remedy=f"Pass torch.Generator('{device.type}').manual_seed(seed)",
        )


def _check_tokenizer(options: GenerationOptions, tokenizer: Any) -> None:
    if options.stop_strings and tokenizer is None:
        raise InputError(
            got=f"stop_strings={list(options.stop_strings)!r:.60} without a tokenizer",
            expected="a tokenizer, which gives the text of tokens",
            remedy="Pass tokenizer=processor.tokenizer",
        )


def _check_streamer(streamer: Any, options: GenerationOptions, batch: int) -> None:
    if streamer is None:
        return
    answers = batch * options.num_return_sequences
    if options.num_beams > 1 or answers != 1:
        raise InputError(
            got=f"a streamer for num_beams={options.num_beams} and {answers} answers",
            expected="one answer to one prompt, without beams, so that every token is final when it is chosen",
            remedy="Omit the streamer, or call generate for each prompt",
        )
    if not (callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))):
        raise InputError(
            got=f"a streamer of type {type(streamer).__name__}",
            expected="an object with put(ids) and end()",
            remedy="Pass one like transformers' TextStreamer",
        )
