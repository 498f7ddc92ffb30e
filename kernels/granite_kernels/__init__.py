"""The kernels of Granite Speech: tensors in, tensors out.

Tests, benchmarks and the compile audit loop over the table `OPERATIONS`. Each name in it is a public function of this package
and the file that holds the operation: `from granite_kernels.block_attention import CASES`.

torch is imported when an operation is first used, so importing only the errors is fast.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from granite_kernels.errors import GraniteSpeechError, KernelError

if TYPE_CHECKING:
    from granite_kernels.add_layer_norm import add_layer_norm
    from granite_kernels.add_rms_norm import add_rms_norm
    from granite_kernels.attention_blocks import attention_blocks
    from granite_kernels.begin_step import begin_step
    from granite_kernels.block_attention import block_attention
    from granite_kernels.ctc_greedy import ctc_greedy
    from granite_kernels.decode_attention import decode_attention
    from granite_kernels.depthwise_conv import depthwise_conv
    from granite_kernels.exponential_noise import exponential_noise
    from granite_kernels.finish_step import finish_step
    from granite_kernels.fused_linear import fused_linear
    from granite_kernels.head_argmax import head_argmax
    from granite_kernels.lora_linear import lora_linear
    from granite_kernels.op import Operation
    from granite_kernels.paged_attention import paged_attention
    from granite_kernels.rotary_write import rotary_write
    from granite_kernels.silu_linear import silu_linear
    from granite_kernels.silu_product import silu_product
    from granite_kernels.split_linear import split_linear
    from granite_kernels.window_attention import window_attention

    OPERATIONS: dict[str, Operation]

__all__ = [
    "OPERATIONS",
    "GraniteSpeechError",
    "KernelError",
    "add_layer_norm",
    "add_rms_norm",
    "attention_blocks",
    "begin_step",
    "block_attention",
    "ctc_greedy",
    "decode_attention",
    "depthwise_conv",
    "exponential_noise",
    "finish_step",
    "fused_linear",
    "head_argmax",
    "lora_linear",
    "paged_attention",
    "rotary_write",
    "silu_linear",
    "silu_product",
    "split_linear",
    "window_attention",
]

_OPERATIONS = (
    "add_layer_norm",
    "add_rms_norm",
    "attention_blocks",
    "begin_step",
    "block_attention",
    "ctc_greedy",
    "decode_attention",
    "depthwise_conv",
    "exponential_noise",
    "finish_step",
    "fused_linear",
    "head_argmax",
    "lora_linear",
    "paged_attention",
    "rotary_write",
    "silu_linear",
    "silu_product",
    "split_linear",
    "window_attention",
)


class _Package(ModuleType):
    """Keeps each operation's name bound to its function, which importing the submodule of that name would replace."""

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
