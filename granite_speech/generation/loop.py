"""`generate`: one packed prefill of all prompts, then one token per row and step through the paged cache.

Greedy decoding, sampling and beam search differ only in how they choose a step's tokens from its logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from granite_kernels.launch import Launch, recorded_launches
from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.generation.beam_search import BeamSearch
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.sampling import LogitsProcessor, draw
from granite_speech.generation.stop_strings import StopStrings
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.language_model import Tokens
from granite_speech.modules.outputs import GenerateOutput
from granite_speech.modules.packing import Segments
from granite_speech.modules.prompts import ModelInputs
from granite_speech.modules.transfers import on_device

__all__ = ["Generation", "launches_of_generate"]

# On a GPU, checking whether all rows have ended waits for the device. A few steps too many cost less than a wait at each.
_STEPS_BETWEEN_CHECKS = 8
# Every answer gets pages for this many tokens at once; the cache grows during decoding only for longer answers.
_RESERVED_TOKENS = 1024


class Generation:
    """`generate`, for a model with `states`, `decoder`, `language_model` and `config`."""

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
        options = GenerationOptions.resolve(call, generation_config, self.generation_config, self.config.text_config, ids.shape[1])
        _check_generator(rng, self.device)
        _check_tokenizer(options, tokenizer)
        _check_streamer(streamer, options, len(ids))
        host = inputs.on_host()
        _check_padding(host.attention_mask)
        if streamer is not None:
            streamer.put(host.input_ids)
        prompts = ids.repeat_interleave(options.num_return_sequences, 0)
        if options.max_new_tokens == 0 or len(ids) == 0:
            output = GenerateOutput(prompts)
        else:
            decoding = _Decoding.prefill(self, options, inputs, host, tokenizer)
            output = decoding.decode(rng, streamer) if options.num_beams == 1 else decoding.search_beams(rng)
            output.sequences = torch.cat((prompts, output.sequences.to(ids.dtype)), dim=1)
        return output if options.return_dict_in_generate else output.sequences


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
    text_config, (batch, columns) = model.config.text_config, host.input_ids.shape
    options = GenerationOptions.resolve({"max_new_tokens": max_new_tokens}, None, model.generation_config, text_config, columns)
    with recorded_launches(architecture) as launches:
        decoding = _Decoding.prefill(model, options, on_meta, host, None)
        decoding.advance(torch.empty(batch, dtype=torch.int64, device="meta"))
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


@dataclass
class _Decoding:
    """One call of `generate` after its prefill: rows that grow by one token a step.

    Attributes:
        model: the model that generates.
        options: of the call.
        cache: keys and values of the rows. A prompt has as many rows as beams or answers, next to each other.
        segments: one token of each row.
        logits: `(rows, vocabulary)` of each row's next token.
        positions: `(rows,)` int64 of each row's next token.
        adapter_index: `(rows,)` int32, or None if the adapter is on for all.
        processor: turns logits into the scores that tokens are chosen from.
        stops: the text of the rows, if there are stop strings.
        scores: of each step, if they are to be returned.
    """

    model: Generation
    options: GenerationOptions
    cache: PagedCache
    segments: Segments
    logits: Tensor
    positions: Tensor
    adapter_index: Tensor | None
    processor: LogitsProcessor
    stops: StopStrings | None
    scores: list[Tensor] = field(default_factory=list)

    @classmethod
    def prefill(cls, model: Generation, options: GenerationOptions, inputs: ModelInputs, host: ModelInputs, tokenizer: Any) -> Self:
        """Run the prompts and reserve pages for their answers.

        Args:
            model, options: see the class.
            inputs: the prompts, on the model's device, with use_cache.
            host: `inputs.on_host()`.
            tokenizer: for stop strings.
        """
        output = model.states(inputs, host)
        cache, device = output.past_key_values, model.device
        states = output.packed_states.index_select(0, output.rows.segments.cu_seqlens[1:] - 1)
        ids, host_ids = inputs.input_ids, host.input_ids
        kept = torch.ones_like(host_ids, dtype=torch.bool) if host.attention_mask is None else host.attention_mask != 0
        copies = max(options.num_beams, options.num_return_sequences)
        if copies > 1:
            cache.reorder([row for row in range(len(cache)) for _ in range(copies)])
            states, ids, host_ids, kept = (one.repeat_interleave(copies, 0) for one in (states, ids, host_ids, kept))
        cache.reserve([length + min(options.max_new_tokens, _RESERVED_TOKENS) for length in cache.lengths])
        segments = Segments((1,) * len(cache), device)
        logits = model.language_model.logits(states)
        stops = None
        if options.stop_strings:
            prompts = [row[keep].tolist() for row, keep in zip(host_ids, kept, strict=True)]
            stops = StopStrings(options.stop_strings, tokenizer, prompts)
        return cls(
            model=model,
            options=options,
            cache=cache,
            segments=segments,
            logits=logits,
            positions=on_device(cache.next_positions, device),
            adapter_index=model.adapter_index(cache.has_audio, segments),
            processor=LogitsProcessor(options, ids, on_device(kept, device), logits.shape[1]),
            stops=stops,
        )

    def advance(self, tokens: Tensor) -> None:
        """Run one more token of each row, `(rows,)`."""
        model, step = self.model, self.cache.begin(self.segments)
        layout = Tokens(segments=self.segments, positions=self.positions, adapter_index=self.adapter_index, step=step)
        self.logits = model.language_model.logits(model.decoder(model.embed_tokens(tokens), layout))
        self.positions = self.positions + 1

    def decode(self, rng: torch.Generator | None, streamer: Any) -> GenerateOutput:
        """Add the best token of each row, or one drawn from its scores, until every row has ended."""
        options, count, device = self.options, len(self.cache), self.model.device
        ends = on_device(options.eos_token_id, device, torch.int64)
        done = torch.zeros(count, dtype=torch.bool, device=device)
        lengths = torch.zeros(count, dtype=torch.int64, device=device)
        check_each_step = device.type == "cpu" or streamer is not None or self.stops is not None
        steps_between_checks = 1 if check_each_step else _STEPS_BETWEEN_CHECKS
        new = []
        while True:
            scores = self.processor(self.logits)
            self._record_scores(scores)
            chosen = draw(scores, 1, rng).squeeze(1) if options.do_sample else scores.argmax(-1)
            tokens = torch.where(done, options.pad_token_id, chosen)
            new.append(tokens)
            lengths = lengths + ~done
            done = done | torch.isin(tokens, ends)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if self.stops is not None:
                done = done | self._stopped(tokens)
            if len(new) == options.max_new_tokens or (len(new) % steps_between_checks == 0 and bool(done.all())):
                break
            self.processor.extend(chosen)
            self.advance(chosen)
        # Steps that ran after the last row had ended are cut off.
        longest = int(lengths.max())
        return GenerateOutput(torch.stack(new[:longest], dim=1), scores=self._recorded_scores(longest))

    def _stopped(self, tokens: Tensor) -> Tensor:
        """`(rows,)` bool: rows whose newest token completes a stop string."""
        rows, ids = list(range(len(tokens))), tokens.tolist()
        stopped = self.stops.ends(rows, ids)
        self.stops.extend(rows, ids)
        return on_device(stopped, tokens.device)

    def search_beams(self, rng: torch.Generator | None) -> GenerateOutput:
        """The best hypotheses of each prompt. Cache and scores follow the beams as they are continued or dropped."""
        beams = BeamSearch(self.options, len(self.cache) // self.options.num_beams, self.model.device, self.stops, rng)
        while True:
            log_probabilities = self.processor(self.logits.float().log_softmax(-1))
            self._record_scores(log_probabilities)
            parents, tokens = beams.advance(log_probabilities)
            if beams.is_over:
                break
            self.processor.extend(tokens, parents)
            self.cache.reorder(parents.tolist())
            self.advance(tokens)
        new, scores, origins = beams.answers()
        return GenerateOutput(
            new,
            sequences_scores=scores if self.options.output_scores else None,
            scores=self._recorded_scores(len(self.scores)),
            beam_indices=origins,
        )

    def _record_scores(self, scores: Tensor) -> None:
        if self.options.return_dict_in_generate and self.options.output_scores:
            self.scores.append(scores.float())

    def _recorded_scores(self, steps: int) -> tuple[Tensor, ...] | None:
        return tuple(self.scores[:steps]) if self.options.output_scores else None
