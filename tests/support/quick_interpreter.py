"""Triton's interpreter without work that has no effect, which is most of its work in kernels as small as those of the tests.

- At every launch it replaces the functions of `triton.language` by new ones, although those of the launch before would do, and at
  every call of a device function again, although the launch has done so.
- It computes sums and products of integers a second time, in 64 bits, to assert that they fit into 32. Unless it is debugging it then
  leaves the assertion out, but not the sums and products.
- For the result of every operation it makes a type and a shape, with checks and names, although a kernel has few different ones.
- Before every operation of two operands it finds their common type and shape again: see `quick_operators`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

from tests.support.quick_operators import make_operators_quick

__all__ = ["make_quick"]

_make_block_type, _find_np_dtype = tl.block_type.__init__, interpreter._get_np_dtype
_make_tensor, _make_handle, _types_are_equal = tl.tensor.__init__, interpreter.TensorHandle.__init__, tl.dtype.__eq__
_unwrap, _replace = tl.core._unwrap_if_constexpr, interpreter._patch_lang

_PLAIN = {tl.tensor, tl.dtype, tl.block_type, tl.pointer_type, int, float, bool, str, type(None)}

_languages: dict[Any, tuple[Any, ...]] = {}  # by function
_replacements: dict[tuple, list[tuple[Any, str, Any]]] = {}  # attributes and their values while a kernel runs, by the modules it sees
_block_types: dict[tuple, dict[str, Any]] = {}  # attributes, by name of the element type and sizes
_np_dtypes: dict[str, Any] = {}  # by name of the type
_valid_handles: set[tuple] = set()  # pairs of a dtype of NumPy and the name of a type of Triton that can hold its values
_members: dict[Any, Callable] = {}  # what replaces a function of `triton.language`, by the function
_operators: dict[str, Callable] = {}  # what replaces an operator of tensors, by name


def make_quick() -> None:
    """From now on, kernels that this process interprets run quicker, with the same results bit by bit."""
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._patch_attr = _patch_attr
    interpreter._patch_lang = _patch_lang
    interpreter._get_np_dtype = _np_dtype
    interpreter.TensorHandle.__init__ = _init_handle
    tl.block_type.__init__ = _init_block_type
    tl.tensor.__init__ = _init_tensor
    tl.dtype.__eq__ = _equal_types
    tl.core._unwrap_if_constexpr = _unwrapped
    _operators.update(make_operators_quick())
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


# --- functions -------------------------------------------------------------------------------------------------------------------


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
    return all(one.static_range.__module__ == interpreter.__name__ for one in _seen_by(function))


def _seen_by(function: Any) -> tuple[Any, ...]:
    """`triton.language` and `core`, if the function sees them."""
    if function not in _languages:
        seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        _languages[function] = tuple(one for one in (tl, tl.core) if one in seen)
    return _languages[function]


def _patch_lang(function: Any) -> Any:
    """Replace what Triton replaced at the first launch of a function that sees the same modules."""
    languages = _seen_by(function)
    if languages not in _replacements:
        scope = _replace(function)
        _replacements[languages] = [(owner, name, getattr(owner, name)) for owner, name, _ in scope._changes]
        return scope
    scope = interpreter._LangPatchScope()
    for owner, name, value in _replacements[languages]:
        scope.set_attr(owner, name, value)
    return scope


def _patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Replace a function by one that need not be given the builder."""
    if owner is tl.tensor and name in _operators:
        _members[member] = _operators[name]
    if member not in _members:
        inner, semantic = _body(member), interpreter.interpreter_semantic

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return inner(*args, **kwargs)

        _members[member] = call
    scope.set_attr(owner, name, _members[member])


_BODY_OF_BUILTIN = tl.core.builtin(lambda: None).__code__


def _body(member: Callable) -> Callable:
    """The function below the check that the builder was given."""
    return member.__wrapped__ if getattr(member, "__code__", None) is _BODY_OF_BUILTIN else member


# --- types -----------------------------------------------------------------------------------------------------------------------


def _np_dtype(dtype: tl.dtype) -> Any:
    """NumPy's dtype for a type of Triton."""
    if dtype.name not in _np_dtypes:
        _np_dtypes[dtype.name] = _find_np_dtype(dtype)
    return _np_dtypes[dtype.name]


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Sequence[Any]) -> None:
    """As Triton's own for a type that is new, else with the attributes of the one made before."""
    key = element_ty.name, *[one.value if isinstance(one, tl.constexpr) else one for one in shape]
    known = _block_types.get(key)
    if known is None:
        _make_block_type(self, element_ty, shape)
        _block_types[key] = self.__dict__
    else:
        self.__dict__ = known


def _equal_types(self: tl.dtype, other: Any) -> bool:
    return self is other or _types_are_equal(self, other)


# --- tensors ---------------------------------------------------------------------------------------------------------------------


def _init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    """As Triton's own, with the attributes of the last tensor of the type."""
    known = type.__dict__.get("_attributes")
    if known is None:
        _make_tensor(self, handle, type)
        type._attributes = {name: value for name, value in self.__dict__.items() if name != "handle"}
    else:
        self.__dict__.update(known)
        self.handle = handle


def _init_handle(self: Any, data: Any, dtype: tl.dtype, attr: dict | None = None) -> None:
    """As Triton's own, with one check for each pair of types."""
    key = data.dtype, dtype.name
    if key not in _valid_handles:
        _make_handle(self, data, dtype)
        _valid_handles.add(key)
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr


def _unwrapped(one: Any) -> Any:
    """The value of a compile-time constant, or of each of several."""
    kind = one.__class__
    return one.value if kind is tl.constexpr else one if kind in _PLAIN else _unwrap(one)
