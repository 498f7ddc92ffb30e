"""The models' outputs: transformers 5.x's types, readable by attribute, by key and by position."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, Self

import torch

from granite_speech.errors import InputError
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.rows import Rows

__all__ = [
    "BaseModelOutputWithPast",
    "BaseModelOutputWithPooling",
    "CausalLMOutputWithPast",
    "EncoderOutput",
    "GenerateOutput",
    "GraniteSpeechCausalLMOutputWithPast",
    "GraniteSpeechModelOutputWithPast",
    "Lazy",
    "ModelOutput",
]


class Lazy:
    """The value of an output's field, computed when the field is first read.

    It is computed in the gradient mode of the call that returned the output, whatever the mode of the reader.
    """

    def __init__(self, compute: Callable[[], Any]):
        self._compute = compute
        self._inference, self._gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def value(self) -> Any:
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._gradients):
            return self._compute()


@dataclass
class ModelOutput(dict):
    """A record whose fields, except those that are None, can also be read by key and by position, in order of definition.

    It is a dictionary for code that asks, as transformers' Trainer does. The values are in the fields alone, so that those that
    nobody reads are never computed.
    """

    def __post_init__(self) -> None:
        first, *others = (one.name for one in fields(self))
        values = vars(self)[first]
        # accelerate and DataParallel build an output from another one's keys and values.
        if isinstance(values, Mapping | Iterator) and all(vars(self)[name] is None for name in others):
            setattr(self, first, None)
            for name, value in dict(values).items():
                self[name] = value

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if isinstance(value, Lazy):
            value = value.value()
            setattr(self, name, value)
        return value

    def __reduce__(self) -> tuple:
        return type(self), tuple(getattr(self, one.name) for one in fields(self))

    def keys(self) -> list[str]:
        return [one.name for one in fields(self) if vars(self)[one.name] is not None and not one.metadata.get("internal")]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, as returned with `return_dict=False`."""
        return tuple(self.values())

    def __iter__(self):
        return iter(self.keys())

    def __reversed__(self):
        return reversed(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, int):
            return getattr(self, self.keys()[key])
        if isinstance(key, slice):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in (one.name for one in fields(self)):
            raise KeyError(key)
        setattr(self, key, value)

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key) if key in self else default

    def copy(self) -> Self:
        return copy.copy(self)

    def _refuse(self, *arguments: Any, **values: Any) -> NoReturn:
        raise InputError(
            got=f"a change of the keys of a {type(self).__name__}",
            expected="its fields as they are, as in transformers",
            remedy="Assign to a field, or change dict(output)",
        )

    __delitem__ = __or__ = __ror__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """Output of `get_audio_features`, and what the encoder's has in common with it.

    Attributes:
        last_hidden_state: `(clips, frames, width)`, the encoder's output; zero beyond a clip's length.
        pooler_output: `(clips, audio tokens, text hidden size)`, the projector's output; None from the encoder alone.
        hidden_states: input projection and every block, each `(clips, frames, hidden_dim)`, if requested.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class EncoderOutput(BaseModelOutputWithPooling):
    """Output of the encoder.

    Attributes:
        ctc_logits: the CTC head's logits of the middle block's output, which are fed back, and of the last one's, each
            `(clips, frames, output_dim)`, if requested. An encoder of one block has no middle.
    """

    ctc_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """Output of the language model without its head.

    Attributes:
        last_hidden_state: `(batch, sequence, hidden)` after the final norm; zero where the attention mask is 0.
        past_key_values: keys and values of all tokens so far, for the next call.
        hidden_states: embeddings and the output of every layer, the last one after the final norm.
        attentions: softmax weights of every layer, `(batch, heads, queries, keys)`.
        packed_states: `last_hidden_state` without padding, `(total_tokens, hidden)`; not among the keys.
        rows: where the packed tokens lie in the batch; not among the keys.
        is_detached: whether the call recorded no gradient, because it continued a cache; not among the keys.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: PagedCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    packed_states: torch.Tensor | None = field(default=None, repr=False, metadata={"internal": True})
    rows: Rows | None = field(default=None, repr=False, metadata={"internal": True})
    is_detached: bool = field(default=False, repr=False, metadata={"internal": True})

    def states_to_project(self) -> torch.Tensor:
        """Packed states for the language model's head: from `last_hidden_state` if a hook has read or replaced it."""
        untouched = isinstance(vars(self)["last_hidden_state"], Lazy)
        return self.packed_states if untouched else self.rows.pack(self.last_hidden_state)


@dataclass
class GraniteSpeechModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `GraniteSpeechModel`.

    Attributes:
        audio_hidden_states: `(clips, audio tokens, hidden)`, the projector's output.
    """

    audio_hidden_states: torch.Tensor | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """Output of the language model on its own.

    Attributes:
        loss: next-token cross entropy, a scalar, if labels were given.
        logits: `(batch, kept positions, vocabulary)`, divided by `logits_scaling`; zero where the attention mask is 0.
        past_key_values, hidden_states, attentions: as `BaseModelOutputWithPast`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: PagedCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class GraniteSpeechCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `GraniteSpeechForConditionalGeneration`.

    Attributes:
        audio_hidden_states: as `GraniteSpeechModelOutputWithPast`.
    """

    audio_hidden_states: torch.Tensor | None = None


@dataclass
class GenerateOutput(ModelOutput):
    """Output of `generate` with `return_dict_in_generate`; rows are those of the batch, each `num_return_sequences` times.

    Attributes:
        sequences: `(rows, prompt + new tokens)`.
        sequences_scores: `(rows,)` float32, with beams and output_scores: log-probability over length to `length_penalty`.
        scores: one tensor per step with the scores its tokens were chosen from, if output_scores: `(rows, vocabulary)` float32,
            undefined for a row that has ended; with beams `(batch * num_beams, vocabulary)`, log-probabilities of the open beams'
            next tokens.
        logits: the same before any rule, if output_logits.
        beam_indices: `(rows, new tokens)` int32, with beams: the open beam, counted over the batch, that each token was added to;
            −1 after an answer's end.
        hidden_states: one tuple per step, if output_hidden_states: `(rows, tokens of the step, hidden)` of the embeddings and every
            layer, the last one after the final norm; the first step has the prompt, with zeros for padding.
    """

    sequences: torch.Tensor
    sequences_scores: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    beam_indices: torch.Tensor | None = None
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
