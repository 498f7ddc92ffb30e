"""Kernels of Granite Speech inference: tensors in, tensors out.

`OPERATIONS` is the table that tests, benchmarks and the compile audit loop over. A name here is the public function; the
file of the same stem holds all that there is to say about it: `from granite_kernels.block_attention import CASES`.
"""

from granite_kernels import block_attention as _block_attention
from granite_kernels import depthwise_conv as _depthwise_conv
from granite_kernels import lora_linear as _lora_linear
from granite_kernels import paged_attention as _paged_attention
from granite_kernels.op import KernelError, Operation

OPERATIONS: dict[str, Operation] = {
    file.OPERATION.name: file.OPERATION for file in (_block_attention, _depthwise_conv, _lora_linear, _paged_attention)
}

# The functions, which from here on hide the submodules of the same name as attributes of the package.
block_attention = _block_attention.block_attention
depthwise_conv = _depthwise_conv.depthwise_conv
lora_linear = _lora_linear.lora_linear
paged_attention = _paged_attention.paged_attention

__all__ = ["OPERATIONS", "KernelError", "block_attention", "depthwise_conv", "lora_linear", "paged_attention"]
