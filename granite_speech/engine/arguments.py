"""The prompts that a call of `generate` gives, in their several forms, and the arguments that are refused."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from granite_speech.errors import InputError, UnsupportedError
from granite_speech.generation.options import GenerationOptions
from granite_speech.modules.prompts import ModelInputs
from granite_speech.modules.transfers import on_device, on_host

__all__ = [
    "Arguments",
    "check_generator",
    "check_streamer",
    "check_tokenizer",
    "first_token",
    "moved",
    "only_one",
    "refuse_others",
]

# Model inputs that transformers accepts in `generate` too, where they change nothing.
_WITHOUT_EFFECT = ("labels", "logits_to_keep", "trust_remote_code")


@dataclass(frozen=True)
class Arguments:
    """The prompts of one call, on the model's device.

    Attributes:
        model: the inputs of `forward`: ids or embeddings.
        host: `model.on_host()`.
        ids: `(rows, width)`, what the answers are appended to; no columns if only embeddings were given.
        host_ids: the same on the host.
    """

    model: ModelInputs
    host: ModelInputs
    ids: Tensor
    host_ids: Tensor

    @classmethod
    def of(cls, device: torch.device, input_ids: Tensor | None, inputs: ModelInputs) -> "Arguments":
        """Check the prompts and read what shapes depend on.

        Args:
            device: of the model.
            input_ids: those of the call, which `inputs` has only if it has no embeddings.
            inputs: on the model's device, with use_cache.

        Raises:
            InputError: ids that are not a tensor (rows, columns), or prompts without a token.
        """
        embeddings = inputs.inputs_embeds
        if embeddings is None:
            _check_ids(input_ids)
            host = inputs.on_host()
            return cls(inputs, host, input_ids, host.input_ids)
        rows, width = inputs.check(device)
        ids = torch.zeros(rows, 0, dtype=torch.int64, device=device) if input_ids is None else input_ids
        if ids.dim() != 2 or len(ids) != rows or width == 0:
            raise InputError(
                got=f"input_ids of shape {tuple(ids.shape)} with inputs_embeds of shape {tuple(embeddings.shape)}",
                expected="the same number of rows, and at least one column of embeddings",
                remedy="Pass the ids that the answers are to be appended to, or omit them",
            )
        [host_ids] = on_host(ids)
        return cls(inputs, inputs.on_host(), ids, host_ids)

    @property
    def columns(self) -> int:
        """Of the prompts, as max_length counts them."""
        width = self.ids.shape[1]
        if self.model.inputs_embeds is None:
            return width
        embedded = self.model.inputs_embeds.shape[1]
        return embedded if width == embedded else width + embedded

    @cached_property
    def kept(self) -> Tensor:
        """`(rows, width)` bool on the host: the columns of the prompts that are not padding."""
        if self.host.attention_mask is not None:
            return self.host.attention_mask != 0
        given = self.host_ids if self.model.inputs_embeds is None else self.model.inputs_embeds
        return torch.ones(given.shape[:2], dtype=torch.bool)

    @property
    def kept_ids(self) -> Tensor:
        """`(rows, width of ids)` bool on the host."""
        return self.kept if self.kept.shape == self.host_ids.shape else torch.ones_like(self.host_ids, dtype=torch.bool)

    def with_mask(self, options: GenerationOptions) -> "Arguments":
        """The same with the attention mask that padding in the ids implies, if there is none and no row can end with that token.

        Raises:
            InputError: prompts that end with padding.
        """
        found, pad, ids = self, options.pad_token_id, self.host_ids
        if self.host.attention_mask is None and pad is not None and pad not in options.eos_token_id and bool((ids == pad).any()):
            mask = (ids != pad).long()
            host, model = replace(self.host, attention_mask=mask), replace(self.model, attention_mask=on_device(mask, ids.device))
            found = replace(self, host=host, model=model)
        mask = found.host.attention_mask
        if mask is not None and not bool(mask[:, -1:].all()):
            raise InputError(
                got="prompts padded on the right", expected="padding on the left", remedy="Set tokenizer.padding_side = 'left'"
            )
        return found


def refuse_others(options: dict[str, Any], unsupported: Mapping[str, Any]) -> dict[str, Any]:
    """The options without model inputs that change nothing.

    Args:
        options: of the call, by name.
        unsupported: arguments that only transformers has, by name; None and False are accepted.

    Raises:
        UnsupportedError: an argument that only transformers has.
    """
    for name, value in unsupported.items():
        if value is not None and value is not False:
            raise UnsupportedError(
                got=f"generate({name}=…) with a {type(value).__name__}",
                expected=f"no {name}, which is not supported",
                remedy="Remove it; tokens are chosen one by one, by this model alone, from the prompts of this call",
            )
    return {name: value for name, value in options.items() if name not in _WITHOUT_EFFECT}


def first_token(bos_token_id: int | None, device: torch.device) -> Tensor:
    """The prompt of a call without one."""
    if bos_token_id is None:
        raise InputError(
            got="generate() without input_ids",
            expected="prompts, or a bos_token_id to begin with",
            remedy="Pass what the processor returns",
        )
    return torch.full((1, 1), bos_token_id, dtype=torch.int64, device=device)


def only_one(inputs: Tensor | None, input_ids: Tensor | None) -> Tensor | None:
    """The ids, which transformers calls `inputs` too."""
    if inputs is not None and input_ids is not None:
        raise InputError(got="generate() with inputs and input_ids", expected="one of them", remedy="Pass input_ids alone")
    return input_ids if inputs is None else inputs


def moved(inputs: ModelInputs, device: torch.device) -> ModelInputs:
    """The inputs on the model's device, with a warning if some of them were elsewhere."""
    away = {one.name: value for one in fields(inputs) if isinstance(value := getattr(inputs, one.name), Tensor) and value.device != device}
    away.pop("input_features_lengths", None)
    if not away:
        return inputs
    warn(f"generate() copies {', '.join(away)} to {device}. Move the processor's result there once, with .to().", stacklevel=5)
    return replace(inputs, **{name: value.to(device) for name, value in away.items()})


def _check_ids(input_ids: Any) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        shape = f" and shape {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else ""
        raise InputError(
            got=f"input_ids of type {type(input_ids).__name__}{shape}",
            expected="a tensor (batch, sequence)",
            remedy="Pass all of it: generate(**inputs)" if isinstance(input_ids, Mapping) else "Use what the processor returns",
        )
    if input_ids.shape[1] == 0:
        raise InputError(got="empty prompts", expected="at least one token in each", remedy="Give the model a text to continue")


def check_generator(generator: Any, device: torch.device) -> None:
    if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != device.type):
        where = f" on {generator.device}" if isinstance(generator, torch.Generator) else ""
        raise InputError(
            got=f"generator of type {type(generator).__name__}{where}",
            expected=f"a torch.Generator on {device.type}",
            remedy=f"Pass torch.Generator('{device.type}').manual_seed(seed)",
        )


def check_tokenizer(options: GenerationOptions, tokenizer: Any) -> None:
    if options.stop_strings and tokenizer is None:
        raise InputError(
            got=f"stop_strings={list(options.stop_strings)!r:.60} without a tokenizer",
            expected="a tokenizer, which gives the text of tokens",
            remedy="Pass tokenizer=processor.tokenizer",
        )


def check_streamer(streamer: Any, options: GenerationOptions) -> None:
    if streamer is None:
        return
    if options.num_beams > 1:
        raise InputError(
            got=f"a streamer for num_beams={options.num_beams}",
            expected="no beams, so that every token is final when it is chosen",
            remedy="Omit the streamer or num_beams",
        )
    if not (callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))):
        raise InputError(
            got=f"a streamer of type {type(streamer).__name__}",
            expected="an object with put(ids) and end()",
            remedy="Pass one like transformers' TextStreamer",
        )
