"""The fused linear layer compared with loops over single numbers, and with the modules that it replaces."""

import math

import pytest
import torch
import torch.nn.functional as F
from granite_kernels import KernelError, fused_linear
from granite_kernels.fused_linear import fused_linear_cost, fused_linear_library

from granite_speech.modules.language_model import GraniteRMSNorm

ROWS, INPUTS, OUTPUTS, RANK = 3, 5, 6, 2
AROUND = ("bias", "norm_weight", "residual")


def draw(*names: str, dtype=torch.float64, rows: int = ROWS, gated: bool = False) -> dict[str, torch.Tensor]:
    """x, weight and the tensors that are named; "int8" is an int8 weight with its scale."""
    rng = torch.Generator().manual_seed(0)
    shapes = {
        "x": (rows, INPUTS),
        "weight": (OUTPUTS, INPUTS),
        "bias": (OUTPUTS,),
        "norm_weight": (INPUTS,),
        "residual": (rows, OUTPUTS // 2 if gated else OUTPUTS),
        "lora_a": (RANK, INPUTS),
        "weight_scale": (OUTPUTS,),
    }
    tensors = {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in shapes.items()}
    integers = torch.randint(-128, 128, (OUTPUTS, INPUTS), generator=rng, dtype=torch.int8)
    given = {name: tensors[name] for name in ("x", "weight", *names) if name != "int8"}
    if "int8" in names:
        given |= {"weight": integers, "weight_scale": tensors["weight_scale"].to(torch.promote_types(dtype, torch.float32))}
    return given


def expected(given: dict[str, torch.Tensor], eps: float, multiplier: float, gated: bool) -> list[list[float]]:
    """The formula in Python's floats."""
    numbers = {name: tensor.tolist() for name, tensor in given.items()}
    result = []
    for row, x in enumerate(numbers["x"]):
        h = x
        if "norm_weight" in numbers:
            size = math.sqrt(sum(one * one for one in x) / len(x) + eps)
            h = [weight * one / size for weight, one in zip(numbers["norm_weight"], x, strict=True)]
        y = []
        for n, weights in enumerate(numbers["weight"]):
            scale = numbers["weight_scale"][n] if "weight_scale" in numbers else 1
            bias = numbers["bias"][n] if "bias" in numbers else 0
            y.append(sum(scale * weight * one for weight, one in zip(weights, h, strict=True)) + bias)
        if gated:
            half = len(y) // 2
            y = [gate / (1 + math.exp(-gate)) * up for gate, up in zip(y[:half], y[half:], strict=True)]
        residual = numbers["residual"][row] if "residual" in numbers else [0] * len(y)
        down = [sum(a * one for a, one in zip(weights, h, strict=True)) for weights in numbers.get("lora_a", [])]
        result.append([start + multiplier * one for start, one in zip(residual, y, strict=True)] + down)
    return result


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("names", [(), *((name,) for name in AROUND), ("int8",), AROUND, (*AROUND, "int8")], ids="+".join)
def test_the_result_matches_the_formula(names: tuple[str, ...], gated: bool):
    given = draw(*names, gated=gated)
    options = {"eps": 0.1, "multiplier": 0.22, "gated": gated}
    out = fused_linear(**given, **options)
    torch.testing.assert_close(out, torch.tensor(expected(given, **options), dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("names", [("lora_a",), ("lora_a", "bias", "norm_weight"), ("lora_a", "int8", "bias")], ids="+".join)
def test_the_columns_of_an_adapter_are_raw(names: tuple[str, ...]):
    given = draw(*names)
    out = fused_linear(**given, eps=0.1, multiplier=0.5)
    assert out.shape == (ROWS, OUTPUTS + RANK)
    wanted = torch.tensor(expected(given, 0.1, 0.5, False), dtype=torch.float64)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_has_the_bits_of_the_modules_that_it_replaces(dtype: torch.dtype):
    given = draw("norm_weight", "residual", dtype=dtype)
    norm = GraniteRMSNorm(INPUTS, 0.1)
    norm.weight = torch.nn.Parameter(given["norm_weight"], requires_grad=False)
    projected = F.linear(norm(given["x"]), given["weight"])
    assert torch.equal(fused_linear(**given, eps=0.1, multiplier=0.22), torch.add(given["residual"], projected, alpha=0.22))
    gate, up = projected.chunk(2, dim=-1)
    del given["residual"]
    assert torch.equal(fused_linear(**given, eps=0.1, gated=True), F.silu(gate) * up)
    assert torch.equal(fused_linear(**given, eps=0.1), projected)


def test_an_int8_weight_gives_the_bits_of_the_same_weight_in_the_dtype_of_x():
    given = draw("int8", "bias", dtype=torch.bfloat16)
    out = fused_linear(**given)
    scale = given.pop("weight_scale")
    given["weight"] = (given["weight"].float() * scale[:, None]).bfloat16()
    assert torch.equal(out, fused_linear(**given))


EVERYTHING = draw("bias", "norm_weight", "residual", dtype=torch.float32)
ODD = {**draw(dtype=torch.float32), "weight": torch.zeros(5, INPUTS)}
WRONG = [
    ({**EVERYTHING, "lora_a": torch.zeros(RANK, INPUTS)}, {}, "lora_a with residual; expected lora_a alone"),
    (draw("lora_a", dtype=torch.float32), {"gated": True}, "lora_a with gated; expected lora_a alone"),
    (ODD, {"gated": True}, "gated with 5 rows of weight; expected an even number"),
    (EVERYTHING, {"gated": True}, r"residual has shape \(3, 6\); expected 3 columns"),
    ({**EVERYTHING, "residual": torch.zeros(ROWS, OUTPUTS + 1)}, {}, r"residual has shape \(3, 7\); expected 6 columns"),
    ({**EVERYTHING, "residual": torch.zeros(ROWS + 1, OUTPUTS)}, {}, "residual has shape .*; expected .* with rows = 3 as in x"),
    ({**draw("int8", dtype=torch.float32), "weight_scale": None}, {}, "an int8 weight without weight_scale; expected"),
    (EVERYTHING | {"weight_scale": torch.zeros(OUTPUTS)}, {}, "weight_scale with a weight in torch.float32; expected an int8 weight"),
    ({**draw("int8", dtype=torch.float32), "weight_scale": torch.zeros(OUTPUTS).half()}, {}, "weight_scale has dtype torch.float16"),
    ({**draw("int8", dtype=torch.float32), "weight_scale": torch.zeros(OUTPUTS - 1)}, {}, "weight_scale has shape .*; expected .* out = 6"),
    ({**EVERYTHING, "lora_a": torch.zeros(RANK, INPUTS + 1)}, {}, "lora_a has shape .*; expected .* with in = 5 as in"),
    (draw("lora_a", dtype=torch.float32) | {"lora_a": torch.zeros(RANK, INPUTS).half()}, {}, "lora_a has dtype torch.float16"),
    (EVERYTHING | {"weight": torch.zeros(OUTPUTS, INPUTS).byte()}, {}, "weight has dtype torch.uint8; expected torch.float32 or"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "options", "message"), WRONG, ids=[message.partition(";")[0] for *_, message in WRONG])
def test_wrong_arguments_raise_one_clear_error(given: dict, options: dict, message: str):
    with pytest.raises(KernelError, match=rf"^fused_linear: {message}"):
        fused_linear(**given, **options)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "norm_weight", "residual"])
def test_a_call_that_needs_a_gradient_is_refused(name: str):
    given = {**EVERYTHING, name: EVERYTHING[name].clone().requires_grad_()}
    with pytest.raises(KernelError, match=f"fused_linear: {name}, a tensor that requires a gradient; expected inference"):
        fused_linear(**given)
    with torch.no_grad():
        assert torch.equal(fused_linear(**given), fused_linear(**EVERYTHING))


def test_cost_and_library_call_match_a_count_by_hand():
    given = draw("int8", "bias", "lora_a", dtype=torch.bfloat16)
    cost = fused_linear_cost(**given)
    assert cost.flops == 2 * ROWS * INPUTS * (OUTPUTS + RANK)
    read = 2 * ROWS * INPUTS + OUTPUTS * INPUTS + 2 * OUTPUTS + 2 * RANK * INPUTS + 4 * OUTPUTS
    assert cost.bytes == read + 2 * ROWS * (OUTPUTS + RANK)
    gated = fused_linear_cost(**draw("residual", dtype=torch.float32, gated=True), gated=True)
    assert gated.bytes == 4 * (ROWS * INPUTS + OUTPUTS * INPUTS + 2 * ROWS * OUTPUTS // 2)
    assert torch.equal(fused_linear_library(**given)(), F.linear(given["x"], given["weight"].bfloat16()))
