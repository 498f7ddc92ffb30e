"""Launches happen or are recorded depending on a call's tensors, and each kernel is compiled once for all batches."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from granite_kernels import OPERATIONS
from granite_kernels.launch import Launch, Tile, precompile, recorded_launches, register
from granite_kernels.op import Operation
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.bench.test_audit import compiled

EACH = [pytest.param(op, id=op.name) for op in OPERATIONS.values()]
tracing, traced = threading.Event(), threading.Event()


def _pause_while_traced(x: torch.Tensor) -> torch.Tensor:
    tracing.set()
    traced.wait(60)
    return torch.empty_like(x)


pause = register(_pause_while_traced)


def smallest_call(op: Operation) -> tuple[dict, torch.Tensor]:
    """Inputs of the smallest case, and the reference's result for them."""
    case = min((case for case in op.cases if not case.released), key=lambda case: op.cost(**case.inputs(torch.float32)).flops or 1e18)
    inputs = case.inputs(torch.float32)
    return inputs, op.reference(**unchanged(op, inputs))


def unchanged(op: Operation, inputs: dict) -> dict:
    """The inputs, with copies of those that a call writes to."""
    return {**inputs, **{name: inputs[name].clone() for name in op.mutates}}


@pytest.mark.parametrize("op", EACH)
def test_a_call_launches_while_another_thread_traces(op: Operation):
    inputs, expected = smallest_call(op)
    tracing.clear(), traced.clear()
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        other = pool.submit(pause, torch.empty(3, device="meta"))
        try:
            assert tracing.wait(60)
            torch.testing.assert_close(op.call(**unchanged(op, inputs), impl="triton"), expected, rtol=1e-4, atol=1e-4)
        finally:
            traced.set()
        other.result()


@pytest.mark.parametrize("op", EACH)
def test_a_call_launches_while_launches_are_recorded(op: Operation):
    """In another thread and in the recording thread: only calls on tensors without memory are recorded."""
    inputs, expected = smallest_call(op)

    @torch.no_grad()
    def call() -> torch.Tensor:
        return op.call(**unchanged(op, inputs), impl="triton")

    with recorded_launches(90) as launches, ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(pool.submit(call).result(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)
        assert launches == []
        # A released shape, since some operations leave smaller ones to the library.
        released = next(case for case in op.cases if case.released).inputs(torch.bfloat16, "meta")
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = {name: mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for name, one in released.items()}
            op.call(**fakes, impl="triton")
        assert launches


def test_a_kernel_that_cannot_be_parsed_now_is_left_to_its_first_launch():
    """CPython may fail so while another thread parses. Other errors are raised."""
    compiled = []

    class Kernel:
        def warmup(self, *, error: type[Exception] | None, **_: object) -> None:
            if error is not None:
                raise error("AST constructor recursion depth mismatch")
            compiled.append(self)

    kernel, tile = Kernel(), Tile({}, 4)
    launches = [Launch(kernel, (1,), tile, {"error": error}, False) for error in (SystemError, None)]
    precompile(launches, torch.device("cpu"))
    assert compiled == [kernel]
    with pytest.raises(ValueError, match="recursion"):
        precompile([Launch(kernel, (1,), tile, {"error": ValueError}, False)], torch.device("cpu"))


@pytest.fixture(scope="module")
def compilations() -> dict[str, dict[str, int]]:
    """Of each operation, how often each kernel is compiled. One process counts for all, since it takes seconds to start."""
    done = compiled("-m", "tests.support.compilations", *OPERATIONS)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", EACH)
def test_no_kernel_is_compiled_again_for_another_batch(op: Operation, compilations: dict):
    counts = compilations[op.name]
    assert counts and set(counts.values()) == {1}, counts
