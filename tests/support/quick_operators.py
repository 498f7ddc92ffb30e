"""Quicker operators of Triton's interpreter: for the types of two operands it finds once what has to be done, and then has NumPy do it.

Triton finds the common type before every operation, and copies an operand that is smaller than the other. What it finds depends on the
operands' types and on constants alone, and NumPy needs no copy. So the first operation with operands of some types is Triton's own. It
is then done again the quick way, and unless both results are the same bit by bit, these types are left to Triton.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["make_operators_quick"]

Operator = Callable[[Any, Any], Any]

_semantic = interpreter.interpreter_semantic
_check_operands, _broadcast = _semantic.binary_op_type_checking_impl, _semantic.broadcast_impl_value
_cast, _to_tensor, _arange = _semantic.cast, _semantic.to_tensor, _semantic.arange
_convert = interpreter._convert_float

_operand_plans: dict[tuple, tuple["_Plan | None", "_Plan | None"]] = {}  # by the types of operands
_operation_plans: dict[tuple, "_Operation | None"] = {}  # by the operator and the types
_shape_plans: dict[tuple, tuple[tl.dtype | None, tl.dtype | None]] = {}  # by the types: those with the common shape
_cast_plans: dict[tuple, tl.dtype | None] = {}  # by both types
_index_plans: dict[tuple, tl.dtype] = {}  # by the type and the new axes
_constants: dict[tuple, tl.tensor] = {}
_ranges: dict[tuple, tl.tensor] = {}

_FULL = slice(None)
# Types between which a cast is one step.
_NUMBERS = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "fp32", "fp64"}
_HALVES = {("fp16", "fp32"), ("fp32", "fp16"), ("bf16", "fp32"), ("fp32", "bf16")}
# NumPy's function, what `binary_op_type_checking_impl` is told, and whether a number becomes a tensor before it is looked at.
_OPERATORS = {
    "__add__": (np.add, (True, True), False),
    "__sub__": (np.subtract, (True, False), False),
    "__mul__": (np.multiply, (), False),
    "__truediv__": (np.divide, (False, False, True, True), False),
    "__and__": (np.bitwise_and, (), False),
    "__or__": (np.bitwise_or, (), False),
    "__lt__": (np.less, (), True),
    "__le__": (np.less_equal, (), True),
    "__gt__": (np.greater, (), True),
    "__ge__": (np.greater_equal, (), True),
    "__eq__": (np.equal, (), True),
    "__ne__": (np.not_equal, (), True),
}
_REFLECTED = {"__radd__": "__add__", "__rsub__": "__sub__", "__rmul__": "__mul__", "__rtruediv__": "__truediv__"}
_own = {name: getattr(tl.tensor, name) for name in ("__getitem__", *_OPERATORS, *_REFLECTED)}


def make_operators_quick() -> dict[str, Operator]:
    """Make the insides of the interpreter's operators quick, and not those of the compiler.

    Returns what may replace operators of `tl.tensor` while a kernel is interpreted, by name.
    """
    _semantic.binary_op_type_checking_impl = _operands
    _semantic.broadcast_impl_value = _same_shape
    _semantic.cast = _quick_cast
    _semantic.to_tensor = _as_tensor
    _semantic.arange = _known_range
    interpreter._convert_float = _converted
    operators = {name: _operator(_own[name], *given) for name, given in _OPERATORS.items()}
    reflected = {name: _swapped(operators[other]) for name, other in _REFLECTED.items()}
    return {"__getitem__": _new_axes, **operators, **reflected}


# --- operands --------------------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What becomes of an operand: a constant, or the operand cast to an element type, under a type that may have more elements."""

    constant: tl.tensor | None
    element_ty: tl.dtype | None
    type: tl.dtype | None


def _key(operand: Any) -> Any:
    return operand.type.name if operand.__class__ is tl.tensor else (operand.__class__, repr(operand))


def _operands(lhs: Any, rhs: Any, *options: bool) -> tuple[tl.tensor, tl.tensor]:
    """As Triton's own, but a smaller operand keeps its size: NumPy stretches it in the operation that follows."""
    key = _key(lhs), _key(rhs), options
    plans = _operand_plans.get(key)
    if plans is None:
        found = _check_operands(lhs, rhs, *options)
        _operand_plans[key] = tuple(_plan(*one) for one in zip((lhs, rhs), found, strict=True))
        return found
    return _planned(lhs, plans[0]), _planned(rhs, plans[1])


def _plan(operand: Any, found: tl.tensor) -> _Plan | None:
    if operand is found:
        return None
    if operand.__class__ is not tl.tensor:
        one = interpreter.TensorHandle(found.handle.data.reshape(-1)[:1].copy(), found.handle.dtype)
        return _Plan(tl.tensor(one, found.type), None, None)
    cast = operand.dtype != found.dtype
    return _Plan(None, found.dtype if cast else None, found.type)


def _planned(operand: Any, plan: _Plan | None) -> tl.tensor:
    if plan is None:
        return operand
    constant, element_ty, kind = plan
    if constant is not None:
        return constant
    if element_ty is not None:
        operand = _semantic.cast(operand, element_ty)
    return operand if operand.type is kind else tl.tensor(operand.handle, kind)


# --- operators -------------------------------------------------------------------------------------------------------------------


class _Operation(NamedTuple):
    """How an operator is applied: plans of its operands, and the type of its result."""

    lhs: _Plan | None
    rhs: _Plan | None
    type: tl.dtype
    bytes: int | None  # per element, if the left operand is a pointer


def _operator(own: Callable, function: Callable, options: tuple[bool, ...], converts: bool) -> Operator:
    """An operator of `tl.tensor` that plans once for operands of the same types."""

    def operator(lhs: Any, rhs: Any) -> tl.tensor:
        if rhs.__class__ is tl.constexpr:
            rhs = rhs.value
        if converts:
            rhs = _as_tensor(rhs)
        key = function, _key(lhs), _key(rhs)
        if key in _operation_plans:
            plan = _operation_plans[key]
            return own(lhs, rhs, _semantic=_semantic) if plan is None else _applied(function, plan, lhs, rhs)
        result = own(lhs, rhs, _semantic=_semantic)
        _operation_plans[key] = _verified(function, lhs, rhs, result, options)
        return result

    return operator


def _swapped(operator: Operator) -> Operator:
    return lambda self, other: operator(other, self)


def _verified(function: Callable, lhs: Any, rhs: Any, result: tl.tensor, options: tuple[bool, ...]) -> _Operation | None:
    """How to apply the operator to operands like these, or None if that would not give this result."""
    operands = _check_operands(lhs, rhs, *options)
    pointers = [one.dtype.is_ptr() for one in operands]
    if pointers[1] or (pointers[0] and (function is not np.add or operands[1].dtype.is_int_unsigned())):
        return None
    size = max(1, operands[0].dtype.element_ty.primitive_bitwidth // 8) if pointers[0] else None
    operation = _Operation(_plan(lhs, operands[0]), _plan(rhs, operands[1]), result.type, size)
    data, dtype = _computed(function, operation, lhs, rhs)
    own = result.handle
    same = dtype == own.dtype and data.dtype == own.data.dtype and data.shape == own.data.shape
    return operation if same and data.tobytes() == own.data.tobytes() else None


def _applied(function: Callable, operation: _Operation, lhs: Any, rhs: Any) -> tl.tensor:
    return tl.tensor(interpreter.TensorHandle(*_computed(function, operation, lhs, rhs)), operation.type)


def _computed(function: Callable, operation: _Operation, lhs: Any, rhs: Any) -> tuple[Any, tl.dtype]:
    lhs, rhs = _planned(lhs, operation.lhs).handle, _planned(rhs, operation.rhs).handle
    size = operation.bytes
    data = function(lhs.data, rhs.data) if size is None else lhs.data + size * rhs.data.astype(np.uint64)
    return data, lhs.dtype


# --- casts -----------------------------------------------------------------------------------------------------------------------


def _quick_cast(input: tl.tensor, dst_ty: tl.dtype, fp_downcast_rounding: str | None = None) -> tl.tensor:
    if input.dtype is dst_ty.scalar:
        return input
    key = input.type.name, dst_ty.name
    if key not in _cast_plans:
        result = _cast(input, dst_ty, fp_downcast_rounding)
        pair = input.dtype.name, result.dtype.name
        _cast_plans[key] = result.type if set(pair) <= _NUMBERS or pair in _HALVES else None
        return result
    kind = _cast_plans[key]
    if kind is None or fp_downcast_rounding is not None:
        return _cast(input, dst_ty, fp_downcast_rounding)
    return tl.tensor(_semantic.builder.cast_impl(input.handle, kind), kind)


def _converted(input: np.ndarray, input_dtype: tl.dtype, output_dtype: tl.dtype, rounding_mode: Any) -> np.ndarray:
    """Bits of other floating-point numbers. As Triton's own, which goes wrong with subnormal numbers and is left to it then."""
    pair = input_dtype.name, output_dtype.name
    if rounding_mode is None and pair in (("bf16", "fp32"), ("fp32", "bf16")):
        bits = input.view(f"u{input.itemsize}")
        wide = bits if pair[0] == "fp32" else bits.astype(np.uint32) << 16
        if not ((wide & 0x7FFFFFFF) - np.uint32(1) < 0x7FFFFF).any():
            return (wide >> 16).astype(np.uint16) if pair[0] == "fp32" else wide
    return _convert(input, input_dtype, output_dtype, rounding_mode)


# --- shapes ----------------------------------------------------------------------------------------------------------------------


def _same_shape(lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Both tensors in their common shape, in memory too."""
    key = lhs.type.name, rhs.type.name
    types = _shape_plans.get(key)
    if types is None:
        found = _broadcast(lhs, rhs)
        _shape_plans[key] = tuple(None if new is old else new.type for new, old in zip(found, (lhs, rhs), strict=True))
        return found
    return _stretched(lhs, types[0]), _stretched(rhs, types[1])


def _stretched(tensor: tl.tensor, kind: tl.dtype | None) -> tl.tensor:
    if kind is None:
        return tensor
    small = tensor.handle
    data = np.empty(kind.shape, small.data.dtype)
    data[...] = small.data
    return tl.tensor(interpreter.TensorHandle(data, small.dtype.scalar), kind)


def _new_axes(self: tl.tensor, slices: Any) -> tl.tensor:
    """An index of `None` and `:`."""
    key = (self.type.name, *[one is None for one in slices]) if slices.__class__ is tuple else None
    kind = _index_plans.get(key)
    if kind is None or not all(one is None or one == _FULL for one in slices):
        result = _own["__getitem__"](self, slices, _semantic=_semantic)
        if key is not None and self.type.is_block():
            _index_plans[key] = result.type
        return result
    return tl.tensor(interpreter.TensorHandle(self.handle.data.reshape(kind.shape), self.handle.dtype.scalar), kind)


# --- constants -------------------------------------------------------------------------------------------------------------------


def _as_tensor(x: Any, check_type: bool = True) -> Any:
    kind = x.__class__
    if kind is tl.tensor:
        return x
    if kind is not int and kind is not float:
        return _to_tensor(x, check_type)
    key = kind, repr(x)
    if key not in _constants:
        _constants[key] = _to_tensor(x)
    return _constants[key]


def _known_range(start: int, end: int, *, ret_ty: tl.dtype | None = None) -> tl.tensor:
    if ret_ty is not None:
        return _arange(start, end, ret_ty=ret_ty)
    if (start, end) not in _ranges:
        _ranges[start, end] = _arange(start, end)
    return _ranges[start, end]
