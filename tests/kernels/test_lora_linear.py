"""The linear layer with adapters compared with loops over single rows."""

import pytest
import torch
import torch.nn.functional as F
from granite_kernels import KernelError, lora_linear
from granite_kernels.lora_linear import lora_linear_cost


def draw(rows: int, inputs: int = 6, outputs: int = 5, rank: int = 3, adapters: int = 2, dtype=torch.float64, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (adapters, rank, inputs), (adapters, outputs, rank), (adapters,))
    tensors = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
    tensors[-1] = tensors[-1].to(torch.promote_types(dtype, torch.float32))
    return dict(zip(("x", "weight", "bias", "lora_a", "lora_b", "scaling"), tensors, strict=True))


def indices(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("choice", [None, (1, -1, 0, 0, 1, -1, -1), (-1,) * 7, (1,) * 7], ids=str)
def test_the_result_matches_the_formula(choice: tuple[int, ...] | None, bias: bool):
    given = draw(7)
    if not bias:
        given["bias"] = None
    out = lora_linear(**given, adapter_index=None if choice is None else indices(*choice))
    for row, adapter in enumerate(choice or (0,) * 7):
        for column in range(5):
            expected = sum(given["x"][row, i] * given["weight"][column, i] for i in range(6))
            expected = expected + given["bias"][column] if bias else expected
            if adapter >= 0:
                down = [sum(given["x"][row, i] * given["lora_a"][adapter, r, i] for i in range(6)) for r in range(3)]
                expected = expected + given["scaling"][adapter] * sum(given["lora_b"][adapter, column, r] * down[r] for r in range(3))
            torch.testing.assert_close(out[row, column], expected, rtol=1e-12, atol=1e-12)


def test_one_adapter_gives_the_same_as_its_merged_weight():
    given = draw(9, 16, 24, 4)
    merged = given["weight"] + given["scaling"][0] * given["lora_b"][0] @ given["lora_a"][0]
    expected = F.linear(given["x"], merged, given["bias"])
    torch.testing.assert_close(lora_linear(**given, adapter_index=None), expected, rtol=1e-12, atol=1e-12)


def test_rows_without_an_adapter_get_the_bits_of_the_plain_layer():
    given = draw(8, 32, 24, 4, dtype=torch.bfloat16)
    out = lora_linear(**given, adapter_index=indices(-1, 0, -1, 1, -1, 0, -1, 1))
    assert torch.equal(out[::2], F.linear(given["x"], given["weight"], given["bias"])[::2])
    assert not torch.equal(out[1::2], F.linear(given["x"], given["weight"], given["bias"])[1::2])


def test_nan_in_an_adapter_reaches_only_rows_that_use_it():
    given = draw(4, adapters=3)
    expected = lora_linear(**given, adapter_index=indices(1, -1, 1, -1))
    for unused in (0, 2):
        given["lora_a"][unused], given["lora_b"][unused], given["scaling"][unused] = torch.nan, torch.inf, torch.nan
    assert torch.equal(lora_linear(**given, adapter_index=indices(1, -1, 1, -1)), expected)


def test_the_low_rank_product_is_rounded_to_the_dtype_of_x():
    # 1 + 2⁻⁹ is not a bfloat16 number. Rounded between the products, it is 1.
    given = {
        "x": torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16),
        "weight": torch.zeros(1, 2, dtype=torch.bfloat16),
        "bias": None,
        "lora_a": torch.ones(1, 1, 2, dtype=torch.bfloat16),
        "lora_b": torch.ones(1, 1, 1, dtype=torch.bfloat16),
        "scaling": torch.tensor([1.0]),
    }
    given["weight"][0, 0] = -1
    assert lora_linear(**given, adapter_index=None).item() == 0


def test_gradients_match_finite_differences():
    given = draw(5, 4, 3, 2)
    names = [name for name in given if name != "scaling"]
    leaves = [given[name].requires_grad_() for name in names]

    def call(*values):
        return lora_linear(**dict(zip(names, values, strict=True)), scaling=given["scaling"], adapter_index=indices(1, -1, 0, 1, -1))

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 7)}, r"weight has shape \(5, 7\); expected \(out, in\) with in = 6 as in x"),
        ({"bias": torch.zeros(6)}, r"bias has shape \(6,\); expected \(out\) with out = 5 as in weight"),
        ({"lora_a": torch.zeros(2, 3, 5)}, r"lora_a has shape .* with in = 6 as in x"),
        ({"lora_b": torch.zeros(2, 5, 4)}, r"lora_b has shape .* with rank = 3 as in lora_a"),
        ({"lora_b": torch.zeros(1, 5, 3)}, r"lora_b has shape .* with adapters = 2 as in lora_a"),
        ({"lora_a": torch.zeros(2, 3, 6).bfloat16()}, r"lora_a has dtype torch.bfloat16; expected torch.float32, the dtype of x"),
        ({"scaling": torch.zeros(3)}, r"scaling has shape \(3,\); expected .* with adapters = 2 as in lora_a"),
        ({"scaling": torch.zeros(2).bfloat16()}, r"scaling has dtype torch.bfloat16; expected torch.float32"),
        ({"adapter_index": indices(0, 0)}, r"adapter_index has shape \(2,\); expected .* with rows = 4 as in x"),
        ({"adapter_index": torch.zeros(4, dtype=torch.int64)}, r"adapter_index has dtype torch.int64; expected torch.int32"),
        (
            {"lora_a": torch.zeros(0, 3, 6), "lora_b": torch.zeros(0, 5, 3), "scaling": torch.zeros(0)},
            r"adapter_index is None and there are no adapters",
        ),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str):
    right = {**draw(4, dtype=torch.float32), "adapter_index": None}
    lora_linear(**right)
    with pytest.raises(KernelError, match=message):
        lora_linear(**{**right, **change})


def test_cost_counts_only_the_adapters_in_use():
    given = draw(4, dtype=torch.bfloat16)
    base = 2 * 4 * 6 * 5
    fixed = 2 * (4 * 6 + 5 * 6 + 5 + 4 * 5) + 2 * 4
    none = lora_linear_cost(**given, adapter_index=indices(-1, -1, -1, -1))
    assert (none.flops, none.bytes) == (base, fixed + 16)
    three = lora_linear_cost(**given, adapter_index=indices(1, -1, 1, 1))
    assert (three.flops, three.bytes) == (base + 3 * 2 * 3 * 11, fixed + 16 + 2 * 3 * 11)
    everywhere = lora_linear_cost(**given, adapter_index=None)
    assert (everywhere.flops, everywhere.bytes) == (base + 4 * 2 * 3 * 11, fixed + 2 * 3 * 11)
