"""The kernels of lora_linear: every range of rows, tile edges, and adapters that must not reach other rows."""

import importlib

import pytest
import torch
from granite_kernels import OPERATIONS, KernelError, lora_linear
from granite_kernels.launch import recorded_launches
from granite_kernels.lora_linear_triton import FEW_ROWS, MAX_RANK, MAX_SLICES, SPLIT_ROWS
from granite_kernels.op import Case
from granite_kernels.testing import assert_operation_accurate, outcome, poisoned_allocations
from torch._dynamo.testing import CompileCounter

OP = OPERATIONS["lora_linear"]
FILE = importlib.import_module("granite_kernels.lora_linear_triton")
DIFFERENTIABLE = OP.differentiable


@pytest.fixture(params=["few rows", "more rows", "many rows"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Uses the kernels and tiles for that many rows on any number: the interpreter would take minutes for hundreds of rows."""
    monkeypatch.setattr(FILE, "FEW_ROWS", FEW_ROWS if request.param == "few rows" else 0)
    monkeypatch.setattr(FILE, "SPLIT_ROWS", 0 if request.param == "many rows" else SPLIT_ROWS)


in_every_regime = pytest.mark.usefixtures("regime")


def draw(rows: int, inputs: int, outputs: int, rank: int, choice: tuple[int, ...] | None = (0, -1), dtype=torch.float32, **options):
    shape = {"choice": choice, "rows": rows, "inputs": inputs, "outputs": outputs, "rank": rank, **options}
    return Case("", OP.cases[0].make, shape).inputs(dtype)


def triton(**inputs):
    return lora_linear(**inputs, impl="triton")


def check(inputs: dict) -> None:
    with poisoned_allocations():
        assert_operation_accurate(OP, inputs, impl="triton")


def names_of_launches(inputs: dict) -> list[str]:
    with recorded_launches(90) as launches, torch.no_grad():
        triton(**{name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()})
    return [launch.kernel.__name__.removeprefix("_lora_linear_").removesuffix("_kernel") for launch in launches]


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 127, 128, 129, SPLIT_ROWS, SPLIT_ROWS + 1])
def test_numbers_of_rows_around_every_limit(rows: int):
    inputs = draw(rows, 40, 24, 4, (0, -1, 1), adapters=2, bias=True)
    assert names_of_launches(inputs) == (["split", "combine"] if rows <= SPLIT_ROWS else ["thin", "tiled"])
    check(inputs)


@in_every_regime
@pytest.mark.parametrize("outputs", [1, 63, 65, 129])
def test_columns_around_a_tile_edge(outputs: int):
    check(draw(6, 24, outputs, 3))


@in_every_regime
@pytest.mark.parametrize("inputs", [1, 31, 33, 129])
def test_inner_dimensions_around_a_tile_edge(inputs: int):
    check(draw(6, inputs, 20, 3))


@in_every_regime
@pytest.mark.parametrize("rank", [15, 63, 64, 65, 127, MAX_RANK])
def test_ranks_around_a_tile_edge(rank: int):
    check(draw(6, 24, 20, rank, (1, -1, 0), adapters=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "inputs"), [(2, 64 * 7 + 5), (20, 32 * 9 - 3), (2, 128 * MAX_SLICES * 2 + 1)])
def test_slices_that_do_not_divide_the_inner_dimension(rows: int, inputs: int, dtype: torch.dtype):
    check(draw(rows, inputs, 20, 8, (0,), dtype=dtype))


def test_slices_depend_only_on_the_layer_and_the_range_of_rows():
    def slices(rows: int) -> int:
        inputs = draw(rows, 2048, 512, 64, None)
        with recorded_launches(90) as launches, torch.no_grad():
            triton(**{name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()})
        return launches[0].grid[1]

    assert slices(1) == slices(7) == slices(FEW_ROWS)
    assert slices(FEW_ROWS + 1) == slices(SPLIT_ROWS)


@in_every_regime
def test_nan_in_an_adapter_reaches_only_rows_that_use_it():
    # Only one row uses adapter 1, in the same tile as the others. No row uses adapter 2.
    choice = (0, -1, 3, -1, 0)
    inputs = draw(6, 24, 20, 5, choice, adapters=4)
    expected = outcome(triton, inputs, ("x",))
    inputs["adapter_index"][4] = 1
    for poisoned in (1, 2):
        inputs["lora_a"][poisoned], inputs["lora_b"][poisoned], inputs["scaling"][poisoned] = torch.nan, torch.inf, torch.nan
    others = torch.arange(6) != 4
    actual = outcome(triton, inputs, DIFFERENTIABLE)
    for name in expected:
        assert torch.equal(actual[name][others], expected[name][others]), name
        assert not actual[name][4].isfinite().any(), name
    for name in ("grad lora_a", "grad lora_b"):
        assert actual[name][0].isfinite().all(), name
        assert actual[name][3].isfinite().all(), name


@in_every_regime
def test_an_index_out_of_range_means_no_adapter():
    inputs = draw(6, 24, 20, 5, (-1, 0), adapters=2)
    expected = outcome(triton, inputs, DIFFERENTIABLE)
    inputs["adapter_index"][::4] = 2
    inputs["adapter_index"][2::4] = -7
    actual = outcome(triton, inputs, DIFFERENTIABLE)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@in_every_regime
def test_without_an_index_every_row_uses_adapter_0():
    inputs = draw(6, 24, 20, 5, None, adapters=3)
    actual = outcome(triton, inputs, DIFFERENTIABLE)
    expected = outcome(triton, {**inputs, "adapter_index": torch.zeros(6, dtype=torch.int32)}, DIFFERENTIABLE)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@in_every_regime
def test_the_low_rank_product_is_rounded_to_the_dtype_of_x():
    # 1 + 2⁻⁹ is not a bfloat16 number. Rounded between the products, it is 1.
    inputs = draw(6, 16, 16, 1, None, dtype=torch.bfloat16)
    for name in ("x", "weight", "lora_a", "lora_b"):
        inputs[name].zero_()
    inputs["x"][:, :2] = torch.tensor([1.0, 2.0**-9])
    inputs["weight"][:, 0] = -1
    inputs["lora_a"][..., :2] = inputs["lora_b"][:] = inputs["scaling"][:] = 1
    assert not triton(**inputs).any()


@pytest.mark.parametrize("wanted", [("x",), ("lora_a",), ("lora_b",), ("weight", "bias"), ("lora_a", "lora_b")], ids=str)
def test_a_gradient_is_the_same_alone_and_with_the_others(wanted: tuple[str, ...]):
    inputs = draw(6, 24, 20, 5, (0, -1, 1), adapters=2, bias=True)
    together, alone = outcome(triton, inputs, DIFFERENTIABLE), outcome(triton, inputs, wanted)
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_a_frozen_layer_saves_no_activation_and_gets_no_weight_gradient():
    inputs = draw(6, 24, 20, 5)
    out = triton(**{**inputs, "x": inputs["x"].requires_grad_()})
    assert all(saved is None or saved.shape != inputs["x"].shape for saved in saved_tensors(out))
    inputs["lora_a"].requires_grad_()
    triton(**inputs).sum().backward()
    assert inputs["weight"].grad is None
    assert inputs["lora_a"].grad.isfinite().all()


def saved_tensors(out: torch.Tensor) -> list:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        (out * 1).sum()
    node = out.grad_fn
    return [*kept, *node.saved_tensors]


def test_an_incoming_gradient_may_have_stride_0():
    inputs = draw(6, 24, 20, 5, (0, -1, 1), adapters=2, bias=True)

    def gradients(incoming: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE]
        out = triton(**{**inputs, **dict(zip(DIFFERENTIABLE, leaves, strict=True))})
        return torch.autograd.grad(out, leaves, incoming)

    one = torch.ones(())
    for broadcast, plain in zip(gradients(one.expand(6, 20)), gradients(torch.ones(6, 20)), strict=True):
        assert torch.equal(broadcast, plain)


@in_every_regime
def test_repeated_calls_give_the_same_bits():
    inputs = draw(20, 130, 70, 8, (0, 1, -1), adapters=2, bias=True)
    once, again = outcome(triton, inputs, DIFFERENTIABLE), outcome(triton, inputs, DIFFERENTIABLE)
    assert all(torch.equal(once[name], again[name]) for name in once)


@in_every_regime
def test_rows_without_an_adapter_match_the_plain_layer_and_read_no_adapter():
    inputs = draw(6, 24, 20, 5, (-1,), adapters=2, bias=True)
    without = triton(**{**inputs, "lora_a": inputs["lora_a"][:0], "lora_b": inputs["lora_b"][:0], "scaling": inputs["scaling"][:0]})
    for name in ("lora_a", "lora_b", "scaling"):
        inputs[name].fill_(torch.nan)
    results = outcome(triton, inputs, DIFFERENTIABLE)
    assert torch.equal(results["out"], without)
    assert results["grad x"].isfinite().all()
    torch.testing.assert_close(without, torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapters", [0, 2])
def test_the_thin_product_of_a_row_without_an_adapter_is_zero(adapters: int):
    inputs = draw(6, 24, 20, 5, (-1, 2, 0), adapters=adapters)
    with poisoned_allocations():
        low = FILE._lora_linear_thin(inputs["x"], inputs["lora_a"], inputs["adapter_index"], False)
    assert not low[0::3].any()
    assert not low[1::3].any()
    assert bool(low[2::3].all()) == (adapters > 0)


def test_one_compiled_graph_serves_few_and_many_rows():
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(triton, backend=counter, fullgraph=True)
    for rows in (3, SPLIT_ROWS + 3):
        inputs = draw(rows, 24, 20, 5)
        torch._dynamo.mark_dynamic(inputs["x"], 0)
        torch._dynamo.mark_dynamic(inputs["adapter_index"], 0)
        assert torch.equal(compiled(**inputs), triton(**inputs))
    assert counter.frame_count == 1


def test_a_rank_above_128_is_refused():
    inputs = draw(2, 16, 16, MAX_RANK + 1)
    with pytest.raises(
        KernelError, match=r"^lora_linear: lora_a has rank 129; expected at most 128\. Use impl='torch' or GRANITE_SPEECH_KERNELS=torch"
    ):
        triton(**inputs)
    lora_linear(**inputs, impl="torch")
