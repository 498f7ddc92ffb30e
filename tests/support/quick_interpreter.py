"""Triton's interpreter without work that has no effect, which is most of its work in kernels as small as those of the tests.

- At every call of a device function it replaces the functions of `triton.language` by its own, although the launch has done so.
- It computes sums and products of integers a second time, in 64 bits, to assert that they fit into 32. Unless it is debugging it then
  leaves the assertion out, but not the sums and products.
"""

import inspect
from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

__all__ = ["make_quick"]

_languages: dict[Any, list[Any]] = {}


def make_quick() -> None:
    """From now on, kernels that this process interprets run quicker, with the same results bit by bit."""
    interpreter.InterpretedFunction.__call__ = _call
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
