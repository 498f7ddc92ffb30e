"""Tests of every operation, on the CPU by its PyTorch reference."""

import dataclasses
import importlib
import inspect
import os
import pickle
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from granite_kernels import OPERATIONS, KernelError
from granite_kernels.op import CHOICE, Case, Operation, nbytes
from granite_kernels.testing import (
    TOLERANCES,
    assert_accurate,
    assert_operation_accurate,
    error,
    in_float64,
    outcome,
    outcome_of,
    poisoned_allocations,
    strided,
    strided_inputs,
)

from tests.support.paths import ROOT

SMALL = [pytest.param(op, case, id=f"{op.name}: {case.name}") for op in OPERATIONS.values() for case in op.cases if not case.released]
ALL = [pytest.param(op, id=op.name) for op in OPERATIONS.values()]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # The tensors are too small to split, and on a busy machine threads that wait for each other take four times as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bits(tensor: torch.Tensor) -> list:
    return tensor.contiguous().view(torch.uint8).tolist()


def takes_floats(inputs: dict) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in inputs.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_every_case_is_accurate(op: Operation, case: Case, dtype: torch.dtype):
    assert_operation_accurate(op, case.inputs(dtype))


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_strided_views_give_the_same_results(op: Operation, case: Case):
    inputs = case.inputs(torch.float32)
    with poisoned_allocations():
        plain = outcome_of(op, op.call, inputs)
        views = outcome_of(op, op.call, strided_inputs(inputs))
    for name in plain:
        assert error(views[name], plain[name]).max <= 2e-6, name


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_the_result_is_finite_has_the_inputs_dtype_and_is_zero_in_padding(op: Operation, case: Case):
    inputs = case.inputs(torch.bfloat16)
    results = outcome_of(op, op.call, inputs)
    for name, tensor in results.items():
        if name.startswith("out"):
            allowed = (torch.bfloat16, torch.float32) if takes_floats(inputs) else (torch.float32,)
            assert tensor.dtype in allowed or not tensor.is_floating_point()
            assert tensor.is_contiguous()
        if not name.startswith("after"):  # what is not written there may be poison
            assert tensor.isfinite().all()
    if op.packed:
        assert results["out"].shape[0] == inputs[op.packed[0]].shape[0] // inputs.get("stride", 1)
        for name in ("out", *(f"grad {name}" for name in op.packed if f"grad {name}" in results)):
            assert not results[name][rows_used(inputs, name) :].any(), name


def rows_used(inputs: dict, name: str) -> int:
    """How many rows of a packed call's result, or of a gradient of it, belong to a sequence."""
    lengths = inputs["cu_seqlens" if "cu_seqlens" in inputs else "cu_seqlens_q"].diff()
    return int((lengths // inputs.get("stride", 1) if name == "out" else lengths).sum())


@pytest.mark.parametrize("op", ALL)
def test_packed_operations_have_cases_with_padding_and_without_sequences(op: Operation):
    if op.packed:
        assert any(case.shape.get("padding") for case in op.cases)
        assert any(not case.shape.get("clips", case.shape.get("sequences")) for case in op.cases)


@pytest.mark.parametrize("op", ALL)
def test_case_names_are_unique_and_some_cases_have_released_shapes(op: Operation):
    names = [case.name for case in op.cases]
    assert len(set(names)) == len(names)
    assert {case.released for case in op.cases} == {True, False}


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_a_seed_determines_the_values_of_a_case(op: Operation, case: Case):
    once, again, other = case.inputs(torch.float32), case.inputs(torch.float32), case.inputs(torch.float32, seed=1)
    tensors = [name for name, value in once.items() if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()]
    assert all(bits(once[name]) == bits(again[name]) for name in tensors)
    random = [name for name in tensors if once[name].isfinite().any()]
    assert all(bits(once[name]) != bits(other[name]) for name in random)


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_cost_includes_the_result_and_shrinks_with_the_dtype(op: Operation, case: Case):
    wide, narrow = op.cost(**case.inputs(torch.float32)), op.cost(**case.inputs(torch.bfloat16))
    results = outcome_of(op, op.call, case.inputs(torch.float32))
    assert wide.flops == narrow.flops >= 0
    assert nbytes(*(tensor for name, tensor in results.items() if name.startswith("out"))) <= wide.bytes
    assert wide.bytes / 2 <= narrow.bytes <= wide.bytes


@pytest.mark.parametrize("op", ALL)
def test_impl_depends_on_device_dtype_and_whether_triton_is_installed(op: Operation, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(CHOICE, raising=False)
    assert op.resolve(None, CUDA) == op.resolve("triton", CUDA) == op.resolve("triton", CPU) == "triton"
    assert op.resolve(None, CPU) == op.resolve("torch", CUDA) == op.resolve(None, CUDA, torch.float64) == "torch"
    assert op.select("triton", torch.zeros(1)) is op.triton
    assert op.select(None, torch.zeros(1)) == (op.on_cpu if op.has_cpu else op.reference)
    assert op.select("torch", torch.zeros(1)) is op.reference
    for integer in (torch.int32, torch.int64):  # an operation on integers has kernels too
        assert op.select("triton", torch.zeros(1, dtype=integer)) is op.triton
    with pytest.raises(KernelError, match=r"impl='triton' for torch.float64; expected one of torch.float32, .*Use impl='torch'"):
        op.resolve("triton", CUDA, torch.float64)
    with pytest.raises(KernelError, match="impl='cuda'; expected one of 'triton', 'torch', or nothing"):
        op.resolve("cuda", CPU)
    without = dataclasses.replace(op, triton=None)
    assert without.resolve(None, CUDA) == "torch"
    with pytest.raises(KernelError, match=r"impl='triton' without triton installed; expected the package triton\. Use impl='torch'"):
        without.resolve("triton", CUDA)


@pytest.mark.parametrize("op", ALL)
def test_the_environment_variable_overrides_only_the_default(op: Operation, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, "triton")
    assert op.resolve(None, CPU) == op.resolve(None, CUDA) == "triton"
    assert op.resolve("torch", CPU) == "torch"
    with pytest.raises(KernelError, match=rf"{CHOICE}=triton for torch.float64; expected one of"):
        op.resolve(None, CPU, torch.float64)
    monkeypatch.setenv(CHOICE, "torch")
    assert op.resolve(None, CUDA) == "torch"
    assert op.resolve("triton", CUDA) == "triton"
    monkeypatch.setenv(CHOICE, "")
    assert op.resolve(None, CUDA) == "triton"
    monkeypatch.setenv(CHOICE, "fast")
    with pytest.raises(KernelError, match=rf"{CHOICE}=fast; expected one of 'triton', 'torch', or nothing"):
        op.call(**next(case for case in op.cases if not case.released).inputs(torch.float32))


def test_triton_on_cpu_tensors_needs_the_interpreter():
    program = (
        "import sys; sys.path.insert(0, 'kernels')\n"
        "import granite_kernels, torch\n"
        "for op in granite_kernels.OPERATIONS.values():\n"
        "    inputs = next(case for case in op.cases if not case.released).inputs(torch.float32)\n"
        "    try:\n"
        "        op.call(**inputs, impl='triton')\n"
        "    except granite_kernels.KernelError as error:\n"
        "        print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", CHOICE)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, timeout=60, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(OPERATIONS)
    assert all("impl='triton' for CPU tensors; expected CUDA tensors, or Triton's interpreter. Use impl='torch'" in line for line in lines)


@pytest.mark.parametrize("op", ALL)
def test_the_public_function_uses_impl(op: Operation):
    inputs = next(case for case in op.cases if not case.released).inputs(torch.float32)
    assert same(outcome_of(op, partial(op.call, impl="torch"), inputs), outcome_of(op, op.reference, inputs))
    with pytest.raises(KernelError, match=op.name):
        op.call(**inputs, impl="fast")


@pytest.mark.parametrize("op", ALL)
def test_run_gives_the_same_without_checks_and_checks_where_a_gradient_is_needed(op: Operation, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(CHOICE, raising=False)
    inputs = next(case for case in op.cases if not case.released).inputs(torch.float32)
    checked = []
    watched = dataclasses.replace(op, call=lambda *args, **options: checked.append(True) or op.call(*args, **options))
    expected = outcome(op.cpu if op.has_cpu else op.reference, inputs, mutates=op.mutates)
    assert same(outcome(partial(positional, watched), inputs, mutates=op.mutates), expected)
    assert not checked
    for name in op.differentiable:
        if inputs[name] is not None:
            out = positional(watched, **{**inputs, name: inputs[name].clone().requires_grad_()})
            assert any(one.requires_grad for one in (out if isinstance(out, tuple) else (out,)))
    assert len(checked) == sum(inputs[name] is not None for name in op.differentiable)
    if not op.differentiable and takes_floats(inputs):
        first = next(name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.is_floating_point())
        with pytest.raises(KernelError, match="requires a gradient"):
            positional(op, **{**inputs, first: inputs[first].clone().requires_grad_()})
    monkeypatch.setenv(CHOICE, "fast")
    with pytest.raises(KernelError, match=f"{CHOICE}=fast"):
        positional(op, **inputs)


def positional(op: Operation, **inputs: Any) -> Any:
    """`op.run` as modules call it: the arguments that have a place by position, the others by name."""
    kinds = inspect.signature(OPERATIONS[op.name].call).parameters
    options = {name: value for name, value in inputs.items() if kinds[name].kind is inspect.Parameter.KEYWORD_ONLY}
    return op.run(*(value for name, value in inputs.items() if name not in options), **options)


def same(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether two outcomes are equal bit by bit."""
    return results.keys() == expected.keys() and all(torch.equal(bit_view(results[name]), bit_view(expected[name])) for name in expected)


def bit_view(tensor: torch.Tensor) -> torch.Tensor:
    """The bits, in which NaN equals NaN."""
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("op", ALL)
def test_argument_checks_read_no_values(op: Operation, monkeypatch: pytest.MonkeyPatch):
    # A check that reads a value, for which it would wait for a GPU, raises on meta tensors.
    file = importlib.import_module(f"granite_kernels.{op.name}")

    class ReachedError(Exception):
        pass

    def reference(*args: Any, **kwargs: Any):
        raise ReachedError

    monkeypatch.setattr(file, "OPERATION", dataclasses.replace(op, reference=reference))
    inputs = next(case for case in op.cases if not case.released).inputs(torch.float32)
    with pytest.raises(ReachedError):
        op.call(**{name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()})


def wrong_arguments():
    for op in OPERATIONS.values():
        inputs = next(case for case in op.cases if not case.released).inputs(torch.float32)
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor):
                continue
            index = not value.is_floating_point()
            others = {
                "not a tensor": [1, 2],
                "rank": value[None],
                "dtype": value.to(torch.int16) if index else value.to(torch.complex64),
                "device": value.to("meta"),
            }
            if not index and name not in op.wide:
                others["other float"] = value.half()
            if value.ndim > 1:
                others["last stride"] = value.transpose(-1, -2).contiguous().transpose(-1, -2)
            for kind, other in others.items():
                # The first tensor may have any dtype and device: the others are compared with it.
                if name == next(iter(inputs)) and kind in ("device", "other float"):
                    continue
                yield pytest.param(op, {**inputs, name: other}, name, id=f"{op.name}: {kind} of {name}")


@pytest.mark.parametrize(("op", "inputs", "name"), list(wrong_arguments()))
def test_the_error_names_the_wrong_argument(op: Operation, inputs: dict, name: str):
    with pytest.raises(KernelError, match=rf"^{op.name}: {name} .*; expected .+\. .+\.$"):
        op.call(**inputs)


def test_an_error_has_three_parts_and_can_be_pickled():
    raised = KernelError(got="a", expected="b", remedy="c")
    assert str(raised) == "a; expected b. c."
    again = pickle.loads(pickle.dumps(raised))
    assert (str(again), again.got, again.expected, again.remedy) == (str(raised), "a", "b", "c")
    assert isinstance(raised, ValueError)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_assert_accurate_allows_rounding_errors_only(dtype: torch.dtype):
    truth = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).double()
    eager = truth.to(dtype)
    assert_accurate(eager, eager, truth)
    wrong_everywhere = (truth * (1 + 8 * torch.finfo(dtype).eps + 1e-4 * (dtype != torch.float64))).to(dtype)
    one_wrong, one_missing = eager.clone(), eager.clone()
    one_wrong[3, 4] += 0.2
    one_missing[3, 4] = torch.nan
    shifted = eager.roll(1, 0)
    wrong = [one_wrong, one_missing, shifted, torch.zeros_like(eager)]
    for actual in wrong if dtype == torch.float64 else [*wrong, wrong_everywhere]:
        with pytest.raises(AssertionError, match="RMS error"):
            assert_accurate(actual, eager, truth)
    with pytest.raises(AssertionError, match="eager PyTorch gives"):
        assert_accurate(eager.to(torch.complex64), eager, truth)
    with pytest.raises(ValueError, match="the truth"):
        error(eager[1:], truth)


def test_strided_views_and_new_memory_are_poisoned():
    values = torch.arange(12.0).reshape(3, 4)
    view = strided(values)
    assert torch.equal(view, values)
    assert view.stride(-1) == 1
    assert view.stride(0) != 4
    assert view._base.isnan().sum() == view._base.numel() - 12
    assert int(strided(torch.tensor([1, 2], dtype=torch.int32))._base.min()) == -(2**31)
    with poisoned_allocations():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_outcome_uses_the_same_incoming_gradient_for_every_dtype():
    given = {"x": torch.ones(5, 3, dtype=torch.bfloat16)}
    narrow = outcome(lambda x: x * 1, given, ("x",))["grad x"]
    truth = outcome(lambda x: x * 1, in_float64(given), ("x",), rounding=torch.bfloat16)["grad x"]
    assert truth.dtype == torch.float64
    assert torch.equal(narrow.double(), truth)
    assert torch.equal(
        outcome(partial(lambda x, y: y * 1, y=torch.ones(5, 3, requires_grad=True)), given, ("x",))["grad x"], given["x"] * 0
    )


def test_references_work_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; sys.path.insert(0, 'kernels')\n"
        "import granite_kernels, torch\n"
        "for op in granite_kernels.OPERATIONS.values():\n"
        "    op.call(**next(case for case in op.cases if not case.released).inputs(torch.float32))\n"
        "assert not {'transformers', 'granite_speech'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_the_library_call_for_benchmarks_runs(op: Operation, case: Case):
    inputs = case.inputs(torch.float32)
    if op.cost(**inputs).flops:
        assert op.library(**inputs)().numel()
