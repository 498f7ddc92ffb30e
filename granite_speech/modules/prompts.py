"""What the host has to know of a call's inputs, read from the device once."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from granite_speech.modules.transfers import on_host

__all__ = ["HostInputs"]


@dataclass(frozen=True)
class HostInputs:
    """The inputs that shapes and checks depend on, on the host. Names and shapes are those of the models' `forward`."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cache_position: Tensor | None = None
    input_features_mask: Tensor | None = None
    input_features_lengths: list[int] | Tensor | None = None

    @classmethod
    def read(cls, **inputs: Tensor | list[int] | None) -> Self:
        """Bring the tensors among `inputs` to the host, with one wait for all that are on a device."""
        tensors = {name: one for name, one in inputs.items() if isinstance(one, Tensor)}
        return cls(**inputs | dict(zip(tensors, on_host(*tensors.values()), strict=True)))
