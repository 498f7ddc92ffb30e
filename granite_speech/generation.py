"""Greedy decoding: one packed prefill, then one token a row and step through the paged cache."""

from typing import Any

import torch
from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.language_model import Tokens
from granite_speech.packing import Segments

__all__ = ["Generation"]

# What transformers calls greedy decoding; other values of these need another algorithm.
_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
_DEFAULT_MAX_LENGTH = 20
# On a GPU, asking whether all rows are done waits for the device: a few steps too many cost less than waiting at each.
_STEPS_BETWEEN_LOOKS = 8


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
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Decode greedily.

        Args:
            input_ids, attention_mask, input_features, input_features_mask, input_features_lengths: the prompts, padded on the
                left, as the processor returns them.
            max_new_tokens: tokens to add at most.
            max_length: columns of prompt and answer at most, where max_new_tokens is not given; 20 where neither is given or
                in the checkpoint's generation_config.json.
            eos_token_id: a row ends with any of these; the checkpoint's where left out.
            pad_token_id: fills a row behind its end; the checkpoint's where left out.
            options: do_sample=False, num_beams=1, num_return_sequences=1 and use_cache=True may be said.

        Returns:
            `(batch, prompt + new tokens)`, the prompts in front.
        """
        for name, value in options.items():
            if name not in _GREEDY or value not in (_GREEDY[name], None):
                raise InputError(
                    got=f"generate({name}={value!r:.60})",
                    expected="greedy decoding: " + ", ".join(f"{key}={one}" for key, one in _GREEDY.items()),
                    remedy="Leave the option out",
                )
        steps = self._new_tokens(input_ids, max_new_tokens, max_length)
        ends, pad = self._end_and_pad(eos_token_id, pad_token_id)
        if attention_mask is not None and not bool(attention_mask[:, -1:].all()):
            raise InputError(
                got="prompts that are padded on the right", expected="padding on the left", remedy="Set tokenizer.padding_side = 'left'"
            )
        if steps == 0:
            return input_ids
        new = self._decode(
            steps,
            ends,
            pad,
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_features=input_features,
            input_features_mask=input_features_mask,
            input_features_lengths=input_features_lengths,
        )
        return torch.cat((input_ids, new.to(input_ids.dtype)), dim=1)

    def _new_tokens(self, input_ids: Tensor, max_new_tokens: int | None, max_length: int | None) -> int:
        defaults = self.generation_config or {}
        if max_new_tokens is None and max_length is None:
            max_new_tokens = defaults.get("max_new_tokens")
        if max_new_tokens is not None:
            steps = max_new_tokens
        else:
            steps = (max_length or defaults.get("max_length") or _DEFAULT_MAX_LENGTH) - input_ids.shape[1]
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise InputError(
                got=f"max_new_tokens={max_new_tokens!r}, max_length={max_length!r} for prompts of {input_ids.shape[1]} columns",
                expected="room for new tokens",
                remedy="Pass max_new_tokens",
            )
        return steps

    def _end_and_pad(self, eos_token_id: int | list[int] | None, pad_token_id: int | None) -> tuple[Tensor, int]:
        """Token ids that end a row, on the model's device, and the one that fills it afterwards."""

        def default(name: str) -> Any:
            value = (self.generation_config or {}).get(name)
            return getattr(self.config.text_config, name) if value is None else value

        ends = default("eos_token_id") if eos_token_id is None else eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = default("pad_token_id") if pad_token_id is None else pad_token_id
        if pad is None:
            pad = ends[0] if ends else 0
        return torch.tensor(ends, dtype=torch.int64, device=self.device), pad

    def _decode(self, steps: int, ends: Tensor, pad: int, **prompt: Any) -> Tensor:
        """`(batch, at most steps)` new tokens."""
        batch = prompt["input_ids"].shape[0]
        cache = self.new_cache(batch)
        names = ("position_ids", "inputs_embeds", "use_cache", "output_attentions", "output_hidden_states", "cache_position")
        states, rows, _ = self.states(**prompt, past_key_values=cache, **dict.fromkeys(names))
        cache.reserve([length + steps for length in cache.lengths])
        states = states.index_select(0, rows.segments.cu_seqlens[1:] - 1)

        one_each = Segments((1,) * batch, self.device)
        adapter_index = self.adapter_index(cache.has_audio, one_each)
        positions = torch.tensor(cache.next_positions, device=self.device)
        done = torch.zeros(batch, dtype=torch.bool, device=self.device)
        look_every = 1 if self.device.type == "cpu" else _STEPS_BETWEEN_LOOKS
        new = []
        while True:
            best = self.language_model.logits(states).argmax(-1)
            token = torch.where(done, pad, best)
            new.append(token)
            done = done | torch.isin(token, ends)
            if len(new) == steps or (len(new) % look_every == 0 and bool(done.all())):
                break
            tokens = Tokens(segments=one_each, positions=positions, adapter_index=adapter_index, step=cache.begin(one_each))
            states = self.decoder(self.embed_tokens(best), tokens)
            positions = positions + 1
        return _without_idle_columns(torch.stack(new, dim=1), ends)


def _without_idle_columns(new: Tensor, ends: Tensor) -> Tensor:
    """Cut the columns that were decoded after the last row had ended."""
    is_end = torch.isin(new, ends)
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, new.shape[1])
    return new[:, : int(lengths.max())] if len(new) else new
