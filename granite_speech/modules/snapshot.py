"""Whether a model is still what it was: the same modules with the same parameters at the same addresses, hooks and adapters included.

Whatever was prepared from a model (captured graphs, weights that are read as one matrix) is right for as long as this holds. Changes
of weights in place do not count: whoever reads memory sees them.
"""

import copy
from itertools import chain, repeat
from operator import is_
from typing import Any

from granite_kernels.launch import has_memory
from torch import Tensor, nn
from torch.nn.modules import module as every_module

__all__ = ["Snapshot"]

# Attributes that decide which adapter a layer uses: of LoraLinear, and of peft's layers.
_SWITCHES = {"adapter_enabled", "_active", "_disable_adapters", "_active_adapter", "merged_adapters", "scaling"}


class Snapshot:
    """The modules and parameters below some modules, as they are now. It keeps the parameters alive."""

    def __init__(self, *roots: nn.Module):
        modules = [*dict.fromkeys(chain.from_iterable(root.modules() for root in roots))]
        # Empty ones too: attaching an adapter fills one.
        self._tables = [table for one in modules for table in (one._parameters, one._buffers, one._modules)]
        self._values = self._contents()
        tensors = (one for module in modules for one in (*module._parameters.values(), *module._buffers.values()) if one is not None)
        self._tensors = [one for one in tensors if has_memory(one)]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        self._hook_tables = [table for one in modules for table in (one._forward_hooks, one._forward_pre_hooks)]
        self._attributes = [vars(one) for one in modules]
        self._hooks = self._hooks_now()
        switches = [(table, name) for table in self._attributes for name in _SWITCHES if not _SWITCHES.isdisjoint(table)]
        self._switches = [table for table, _ in switches], [name for _, name in switches]
        self._positions = [*map(copy.copy, self._now())]

    def have_hooks(self) -> bool:
        """Whether Python code of somebody else runs with a module: a hook, of all modules too, or a forward of the module's own."""
        return any(self._hooks_now())

    def is_current(self) -> bool:
        """Whether nothing has changed since. A small model asks this in every step, so all loops here are Python's own."""
        return (
            self._hooks_now() == self._hooks
            and self._now() == self._positions
            and len(contents := self._contents()) == len(self._values)
            and all(map(is_, contents, self._values))
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
        )

    def _hooks_now(self) -> list[int]:
        """How many hooks each module has, whether it has a forward of its own, and whether there are hooks of all modules."""
        of_modules = *map(len, self._hook_tables), *map(dict.__contains__, self._attributes, repeat("forward"))
        return [*of_modules, every_module._has_any_global_hook()]

    def _contents(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._tables))]

    def _now(self) -> list[Any]:
        """The positions of all switches; None for one that is missing."""
        return [*map(dict.get, *self._switches)]
