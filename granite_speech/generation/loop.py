"""`generate`: one packed prefill a prompt, then one token a row and step through the paged cache.

Greedy decoding, sampling and beam search differ only in how a step's tokens are chosen from its logits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from granite_kernels.launch import Launch, recorded_launches
from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.generation.beam_search import BeamSearch
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.sampling import LogitsProcessor, draw
from granite_speech.generation.stop_strings import StopStrings
from granite_speech.modules.language_model import Tokens
from granite_speech.modules.outputs import GenerateOutput
from granite_speech.modules.packing import Segments
from granite_speech.modules.prompts import HostInputs
from granite_speech.modules.transfers import on_device

__all__ = ["Generation", "launches_of_generate"]

# On a GPU, asking whether all rows are done waits for the device: a few steps too many cost less than waiting at each.
_STEPS_BETWEEN_LOOKS = 8
# Tokens that every answer gets room for at once; longer ones make the pools grow on the way.
_RESERVED = 1024


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
        """Answer prompts; greedily, by sampling or with beams, as transformers 5.17 does.

        Args:
            input_ids, attention_mask, input_features, input_features_mask, input_features_lengths: the prompts, padded on the
                left, as the processor returns them. A prompt's answer does not depend on its padding or neighbours, and neither
                does a penalty on repetition.
            generation_config: options in a dictionary, or as attributes of an object.
            generator: draws the tokens, on the model's device; torch's default one where left out.
            streamer: an object with `put(ids)` and `end()`, for one prompt with one answer and without beams. `put` gets the prompt
                `(1, columns)`, then each new token `(1,)`, on the host.
            tokenizer: says what text tokens are, for stop_strings; the processor's.
            options: those of `GenerationOptions`, above all max_new_tokens, do_sample and num_beams. They win over
                generation_config, which wins over the checkpoint's generation_config.json, and that over the text configuration's
                token ids. None counts as left out.

        Returns:
            `(batch * num_return_sequences, prompt + new tokens)` in the dtype of input_ids, the prompts in front, the answers to one
            prompt one behind the other; with return_dict_in_generate a `GenerateOutput` of it.

        Raises:
            InputError: an option that is unknown or out of range, options that contradict, or inputs that `forward` refuses.
        """
        prompt = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "input_features_lengths": input_features_lengths,
        }
        try:
            return self._answer(prompt, generation_config, generator, streamer, tokenizer, options)
        finally:
            # Even after an error: another thread may be waiting for the end.
            if callable(getattr(streamer, "end", None)):
                streamer.end()

    def _answer(
        self, prompt: dict[str, Any], generation_config: Any, generator: Any, streamer: Any, tokenizer: Any, options: dict[str, Any]
    ) -> Tensor | GenerateOutput:
        ids = prompt["input_ids"]
        _check_ids(ids)
        told = GenerationOptions.resolve(options, generation_config, self.generation_config, self.config.text_config, ids.shape[1])
        self._check_helpers(told, len(ids), generator, streamer, tokenizer)
        host = HostInputs.read(**{name: one for name, one in prompt.items() if name != "input_features"})
        _check_padding(host.attention_mask)
        if streamer is not None:
            streamer.put(host.input_ids)
        prompts = ids.repeat_interleave(told.num_return_sequences, 0)
        if told.max_new_tokens == 0 or len(ids) == 0:
            output = GenerateOutput(prompts)
        else:
            steps = _Steps(self, told, tokenizer, prompt, host)
            output = steps.choose_by_token(generator, streamer) if told.num_beams == 1 else steps.choose_by_beam(generator)
            output.sequences = torch.cat((prompts, output.sequences.to(ids.dtype)), dim=1)
        return output if told.return_dict_in_generate else output.sequences

    def _check_helpers(self, told: GenerationOptions, batch: int, generator: Any, streamer: Any, tokenizer: Any) -> None:
        if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != self.device.type):
            where = f" on {generator.device}" if isinstance(generator, torch.Generator) else ""
            raise InputError(
                got=f"generator of type {type(generator).__name__}{where}",
                expected=f"a torch.Generator on {self.device.type}",
                remedy=f"Pass torch.Generator('{self.device.type}').manual_seed(seed)",
            )
        if told.stop_strings and tokenizer is None:
            raise InputError(
                got=f"stop_strings={list(told.stop_strings)!r:.60} without a tokenizer",
                expected="the tokenizer that says what text the tokens are",
                remedy="Pass tokenizer=processor.tokenizer",
            )
        if streamer is None:
            return
        if told.num_beams > 1 or batch * told.num_return_sequences != 1:
            raise InputError(
                got=f"a streamer for num_beams={told.num_beams} and {batch * told.num_return_sequences} answers",
                expected="one answer to one prompt, without beams, whose tokens are final as they come",
                remedy="Leave the streamer out, or call generate for each prompt",
            )
        if not (callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))):
            raise InputError(
                got=f"a streamer of type {type(streamer).__name__}",
                expected="an object with put(ids) and end()",
                remedy="Pass one like transformers' TextStreamer",
            )


@torch.no_grad()
def launches_of_generate(model: Generation, inputs: Mapping[str, Any], architecture: int, max_new_tokens: int) -> list[Launch]:
    """The kernel launches of a prefill and a decode step of `generate`, found out without weights and without a GPU.

    Args:
        model: on the meta device, in the dtype of the call.
        inputs: as the processor returns them, on the CPU.
        architecture: of the GPU, as `granite_kernels.launch.architecture` gives it.
        max_new_tokens: of the call.
    """
    host = HostInputs.read(**{name: one for name, one in inputs.items() if name != "input_features"})
    prompt = {name: one.to("meta") if isinstance(one, Tensor) else one for name, one in inputs.items()}
    text_config, columns = model.config.text_config, host.input_ids.shape[1]
    options = GenerationOptions.resolve({"max_new_tokens": max_new_tokens}, None, model.generation_config, text_config, columns)
    with recorded_launches(architecture) as launches:
        steps = _Steps(model, options, None, prompt, host)
        steps.advance(torch.empty(len(host.input_ids), dtype=torch.int64, device="meta"))
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
        raise InputError(got="prompts without a token", expected="at least one token in each", remedy="Give the model a text to continue")


def _check_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and not bool(attention_mask[:, -1:].all()):
        raise InputError(
            got="prompts that are padded on the right", expected="padding on the left", remedy="Set tokenizer.padding_side = 'left'"
        )


class _Steps:
    """One call of `generate`: the prompts are run once, then every row grows by one token a step.

    Args:
        model: what generates.
        options: of the call.
        tokenizer: for stop strings.
        prompt: `generate`'s arguments that make the prompts.
        host: what of them is on the host.

    Attributes:
        logits: `(rows, vocabulary)` of the next token; a prompt has as many rows as beams or answers, one after another.
        scores: of each step, if they are to be returned.
    """

    def __init__(self, model: Generation, options: GenerationOptions, tokenizer: Any, prompt: dict[str, Any], host: HostInputs):
        self.model, self.options, self.device = model, options, model.device
        self.batch = len(host.input_ids)
        self.scores: list[Tensor] = []
        self.cache = model.new_cache(self.batch)
        output = model.states(**prompt, past_key_values=self.cache, host=host)
        states = output.packed_states.index_select(0, output.rows.segments.cu_seqlens[1:] - 1)
        ids, host_ids = prompt["input_ids"], host.input_ids
        host_kept = torch.ones_like(host_ids, dtype=torch.bool) if host.attention_mask is None else host.attention_mask != 0
        several = max(options.num_beams, options.num_return_sequences)
        if several > 1:
            self.cache.reorder([row for row in range(self.batch) for _ in range(several)])
            states, ids, host_ids, host_kept = (one.repeat_interleave(several, 0) for one in (states, ids, host_ids, host_kept))
        self.cache.reserve([length + min(options.max_new_tokens, _RESERVED) for length in self.cache.lengths])

        self.one_each = Segments((1,) * len(self.cache), self.device)
        self.adapter_index = model.adapter_index(self.cache.has_audio, self.one_each)
        self.positions = on_device(self.cache.next_positions, self.device)
        self.logits = model.language_model.logits(states)
        self.processor = LogitsProcessor(options, ids, on_device(host_kept, self.device), self.logits.shape[1])
        self.stops = None
        if options.stop_strings:
            prompts = [row[keep].tolist() for row, keep in zip(host_ids, host_kept, strict=True)]
            self.stops = StopStrings(options.stop_strings, tokenizer, prompts)

    def advance(self, tokens: Tensor) -> None:
        """Run one more token of each row `(rows,)`."""
        model = self.model
        step = self.cache.begin(self.one_each)
        place = Tokens(segments=self.one_each, positions=self.positions, adapter_index=self.adapter_index, step=step)
        self.logits = model.language_model.logits(model.decoder(model.embed_tokens(tokens), place))
        self.positions = self.positions + 1

    def _remember(self, scores: Tensor) -> None:
        if self.options.return_dict_in_generate and self.options.output_scores:
            self.scores.append(scores.float())

    def _scores_of(self, steps: int) -> tuple[Tensor, ...] | None:
        return tuple(self.scores[:steps]) if self.options.output_scores else None

    def choose_by_token(self, generator: torch.Generator | None, streamer: Any) -> GenerateOutput:
        """The best token of each row, or one drawn for it."""
        options, count = self.options, len(self.cache)
        ends = on_device(options.eos_token_id, self.device, torch.int64)
        done = torch.zeros(count, dtype=torch.bool, device=self.device)
        lengths = torch.zeros(count, dtype=torch.int64, device=self.device)
        looks_each_step = self.device.type == "cpu" or streamer is not None or self.stops is not None
        look_every = 1 if looks_each_step else _STEPS_BETWEEN_LOOKS
        new = []
        while True:
            scores = self.processor(self.logits)
            self._remember(scores)
            chosen = draw(scores, 1, generator).squeeze(1) if options.do_sample else scores.argmax(-1)
            token = torch.where(done, options.pad_token_id, chosen)
            new.append(token)
            lengths = lengths + ~done
            done = done | torch.isin(token, ends)
            if streamer is not None:
                streamer.put(token.cpu())
            if self.stops is not None:
                done = done | self._stopped(token)
            if len(new) == options.max_new_tokens or (len(new) % look_every == 0 and bool(done.all())):
                break
            self.processor.extend(chosen)
            self.advance(chosen)
        # Columns that were decoded after the last row had ended are cut.
        longest = int(lengths.max())
        return GenerateOutput(torch.stack(new[:longest], dim=1), scores=self._scores_of(longest))

    def _stopped(self, tokens: Tensor) -> Tensor:
        """`(rows,)` bool: whose newest token completes a stop string."""
        rows, found = list(range(len(tokens))), tokens.tolist()
        stopped = self.stops.ends(rows, found)
        self.stops.extend(rows, found)
        return on_device(stopped, self.device)

    def choose_by_beam(self, generator: torch.Generator | None) -> GenerateOutput:
        """The best hypotheses of each row; a beam's keys follow it when it is continued twice or dropped."""
        beams = BeamSearch(self.options, self.batch, self.device, self.stops, generator)
        while True:
            log_probabilities = self.processor(self.logits.float().log_softmax(-1))
            self._remember(log_probabilities)
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
            scores=self._scores_of(len(self.scores)),
            beam_indices=origins,
        )
