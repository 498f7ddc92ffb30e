"""Triton's interpreter without work that has no effect, which is most of its work in kernels as small as those of the tests.

- At every call of a device function it replaces the functions of `triton.language` by its own, although the launch has done so.
- It computes sums and products of integers a second time, in 64 bits, to assert that they fit into 32. Unless it is debugging it then
  leaves the assertion out, but not the sums and products.
- For the result of every operation it makes a type, with checks and a name, although a kernel has few different ones.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

__all__ = ["make_quick"]

_make_block_type, _find_np_dtype = tl.block_type.__init__, interpreter._get_np_dtype
_languages: dict[Any, list[Any]] = {}  # by function
_block_types: dict[tuple, dict[str, Any]] = {}  # attributes, by name of the element type and sizes
_np_dtypes: dict[str, Any] = {}  # by name of the type


def make_quick() -> None:
    """From now on, kernels that this process interprets run quicker, with the same results bit by bit."""
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _np_dtype
    tl.block_type.__init__ = _init_block_type
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


def _call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """Call a device function. Only the condition is not Triton's own."""
    if not _replaced(self.fn):
        interpreter._patch_lang(self.fn)
    function = self.rewrite()
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _replaced(function: Any) -> bool:
    """Whether the interpreter has put its own functions into the modules `triton.language` and `core` that a function sees."""
    if function not in _languages:
        seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        _languages[function] = [one for one in seen if one in (tl, tl.core)]
    return all(one.static_range.__module__ == interpreter.__name__ for one in _languages[function])


def _np_dtype(dtype: tl.dtype) -> Any:
    """NumPy's dtype for a type of Triton."""
    if dtype.name not in _np_dtypes:
        _np_dtypes[dtype.name] = _find_np_dtype(dtype)
    return _np_dtypes[dtype.name]


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Sequence[Any]) -> None:
    """As Triton's own for a type that is new, else with the attributes of the one made before."""
    sizes = (one.value if isinstance(one, tl.constexpr) else one for one in shape)
    key = element_ty.name, *sizes
    if key not in _block_types:
        _make_block_type(self, element_ty, shape)
        _block_types[key] = self.__dict__.copy()
    self.__dict__.update(_block_types[key])
