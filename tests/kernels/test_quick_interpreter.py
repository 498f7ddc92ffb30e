"""The quicker interpreter of the tests: it leaves out work, and neither results nor errors change."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def add(x, y):
    tl.static_assert(x.dtype == y.dtype)
    return x + y


@triton.jit
def kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    x = tl.load(x_ptr + places)
    total = tl.sum(x, 0)
    for _ in range(3):
        x = add(x, total)
    tl.store(out_ptr + places, x)


@pytest.fixture
def replacements(monkeypatch: pytest.MonkeyPatch) -> list:
    """One entry each time that the interpreter replaces the functions of triton.language."""
    seen, replace = [], interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda function: seen.append(function) or replace(function))
    return seen


def launched(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    kernel[(1,)](x, out, SIZE=len(x))
    return out


def test_functions_are_replaced_once_in_a_launch_and_put_back(replacements: list):
    x = torch.arange(8.0)
    launched(x)  # Triton never puts back what it replaces in `triton.language.core` for its own device functions
    replacements.clear()
    for _ in range(2):
        assert torch.equal(launched(x), x + 3 * x.sum())
    assert replacements == [interpreter.InterpretedFunction.rewritten_fn[kernel.fn]] * 2
    assert tl.static_range.__module__ == "triton.language.core"


def test_integers_wrap_as_on_a_gpu():
    assert launched(torch.tensor([2**30, 5], dtype=torch.int32)).tolist() == [15, 20 - 2**30]


def test_a_type_that_was_made_before_equals_a_new_one():
    for element in (tl.float16, tl.float32, tl.pointer_type(tl.float16), tl.pointer_type(tl.float32)):
        first, again = (tl.block_type(element, sizes) for sizes in ([2, 4], (2, tl.constexpr(4))))
        assert first == again != tl.block_type(element, [4, 2])
        assert again.element_ty == element and again.numel == 8 and again.shape == (2, 4)


def test_an_error_in_a_device_function_ends_the_launch():
    with pytest.raises(interpreter.InterpreterError, match="AssertionError"):
        _mixed[(1,)](torch.zeros(2), SIZE=2)
    assert tl.static_range.__module__ == "triton.language.core"


@triton.jit
def _mixed(x_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    add(tl.load(x_ptr + places), places)
