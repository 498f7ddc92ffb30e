"""`generate`: one packed prefill of all prompts, then one token per row and step through the paged cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from granite_kernels.launch import Launch, recorded_launches
from torch import Tensor

from granite_speech.engine.arguments import (
    Arguments,
    check_generator,
    check_streamer,
    check_tokenizer,
    first_token,
    moved,
    only_one,
    refuse_others,
)
from granite_speech.engine.beams import search_beams
from granite_speech.engine.decoding import Decoding, Prompts, prepare
from granite_speech.engine.encoding import encode
from granite_speech.engine.prefill import prefill
from granite_speech.engine.rules import Custom, Rules
from granite_speech.engine.runtime import Runtime
from granite_speech.engine.warmup import silence
from granite_speech.errors import InputError
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.stop_strings import StopStrings
from granite_speech.generation.transition_scores import transition_scores
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.layers_in_use import LayersInUse
from granite_speech.modules.outputs import BaseModelOutputWithPooling, GenerateOutput
from granite_speech.modules.packing import Segments
from granite_speech.modules.prompts import ModelInputs
from granite_speech.modules.transfers import on_device

__all__ = ["Generation", "launches_of_generate"]


class Generation:
    """`generate`, for a model with `states`, `decoder`, `language_model` and `text_config`.

    Attributes:
        adapts_embeddings: whether the adapter is on for prompts that are given as embeddings.
    """

    adapts_embeddings = True

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Any] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        input_features_lengths: list[int] | Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Answer prompts greedily, by sampling or with beam search, as transformers 5.17 does.

        Args:
            inputs: another name of input_ids.
            generation_config: a `GenerationConfig`, this package's or transformers', or a dictionary of options.
            logits_processor: callables `(input_ids, scores)` that return scores: `(rows, columns)`, prompts with their padding and
                answers, and `(rows, vocabulary)` float32.
            stopping_criteria: callables `(input_ids, scores)` that return a bool, or one for each row. The rows it is true for end.
            prefix_allowed_tokens_fn: `(number of the prompt, ids of the row)` → the tokens allowed next.
            streamer: an object with `put(ids)` and `end()`, without beams. `put` gets the prompts `(rows, columns)`, then each new
                token `(rows,)`, on the host.
            synced_gpus, assistant_model, negative_prompt_ids, negative_prompt_attention_mask, custom_generate, past_key_values:
                of transformers; None is accepted.
            input_ids, attention_mask, input_features, input_features_mask, input_features_lengths: the prompts, padded on the
                left, as the processor returns them. An answer does not depend on its prompt's padding or neighbours; neither
                does a rule such as a repetition penalty.
            inputs_embeds: `(rows, columns, hidden)` in place of input_ids, the adapter off; with input_ids, the answers are appended
                to those.
            position_ids: `(rows, columns)`; counted along each row if omitted.
            generator: source of random numbers, on the model's device; torch's default generator if omitted.
            tokenizer: gives the text of tokens, for stop_strings; the processor's.
            options: those of `GenerationOptions`, for example max_new_tokens, do_sample and num_beams. They override
                generation_config, which overrides `model.generation_config`. Those that do nothing give a warning.

        Returns:
            `(batch * num_return_sequences, prompt + new tokens)` in the dtype of input_ids, prompts included, the answers to one
            prompt next to each other; with return_dict_in_generate a `GenerateOutput` that holds it.

        Raises:
            InputError: an unknown option, one out of range, options that contradict each other, or inputs that `forward` refuses.
            UnsupportedError: an argument that only transformers has.
        """
        self.switch_by_audio(input_features is not None)
        try:
            others = {"synced_gpus": synced_gpus, "assistant_model": assistant_model, "custom_generate": custom_generate}
            others |= {"negative_prompt_ids": negative_prompt_ids, "negative_prompt_attention_mask": negative_prompt_attention_mask}
            call = refuse_others(options, others | {"past_key_values": past_key_values})
            custom = Custom.of(logits_processor, stopping_criteria, prefix_allowed_tokens_fn)
            given = ModelInputs(
                input_ids=only_one(inputs, input_ids),
                attention_mask=attention_mask,
                input_features=input_features,
                input_features_mask=input_features_mask,
                input_features_lengths=input_features_lengths,
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                use_cache=True,
            )
            return self._answer(given, call, generation_config, custom, generator, streamer, tokenizer)
        finally:
            # Also after an error: another thread may be waiting for the end.
            if callable(getattr(streamer, "end", None)):
                streamer.end()

    def _answer(
        self,
        given: ModelInputs,
        call: dict[str, Any],
        generation_config: Any,
        custom: Custom,
        rng: torch.Generator | None,
        streamer: Any,
        tokenizer: Any,
    ) -> Tensor | GenerateOutput:
        if given.input_ids is None and given.inputs_embeds is None:
            bos = GenerationOptions.resolve(call, generation_config, self.generation_config, 1).bos_token_id
            given = replace(given, input_ids=first_token(bos, self.device))
        inputs, asked_ids = moved(given, self.device), given.input_ids
        ids = inputs.input_ids
        prompts = Arguments.of(self.device, ids, inputs if inputs.inputs_embeds is None else replace(inputs, input_ids=None))
        options = GenerationOptions.resolve(call, generation_config, self.generation_config, prompts.columns)
        check_generator(rng, self.device)
        check_tokenizer(options, tokenizer)
        check_streamer(streamer, options)
        prompts = prompts.with_mask(options)
        rules = Rules.of(options, custom, prompts.ids.shape[1])
        shown = prompts.ids.repeat_interleave(options.num_return_sequences, 0)
        if streamer is not None:
            streamer.put(prompts.host_ids.repeat_interleave(options.num_return_sequences, 0))
        if rules.options.max_new_tokens == 0 or len(shown) == 0:
            output = GenerateOutput(shown)
        else:
            with self.runtime.session(self) as runtime, _prefill(self, runtime, rules.options, prompts, tokenizer) as prefilled:
                if options.num_beams == 1:
                    output = Decoding(self, runtime, rules, prefilled, rng, streamer).run()
                else:
                    output = search_beams(self, rules, prefilled, rng)
            output.sequences = torch.cat((shown, output.sequences.to(shown.dtype)), dim=1)
        if asked_ids is not None and asked_ids.device != self.device:
            output.sequences = output.sequences.to(asked_ids.device)
        return output if options.return_dict_in_generate else output.sequences

    def switch_by_audio(self, has_audio: bool) -> None:
        """Called before a request. A model whose layers peft has wrapped switches their adapters here."""

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: tuple[Tensor, ...],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The scores of the tokens that were chosen: `(rows, new tokens)`.

        Args:
            sequences, scores, beam_indices: fields of a `GenerateOutput`; beam_indices with beams alone.
            normalize_logits: return log-probabilities.
        """
        return transition_scores(sequences, scores, beam_indices, normalize_logits)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for one step of a decoding loop of your own. `generate` does not call it.

        Args:
            input_ids: `(rows, columns)`, all tokens so far.
            next_sequence_length: how many last columns to run; None: all.
            past_key_values: what an earlier step returned.
            inputs_embeds: in place of the ids, for the first step.
            is_first_iteration: whether this is the first step, which alone takes audio.
            kwargs: other arguments of `forward`; labels are dropped.
        """
        last = slice(None) if next_sequence_length is None else slice(-next_sequence_length, None)
        prepared = {name: value for name, value in kwargs.items() if name != "labels"}
        if not is_first_iteration and kwargs.get("use_cache", True):
            prepared = {name: value for name, value in prepared.items() if not name.startswith("input_features")}
        prepared["input_ids"] = input_ids[:, last]
        if inputs_embeds is not None and is_first_iteration:
            prepared |= {"input_ids": None, "inputs_embeds": inputs_embeds[:, last]}
        if kwargs.get("position_ids") is not None:
            prepared["position_ids"] = kwargs["position_ids"][:, last]
        rest = {"past_key_values": past_key_values, "attention_mask": attention_mask}
        return prepared | {name: value for name, value in rest.items() if value is not None}

    def get_audio_features(self, *arguments: Any, **options: Any) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            return super().get_audio_features(*arguments, **options)
        with self.runtime.session(self):
            return super().get_audio_features(*arguments, **options)

    def encode_packed(self, frames: Tensor, clips: Segments) -> tuple[Tensor, Tensor, Segments]:
        running = self.runtime.running
        # Outside a session another thread may be using the stages.
        return super().encode_packed(frames, clips) if running is None else encode(self, running.encoder_graphs, frames, clips)

    def _kept_layers(self) -> LayersInUse | None:
        running = self.runtime.running
        if running is None:
            return super()._kept_layers()
        running.layers.follow()
        return running.layers

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
        given = Arguments.of(self.device, inputs.input_ids, inputs)
        options = GenerationOptions.resolve(call, None, self.generation_config, given.columns)
        with self.runtime.session(self) as runtime, _prefill(self, runtime, options, given, None) as prompts:
            # With its own generator, so that a warm-up does not change what a request draws.
            Decoding(self, runtime, Rules.of(options), prompts, torch.Generator(self.device).manual_seed(0), None).rehearse()

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
def _prefill(model: Generation, runtime: Runtime, options: GenerationOptions, given: Arguments, tokenizer: Any) -> Iterator[Prompts]:
    """Run the prompts. Their pages are given back at the end of the block.

    Args:
        model: the model.
        runtime: whose pages to use.
        options: of the request.
        given: the prompts.
        tokenizer: for stop strings.
    """
    copies = max(options.num_beams, options.num_return_sequences)
    ids, host_ids, kept = given.ids, given.host_ids, given.kept_ids
    lengths = [length for length in given.kept.sum(1).tolist() for _ in range(copies)]
    prepare(runtime, options, lengths, model.text_config.vocab_size)
    cache = PagedCache(model.text_config, len(ids), dtype=model.dtype, device=model.device, pool=runtime.pool)
    try:
        logits, hidden_states = _run_prompts(model, runtime, options, given, cache)
        if copies > 1:
            cache.reorder([row for row in range(len(cache)) for _ in range(copies)])
            logits, ids, host_ids, kept = (one.repeat_interleave(copies, 0) for one in (logits, ids, host_ids, kept))
            hidden_states = hidden_states and tuple(one.repeat_interleave(copies, 0) for one in hidden_states)
        stops = None
        if options.stop_strings:
            texts = [row[keep].tolist() for row, keep in zip(host_ids, kept, strict=True)]
            stops = StopStrings(options.stop_strings, tokenizer, texts)
        yield Prompts(cache, logits, ids, on_device(kept, model.device), stops, hidden_states)
    finally:
        cache.release()


def _run_prompts(
    model: Generation, runtime: Runtime, options: GenerationOptions, given: Arguments, cache: PagedCache
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Logits of each prompt's next token `(rows, vocabulary)`, and `(rows, width, hidden)` of every layer if the request returns them."""
    wants_states = options.return_dict_in_generate and options.output_hidden_states
    inputs, host = (replace(one, past_key_values=cache, output_hidden_states=wants_states) for one in (given.model, given.host))
    prompt = model.pack_prompt(inputs, host)
    if prompt.ids is None and not model.adapts_embeddings:
        prompt = replace(prompt, has_audio=[False] * len(prompt.has_audio))
    cache.reserve(list(prompt.rows.segments.lengths))
    if prompt.ids is not None and not wants_states:
        return prefill(model, runtime.decoder_graphs, prompt, inputs), None
    states, layers, _ = model.run_prompt(prompt, inputs)
    logits = model.language_model.next_logits(states.index_select(0, prompt.rows.segments.cu_seqlens[1:] - 1))
    return logits, None if layers is None else tuple(map(prompt.rows.pad, layers))


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
    options = GenerationOptions.resolve({"max_new_tokens": max_new_tokens}, None, model.generation_config, host.input_ids.shape[1])
    with (
        recorded_launches(architecture) as launches,
        model.runtime.session(model) as runtime,
        _prefill(model, runtime, options, Arguments(on_meta, host, on_meta.input_ids, host.input_ids), None) as prompts,
    ):
        Decoding(model, runtime, Rules.of(options), prompts, None, None).rehearse()
    return launches
