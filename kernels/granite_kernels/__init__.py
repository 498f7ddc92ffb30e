"""Kernels of Granite Speech inference: tensors in, tensors out.

`OPERATIONS` is the table that tests, benchmarks and the compile audit loop over. A name in it is the public function; the file
of the same name holds everything about that operation: `from granite_kernels.block_attention import CASES`.

torch is imported with the first operation that is used, so that the errors alone cost nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from granite_kernels.errors import GraniteSpeechError, KernelError

if TYPE_CHECKING:
    from granite_kernels.block_attention import block_attention
    from granite_kernels.depthwise_conv import depthwise_conv
    from granite_kernels.lora_linear import lora_linear
    from granite_kernels.op import Operation
    from granite_kernels.paged_attention import paged_attention

    OPERATIONS: dict[str, Operation]

__all__ = ["OPERATIONS", "GraniteSpeechError", "KernelError", "block_attention", "depthwise_conv", "lora_linear", "paged_attention"]

_OPERATIONS = ("block_attention", "depthwise_conv", "lora_linear", "paged_attention")


class _Package(ModuleType):
    """Keeps an operation's name for its function: importing the submodule of that name would otherwise replace it."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_operation = name in _OPERATIONS and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_operation else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _OPERATIONS:
        return getattr(import_module(f"{__name__}.{name}"), name)
    if name == "OPERATIONS":
        table = {operation: import_module(f"{__name__}.{operation}").OPERATION for operation in _OPERATIONS}
        return globals().setdefault(name, table)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
