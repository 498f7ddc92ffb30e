"""What stages of fixed shape share: sizes rounded up to a few values, and small inputs that one copy fills."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from granite_speech.modules.transfers import on_device

__all__ = ["Field", "InputBlock", "is_inference", "power_of_2", "round_up"]

# Every field begins at a multiple of this many bytes, so that it can be viewed in any dtype.
_ALIGNMENT = 8


def round_up(number: int, steps: Sequence[tuple[int, int]]) -> int | None:
    """The next size that stages are made for; None if there is none.

    Args:
        number: what must fit.
        steps: pairs (multiple, largest), in ascending order: sizes up to `largest` are multiples of `multiple`.
    """
    multiple = next((multiple for multiple, largest in steps if number <= largest), None)
    return None if multiple is None else -(-number // multiple) * multiple


def power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def is_inference(*modules: nn.Module) -> bool:
    """Whether these modules run as a stage would run them: without gradients, dropout and batch statistics."""
    return not torch.is_grad_enabled() and not any(module.training for module in modules)


@dataclass(frozen=True)
class Field:
    """One tensor of an `InputBlock`.

    Attributes:
        shape: fixed.
        dtype: of integers.
        padding: the value of entries that a call does not fill.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    padding: int = 0

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class InputBlock:
    """A stage's index tensors, in one block of device memory: one copy from pinned memory fills them all, without a wait.

    Args:
        device: of the block.
        fields: the tensors, by name. All entries are padding at first.
    """

    def __init__(self, device: torch.device, fields: Mapping[str, Field]):
        self._fields = dict(fields)
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside it
            self._block = torch.empty(sum(map(_room, fields.values())), dtype=torch.uint8, device=device)
            self._tensors = self._views(self._block)
        self.fill({})

    def __getitem__(self, name: str) -> Tensor:
        """The device tensor of a field; its address never changes."""
        return self._tensors[name]

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Write host tensors to the first entries of their fields, and padding to all other entries."""
        host = torch.empty(self._block.shape, dtype=torch.uint8)
        for name, target in self._views(host).items():
            target.fill_(self._fields[name].padding)
            if name in values:
                target[tuple(map(slice, values[name].shape))] = values[name]
        self._block.copy_(on_device(host, self._block.device))

    def _views(self, block: Tensor) -> dict[str, Tensor]:
        parts = block.split([_room(field) for field in self._fields.values()])
        return {
            name: part[: field.bytes].view(field.dtype).view(field.shape)
            for (name, field), part in zip(self._fields.items(), parts, strict=True)
        }


def _room(field: Field) -> int:
    return -(-field.bytes // _ALIGNMENT) * _ALIGNMENT
