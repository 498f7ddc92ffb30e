"""Tests of the compiled kernels in every dtype, including the released shapes. They need a GPU."""

from functools import partial

import pytest
import torch
from granite_kernels import OPERATIONS, exponential_noise
from granite_kernels.op import Case, Operation
from granite_kernels.testing import assert_operation_accurate, assert_same_bits, outcome, outcome_of, poisoned_allocations, strided_inputs
from granite_kernels.tiles import TABLES

from granite_speech.verify import verify
from tests.kernels.test_exponential_noise import EXTREMES, VOCABULARY, assert_exact, index
from tests.kernels.test_operations import bit_view
from tests.support.small_models import LAYER_OPERATIONS, batch, small_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
CASES = [
    pytest.param(op, case, id=f"{'released' if case.released else 'small'}, {op.name}: {case.name}")
    for op in OPERATIONS.values()
    for case in op.cases
]
ALTERNATIVES = {table.operation for table in TABLES if table.alternatives}
PACKED = [pair for pair in CASES if pair.values[0].packed]


@pytest.fixture(autouse=True)
def _compiled():
    import triton

    if triton.knobs.runtime.interpret:
        pytest.fail("TRITON_INTERPRET is set, so the kernels would not run on the GPU. Set TRITON_INTERPRET=0.")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_every_case_is_accurate(op: Operation, case: Case, dtype: torch.dtype):
    with poisoned_allocations():
        assert_operation_accurate(op, case.inputs(dtype, "cuda"), impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), [pair for pair in CASES if pair.values[0].name in ALTERNATIVES and pair.values[1].released])
def test_released_shapes_are_accurate_with_alternative_tiles(op: Operation, case: Case, dtype: torch.dtype):
    inputs = case.inputs(dtype, "cuda")
    for table in TABLES:
        if table.operation == op.name:
            with table.lookups() as keys:
                outcome_of(op, partial(op.call, impl="triton"), inputs)
            for key in keys & table.alternatives.keys():
                for tile in table.alternatives[key]:
                    with table.using({key: tile}), poisoned_allocations():
                        assert_operation_accurate(op, inputs, impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), PACKED)
def test_a_sequence_gets_the_same_bits_in_every_batch(op: Operation, case: Case, dtype: torch.dtype):
    if case.released and len(case.shape.get("clips", case.shape.get("sequences"))) > 8:
        pytest.skip("128 sequences in three batches each take minutes, and show no more than 8")
    assert_same_bits(op, case.inputs(dtype, "cuda"), impl="triton")


@pytest.mark.parametrize(("op", "case"), [pair for pair in CASES if not pair.values[1].released])
def test_strided_views_give_the_same_results(op: Operation, case: Case):
    inputs = case.inputs(torch.float32, "cuda")

    def call(**given):
        return op.call(**given, impl="triton")

    plain, views = outcome_of(op, call, inputs), outcome_of(op, call, strided_inputs(inputs))
    for name in plain:
        torch.testing.assert_close(views[name], plain[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPERATIONS.values()])
def test_a_call_can_be_captured_in_a_cuda_graph(op: Operation):
    """A call that waits for the host cannot be captured."""
    inputs = next(case for case in op.cases if case.released).inputs(torch.bfloat16, "cuda")
    call = partial(op.call, impl="triton")
    with torch.no_grad():
        expected = outcome(call, inputs, mutates=op.mutates)  # of copies, so that what is captured starts from the same values
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(**inputs)
        graph.replay()
    results = dict(enumerate(out)) if isinstance(out, tuple) else {"out": out}
    assert all(torch.equal(one, expected[f"out {name}" if name != "out" else name]) for name, one in results.items())
    assert all(torch.equal(bit_view(inputs[name]), bit_view(expected[f"after {name}"])) for name in op.mutates)


def test_every_element_of_the_noise_is_exact_except_for_rounding():
    """The tolerance of the other tests is that of the largest elements, but a token is drawn by its smallest."""
    seeds, counters = index([*EXTREMES, -1], [*([3] * len(EXTREMES)), 2**31 - 1], "cuda")
    out = exponential_noise(seeds, counters, VOCABULARY, impl="triton")
    assert_exact(out.cpu(), seeds.tolist(), counters.tolist())


def test_more_noise_than_2_31_elements_is_written_where_it_belongs():
    rows = 2**31 // VOCABULARY + 2
    seeds, counters = index(range(rows), [0] * rows, "cuda")
    out = exponential_noise(seeds, counters, VOCABULARY, impl="triton")
    for row in (0, rows - 2, rows - 1):
        assert torch.equal(out[row], exponential_noise(seeds[row : row + 1], counters[row : row + 1], VOCABULARY, impl="triton")[0])


def test_the_whole_model_gives_the_same_as_on_the_cpu():
    model = small_model()
    inputs = batch(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=12, eos_token_id=[])
    model.cuda()
    moved = {name: one.cuda() if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}
    with torch.no_grad():
        logits = model(**moved).logits.cpu()
    real = inputs["attention_mask"].bool()
    assert float((logits - expected)[real].abs().max()) <= 3e-4
    assert torch.equal(model.generate(**moved, max_new_tokens=12, eos_token_id=[]).cpu(), ids)
    assert all(f"{name}=triton" in repr(model) for name in LAYER_OPERATIONS)


def test_the_bundled_checkpoint_is_verified():
    """Compares every stage with transformers. Most of the time is compilation, which runs in parallel."""
    assert all(one.first_miss is None for one in verify("embedded", device="cuda"))
