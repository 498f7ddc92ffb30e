"""Tests of every operation's Triton kernels, in Triton's interpreter on CPU tensors."""

from functools import partial

import pytest
import torch
from granite_kernels import OPERATIONS
from granite_kernels.op import CHOICE, Case, Operation
from granite_kernels.testing import (
    assert_operation_accurate,
    assert_same_bits,
    error,
    outcome,
    outcome_of,
    poisoned_allocations,
    strided_inputs,
)
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.test_operations import bit_view, positional, rows_used, same

SMALL = [pytest.param(op, case, id=f"{op.name}: {case.name}") for op in OPERATIONS.values() for case in op.cases if not case.released]
ALL = [pytest.param(op, id=op.name) for op in OPERATIONS.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_every_case_is_accurate(op: Operation, case: Case, dtype: torch.dtype):
    # torch.empty returns NaN, so an element that no program writes fails.
    with poisoned_allocations():
        assert_operation_accurate(op, case.inputs(dtype), impl="triton")


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_strided_views_give_the_same_bits(op: Operation, case: Case):
    inputs = case.inputs(torch.float32)
    plain = outcome_of(op, call(op), inputs)
    views = outcome_of(op, call(op), strided_inputs(inputs))
    for name in plain:
        if op.name == "silu_linear":  # whose products are the library's, which may add in another order where rows begin elsewhere
            assert error(views[name], plain[name]).max <= 2e-6
        else:
            assert torch.equal(bit_view(views[name]), bit_view(plain[name])), name


@pytest.mark.parametrize(("op", "case"), [pair for pair in SMALL if pair.values[0].packed and pair.values[1].shape.get("padding")])
def test_padding_is_zero_in_results_and_gradients(op: Operation, case: Case):
    inputs = case.inputs(torch.float32)
    results = outcome_of(op, call(op), inputs)
    for name in ("out", *(f"grad {name}" for name in op.packed if name in op.differentiable)):
        used = rows_used(inputs, name)
        assert results[name].shape[0] > used
        assert not results[name][used:].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [pair for pair in ALL if pair.values[0].packed])
def test_a_sequence_gets_the_same_bits_alone_and_in_three_batches(op: Operation, dtype: torch.dtype):
    # Each operation's own tests go further, and the GPU tests check every case.
    several = [case for case in op.cases if not case.released and len(case.shape.get("clips", case.shape.get("sequences"))) >= 3]
    case = min(several, key=lambda case: (op.cost(**case.sizes(dtype)).flops < 1000, op.cost(**case.sizes(dtype)).flops))
    assert_same_bits(op, case.inputs(dtype), impl="triton")


@pytest.mark.parametrize("op", ALL)
def test_repeated_calls_give_the_same_bits(op: Operation):
    inputs = largest(op).inputs(torch.bfloat16)
    once, again = (outcome_of(op, call(op), inputs) for _ in range(2))
    assert same(again, once)


@pytest.mark.parametrize("op", ALL)
def test_every_registered_operation_passes_opcheck(op: Operation):
    case = next(case for case in op.cases if not case.released)
    for function, args, kwargs in registered_calls(op, case):
        torch.library.opcheck(function, args, kwargs)


@pytest.mark.parametrize("op", ALL)
def test_a_call_is_one_node_of_a_compiled_graph(op: Operation):
    inputs = next(case for case in op.cases if not case.released).inputs(torch.float32)
    first = next(iter(inputs))
    backend = EagerAndRecordGraphs()
    torch.compiler.reset()

    def around(**given):
        out = call(op)(**{**given, first: given[first] * 2})
        return tuple(one + 1 for one in out) if isinstance(out, tuple) else out + 1

    compiled = outcome_of(op, torch.compile(around, backend=backend, fullgraph=True), inputs)
    (graph,) = backend.graphs
    ours = [node for node in graph.graph.nodes if str(node.target).startswith("granite_kernels.")]
    assert len(ours) == 1
    expected = outcome_of(op, around, inputs)
    assert compiled.keys() == expected.keys()
    assert all(error(compiled[name], expected[name]).max == 0 for name in expected if name.startswith("out"))


def call(op: Operation):
    def triton(**inputs):
        return op.call(**inputs, impl="triton")

    return triton


def largest(op: Operation) -> Case:
    return max((case for case in op.cases if not case.released), key=lambda case: op.cost(**case.inputs(torch.float32)).flops)


def registered_calls(op: Operation, case: Case) -> list[tuple]:
    """The torch.library calls of one call and its backward. The inputs of the forward require gradients."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "granite_kernels":
                calls.append((function, args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    with Recorder():
        outcome_of(op, call(op), case.inputs(torch.float32))
    assert calls
    forward, *backward = calls
    return [detached(forward, bool(op.differentiable)), *(detached(one, False) for one in backward)]


def detached(recorded: tuple, requires_grad: bool) -> tuple:
    """The recorded call with copies of its arguments that are not part of a graph."""
    function, args, kwargs = recorded
    return function, tuple(detached_copy(one, requires_grad) for one in args), kwargs


def detached_copy(argument, requires_grad: bool):
    if not isinstance(argument, torch.Tensor):
        return argument
    copy = argument.detach().clone()
    return copy.requires_grad_() if requires_grad and copy.is_floating_point() else copy


@pytest.mark.parametrize("op", ALL)
def test_run_calls_the_launcher_unless_something_has_to_see_the_operation(op: Operation, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, "triton")
    inputs = next(case for case in op.cases if not case.released).inputs(torch.float32)
    launched, launcher = [], op.triton.launcher
    monkeypatch.setattr(op.triton, "launcher", lambda *args, **options: launched.append(True) or op.triton(*args, **options))
    expected = outcome(op.call, inputs, mutates=op.mutates)
    assert same(outcome(partial(positional, op), inputs, mutates=op.mutates), expected)
    assert len(launched) == 1
    assert same(outcome(launcher, inputs, mutates=op.mutates), expected)

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    seen = []
    with Watching():
        assert same(outcome(partial(positional, op), inputs, mutates=op.mutates), expected)
    assert f"granite_kernels::{op.name}" in seen
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        out = positional(op, **fake)
        shapes = [one.shape for one in (out if isinstance(out, tuple) else (out,))]
        assert shapes == [one.shape for name, one in expected.items() if name.startswith("out")]
    assert len(launched) == 1
