"""How much memory a piece of code needs, counted from the tensors that it makes."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Allocations"]


class Allocations(TorchDispatchMode):
    """The bytes of all storages made inside that exist at once: now, and at most."""

    def __init__(self):
        super().__init__()
        self.peak, self._storages = 0, {}

    @property
    def now(self) -> int:
        self._storages = {key: one for key, one in self._storages.items() if one() is not None}
        return sum(one().nbytes() for one in self._storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {one.untyped_storage()._cdata for one in args if isinstance(one, Tensor)}
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta and result.untyped_storage()._cdata not in given:
            self._storages[result.untyped_storage()._cdata] = weakref.ref(result.untyped_storage())
            self.peak = max(self.peak, self.now)
        return result
