"""The quicker operators of the tests' interpreter give Triton's own results bit by bit, also for values that were not planned with."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import interpreter_semantic

from tests.support import quick_interpreter, quick_operators

PAIRS = [
    ("int32", "int32"),
    ("int32", "int64"),
    ("int64", "float32"),
    ("uint8", "int32"),
    ("float16", "uint8"),
    ("float32", "int32"),
    ("float32", "float16"),
    ("float32", "float32"),
    ("float64", "float32"),
]
PLANS = [name for name in vars(quick_operators) if name.endswith(("_plans", "_constants", "_ranges"))]


@triton.jit
def put(out_ptr, place, value):
    tl.store(out_ptr + place + tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :], (value + tl.zeros((4, 2), tl.int32)).to(tl.float64))


@triton.jit
def put_all(out_ptr, place, x, y):
    put(out_ptr, place, x + y)
    put(out_ptr, place + 8, x - y)
    put(out_ptr, place + 16, x * y)
    put(out_ptr, place + 24, x.to(tl.float32) / (y + 1))
    put(out_ptr, place + 32, x < y)
    put(out_ptr, place + 40, x <= y)
    put(out_ptr, place + 48, x > y)
    put(out_ptr, place + 56, x >= y)
    put(out_ptr, place + 64, x == y)
    put(out_ptr, place + 72, x != y)
    put(out_ptr, place + 80, (x < y) & (x != y))
    put(out_ptr, place + 88, tl.where(x < y, x, y))
    put(out_ptr, place + 96, y / (y + 1))


@triton.jit
def kernel(x_ptr, y_ptr, out_ptr):
    """Program 0 has zeros alone, with which many wrong plans give the right result."""
    program = tl.program_id(0)
    row, column = tl.arange(0, 4)[:, None], tl.arange(0, 2)
    x = tl.load(x_ptr + program * 4 + row)
    y = tl.load(y_ptr + program * 2 + column, mask=column < 2, other=0)
    place = program * 648
    put_all(out_ptr, place, x, y)
    put_all(out_ptr, place + 104, x, tl.load(y_ptr + program * 2))
    put_all(out_ptr, place + 208, tl.load(x_ptr + program * 4 + 1), y)
    put_all(out_ptr, place + 312, x, 3)
    put_all(out_ptr, place + 416, x.to(tl.float32), 0.1)
    put_all(out_ptr, place + 520, 2 - y.to(tl.int32), 5 * x.to(tl.int64) + program)
    put(out_ptr, place + 624, tl.load(y_ptr + program * 2 + row * 0 + column, mask=row < 2, other=1))
    put(out_ptr, place + 632, tl.sum(x * tl.arange(0, 4)[None, :], 1)[:, None])
    put(out_ptr, place + 640, x.to(tl.float32).to(tl.bfloat16).to(tl.float64))


@pytest.fixture
def as_triton(monkeypatch):
    """Replaces the quick operators by Triton's own."""

    def replace():
        for name in vars(interpreter_semantic).keys() - vars(TritonSemantic(interpreter_semantic.builder)).keys():
            monkeypatch.delattr(interpreter_semantic, name)
        for name, function in quick_operators._own.items():
            monkeypatch.setattr(tl.tensor, name, function)
        monkeypatch.setattr(quick_interpreter, "_operators", {})
        monkeypatch.setattr(quick_interpreter, "_members", {})
        monkeypatch.setattr(quick_interpreter, "_replacements", {})

    return replace


def forget(monkeypatch):
    for name in PLANS:
        monkeypatch.setattr(quick_operators, name, {})


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_results_are_those_of_triton(monkeypatch, as_triton, left, right):
    forget(monkeypatch)
    x, y = (torch.randint(0, 100, (2, size), generator=torch.Generator().manual_seed(size)) for size in (4, 2))
    x, y = (one * torch.tensor([[0], [1]]) / (1 if "int" in name else 7) for one, name in ((x, left), (y, right)))
    x, y = x.to(getattr(torch, left)), y.to(getattr(torch, right))
    results = torch.zeros(2, 1296, dtype=torch.float64)
    kernel[(2,)](x, y, results[0])
    assert all(getattr(quick_operators, name) for name in PLANS)
    as_triton()
    forget(monkeypatch)
    kernel[(2,)](x, y, results[1])
    assert not any(getattr(quick_operators, name) for name in PLANS)
    assert torch.equal(*results.view(torch.int64))
    assert results[:, 648:].any()


@pytest.mark.parametrize("pair", [("bf16", "fp32"), ("fp32", "bf16")], ids=str)
def test_bfloat16_has_the_bits_of_triton(pair):
    """Zeros, the least and greatest numbers, infinities, NaN and any others; subnormal numbers too, which Triton gets wrong."""
    given, made = (next(one for one in (tl.bfloat16, tl.float32) if one.name == name) for name in pair)
    size = given.primitive_bitwidth // 8
    bits = np.random.default_rng(0).integers(0, 1 << 8 * size, 500, dtype=f"u{size}")
    special = np.array([0, 0x8000, 0x0080, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0x3F80], f"u{size}") << 8 * (size - 2)
    normal = np.concatenate((special, bits[(bits >> 8 * size - 9 & 0xFF) != 0][:400])).reshape(-1, 2)
    for values in (normal, normal[8:, :1], np.concatenate((normal, np.array([[1, 2]], f"u{size}")))):
        values = values.view(np.float32) if size == 4 else values
        for rounding in (None, ir.ROUNDING_MODE.RTNE):
            expected = quick_operators._convert(values, given, made, rounding)
            found = quick_operators._converted(values, given, made, rounding)
            assert found.dtype == expected.dtype and np.array_equal(found, expected)
