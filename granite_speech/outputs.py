"""What the models return: transformers 5.x's output types, by attribute, by key and by position."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from granite_speech.cache import PagedCache

__all__ = [
    "BaseModelOutputWithPooling",
    "GenerateOutput",
    "GraniteSpeechCausalLMOutputWithPast",
    "GraniteSpeechModelOutputWithPast",
    "ModelOutput",
]


@dataclass
class ModelOutput:
    """A record whose fields that are not None can also be reached by key and by position, in order of definition."""

    def keys(self) -> list[str]:
        return [one.name for one in fields(self) if getattr(self, one.name) is not None]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None: what `return_dict=False` returns."""
        return tuple(self.values())

    def __iter__(self):
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """Of the encoder, and of `get_audio_features`.

    Attributes:
        last_hidden_state: `(clips, frames, width)`, the encoder's output; zero beyond a clip's length.
        pooler_output: `(clips, audio tokens, text hidden size)`, the projector's output; None from the encoder alone.
        hidden_states: input projection and every block, each `(clips, frames, hidden_dim)`, where asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class GraniteSpeechModelOutputWithPast(ModelOutput):
    """Of `GraniteSpeechModel`.

    Attributes:
        last_hidden_state: `(batch, sequence, hidden)` after the final norm; zero where the attention mask is 0.
        past_key_values: keys and values seen so far, to give to the next call.
        hidden_states: embeddings and every layer, the last one after the final norm.
        attentions: softmax weights a layer, `(batch, heads, queries, keys)`.
        audio_hidden_states: `(clips, audio tokens, hidden)`, the projector's output.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: PagedCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    audio_hidden_states: torch.Tensor | None = None


@dataclass
class GraniteSpeechCausalLMOutputWithPast(ModelOutput):
    """Of `GraniteSpeechForConditionalGeneration`.

    Attributes:
        loss: next-token cross entropy, a scalar, where labels were given.
        logits: `(batch, kept positions, vocabulary)`, divided by `logits_scaling`; zero where the attention mask is 0.
        past_key_values, hidden_states, attentions, audio_hidden_states: as `GraniteSpeechModelOutputWithPast`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: PagedCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    audio_hidden_states: torch.Tensor | None = None


@dataclass
class GenerateOutput(ModelOutput):
    """Of `generate` with `return_dict_in_generate`; rows are those of the batch, each `num_return_sequences` times.

    Attributes:
        sequences: `(rows, prompt + new tokens)`, the prompts in front.
        sequences_scores: `(rows,)` float32, of beams: log-probability over length to `length_penalty`; where scores were asked for.
        scores: a step, what its tokens were chosen by, where asked for: `(rows, vocabulary)` float32, without meaning for a row
            that has ended; for beams `(batch * num_beams, vocabulary)`, log-probabilities of the open beams' next tokens.
        beam_indices: `(rows, new tokens)` int32, of beams: the open beam, counted over the batch, that each token was added to;
            −1 behind an answer's end.
    """

    sequences: torch.Tensor
    sequences_scores: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    beam_indices: torch.Tensor | None = None
