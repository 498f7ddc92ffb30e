"""Tests of the functions that operations have for CPU tensors without gradients."""

import pytest
import torch
from granite_kernels import OPERATIONS
from granite_kernels.op import CHOICE, Case, Operation
from granite_kernels.testing import assert_accurate, assert_same_bits, error, in_float64, poisoned_allocations, strided_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.test_operations import rows_used

HAVE_CPU = [op for op in OPERATIONS.values() if op.has_cpu and op.packed]
ALL = [pytest.param(op, id=op.name) for op in HAVE_CPU]
SMALL = [pytest.param(op, case, id=f"{op.name}: {case.name}") for op in HAVE_CPU for case in op.cases if not case.released]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch):
    """As if this processor multiplied bfloat16 fast: elsewhere these functions leave bfloat16 to the reference."""
    monkeypatch.delenv(CHOICE, raising=False)
    for op in HAVE_CPU:
        monkeypatch.setattr(f"granite_kernels.{op.name}_cpu.has_bfloat16", lambda: True)


def small(op: Operation, dtype: torch.dtype = torch.bfloat16) -> dict:
    return next(case for case in op.cases if not case.released).inputs(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_every_case_is_accurate(op: Operation, case: Case, dtype: torch.dtype):
    inputs = case.inputs(dtype)
    with torch.no_grad(), poisoned_allocations():
        assert_accurate(op.cpu(**inputs), op.reference(**inputs), op.reference(**in_float64(inputs)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_strided_views_give_the_same_and_padding_is_zero(op: Operation, case: Case, dtype: torch.dtype):
    inputs = case.inputs(dtype)
    with torch.no_grad(), poisoned_allocations():
        plain, views = op.cpu(**inputs), op.cpu(**strided_inputs(inputs))
    assert plain.dtype == dtype
    assert plain.is_contiguous()
    assert error(views, plain).max <= (2e-6 if dtype == torch.float32 else 2.0**-8)
    assert not plain[rows_used(inputs, "out") :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_a_clip_gets_the_same_bits_in_every_batch(op: Operation, case: Case, dtype: torch.dtype):
    assert_same_bits(op, case.inputs(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL)
def test_released_widths_and_clips_of_several_chunks_are_accurate_and_independent(op: Operation, dtype: torch.dtype):
    case = next(case for case in op.cases if "30 s" in case.name)
    # More frames than are computed at a time, then neighbours of the same length.
    inputs = Case(case.name, case.make, {**case.shape, "clips": (1130, 60, 60)}).inputs(dtype)
    with torch.no_grad():
        assert_accurate(op.call(**inputs), op.reference(**inputs), op.reference(**in_float64(inputs)))
    assert_same_bits(op, inputs)


@pytest.mark.parametrize("op", ALL)
def test_calls_and_modules_use_it_by_default_and_the_reference_on_request(op: Operation, monkeypatch: pytest.MonkeyPatch):
    inputs, used = small(op), []
    monkeypatch.setitem(vars(op), "cpu", lambda *args, **options: used.append(True))
    options = {"context_size": inputs["context_size"]} if "context_size" in inputs else {}
    with torch.no_grad():
        op.call(**inputs)
        op.run(*(value for name, value in inputs.items() if name not in options), **options)
        assert len(used) == 2
        op.call(**inputs, impl="torch")
        monkeypatch.setenv(CHOICE, "torch")
        op.call(**inputs)
    assert len(used) == 2


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", ALL)
def test_calls_that_something_else_has_to_see_run_the_reference(op: Operation, monkeypatch: pytest.MonkeyPatch):
    inputs = small(op)
    monkeypatch.setitem(vars(op), "cpu", lambda *args, **options: pytest.fail("not the reference"))
    first = op.differentiable[0]
    assert op.call(**{**inputs, first: inputs[first].clone().requires_grad_()}).requires_grad
    with torch.no_grad(), Watching():
        op.call(**inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ALL)
def test_dtypes_that_the_processor_is_slow_at_are_the_references(op: Operation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"granite_kernels.{op.name}_cpu.has_bfloat16", lambda: False)
    inputs = small(op, dtype)
    with torch.no_grad():
        assert torch.equal(op.cpu(**inputs), op.reference(**inputs))
