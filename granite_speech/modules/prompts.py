"""The inputs of a forward pass: collected in one record, checked, and read from the device once."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.transfers import on_host

__all__ = ["ModelInputs", "refuse_arguments"]

_READ_BY_THE_HOST = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
    "input_features_mask",
    "input_features_lengths",
)


@dataclass(frozen=True)
class ModelInputs:
    """Arguments of the models' `forward`, whose docstring describes them."""

    input_ids: Tensor | None = None
    input_features: Tensor | None = None
    input_features_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    past_key_values: PagedCache | None = None
    inputs_embeds: Tensor | None = None
    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    cache_position: Tensor | None = None
    input_features_lengths: list[int] | Tensor | None = None

    @property
    def has_past(self) -> bool:
        """Whether the cache holds keys of earlier calls."""
        return self.past_key_values is not None and any(self.past_key_values.lengths)

    def on_host(self) -> Self:
        """A copy whose tensors that shapes and checks depend on are on the CPU: one wait if any of them was on a device.

        `input_features` and `inputs_embeds` stay where they are.
        """
        tensors = {name: one for name in _READ_BY_THE_HOST if isinstance(one := getattr(self, name), Tensor)}
        return replace(self, **dict(zip(tensors, on_host(*tensors.values()), strict=True)))

    def check(self, device: torch.device) -> tuple[int, int]:
        """Raise InputError for arguments that do not fit together.

        Args:
            device: of the model.

        Returns:
            `(batch, width)` of the tokens.
        """
        if (self.input_ids is None) == (self.inputs_embeds is None):
            both = "both" if self.input_ids is not None else "neither"
            raise InputError(got=f"{both} of input_ids and inputs_embeds", expected="exactly one", remedy="Pass the one you have")
        if self.inputs_embeds is not None and self.input_features is not None:
            raise InputError(
                got="inputs_embeds with input_features",
                expected="features only with input_ids, which say where they go",
                remedy="Pass input_ids, or merge get_audio_features() into the embeddings yourself",
            )
        if self.inputs_embeds is None:
            batch, width = _check_ids(self.input_ids, device)
        else:
            batch, width = _check_embeddings(self.inputs_embeds, device)
        self._check_cache(batch)
        return batch, width

    def _check_cache(self, batch: int) -> None:
        cache = self.past_key_values
        if cache is not None and not isinstance(cache, PagedCache):
            raise InputError(
                got=f"past_key_values of {type(cache).__module__}.{type(cache).__qualname__}",
                expected="the PagedCache that an earlier call of this model returned",
                remedy="Start with past_key_values=None and pass on output.past_key_values",
            )
        if cache is not None and len(cache) != batch:
            raise InputError(
                got=f"{batch} rows for past_key_values of {len(cache)}",
                expected="the rows of the call that made the cache, in the same order",
                remedy="Pass the same batch, or no past_key_values",
            )


def refuse_arguments(unknown: Mapping[str, Any], call: str, allowed: Collection[str] = ()) -> None:
    """Raise InputError for arguments that a call does not have, unless they are None or `allowed`, as without effect."""
    names = sorted(name for name, value in unknown.items() if value is not None and name not in allowed)
    if names:
        raise InputError(got=f"unknown arguments {', '.join(names)}", expected=f"those of transformers' {call}", remedy="Remove them")


def _check_ids(ids: Tensor, device: torch.device) -> tuple[int, int]:
    _check_tensor("input_ids", ids)
    if ids.dim() != 2 or ids.device != device or ids.dtype not in (torch.int64, torch.int32):
        raise _wrong_tensor("input_ids", ids, f"integers (batch, sequence) on {device}")
    return ids.shape[0], ids.shape[1]


def _check_embeddings(embeddings: Tensor, device: torch.device) -> tuple[int, int]:
    _check_tensor("inputs_embeds", embeddings)
    if embeddings.dim() != 3 or embeddings.device != device or not embeddings.is_floating_point():
        raise _wrong_tensor("inputs_embeds", embeddings, f"floats (batch, sequence, hidden) on {device}")
    return embeddings.shape[0], embeddings.shape[1]


def _check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise InputError(
            got=f"{name} of type {type(value).__name__}",
            expected="a tensor",
            remedy="Use what the processor returns with return_tensors='pt'",
        )


def _wrong_tensor(name: str, value: Tensor, expected: str) -> InputError:
    return InputError(
        got=f"{name} of shape {tuple(value.shape)}, {value.dtype}, on {value.device}",
        expected=expected,
        remedy="Use what the processor returns, moved with .to()",
    )
