"""The residual sum and its norm compared with the formula, and with the modules' calls."""

import pytest
import torch
from granite_kernels import KernelError, add_rms_norm
from granite_kernels.add_rms_norm import add_rms_norm_cost

from granite_speech.modules.language_model import GraniteRMSNorm

OPTIONS = {"eps": 1e-5, "multiplier": 0.22}


def draw(rows: int = 7, width: int = 20, parts: int | None = None, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    delta = torch.randn(parts or 1, rows, width, generator=rng)
    return {
        "x": torch.randn(rows, width, generator=rng).to(dtype),
        "delta": delta[0].to(dtype) if parts is None else delta.to(torch.promote_types(dtype, torch.float32)),
        "weight": torch.randn(width, generator=rng).to(dtype),
    }


@pytest.mark.parametrize("parts", [None, 1, 3])
def test_the_results_match_the_formula(parts: int | None):
    given = draw(parts=parts)
    total, normed = add_rms_norm(**given, **OPTIONS)
    for row in range(7):
        delta = given["delta"][row] if parts is None else sum(given["delta"][part, row] for part in range(parts))
        expected = [float(x) + 0.22 * float(d) for x, d in zip(given["x"][row], delta, strict=True)]
        size = (sum(one * one for one in expected) / 20 + 1e-5) ** 0.5
        torch.testing.assert_close(total[row], torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(normed[row], given["weight"] * torch.tensor(expected) / size, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [None, 4])
def test_the_bits_are_those_of_the_modules(parts: int | None, dtype: torch.dtype):
    given = draw(parts=parts, dtype=dtype)
    norm = GraniteRMSNorm(20, 1e-5)
    norm.weight = torch.nn.Parameter(given["weight"])
    delta = given["delta"] if parts is None else given["delta"].sum(0).to(dtype)
    total, normed = add_rms_norm(**given, **OPTIONS)
    assert torch.equal(total, torch.add(given["x"], delta, alpha=0.22))
    assert torch.equal(normed, norm(total))


def test_no_parts_are_refused():
    given = draw(parts=2)
    with pytest.raises(KernelError, match=r"add_rms_norm: delta has no parts; expected at least 1\."):
        add_rms_norm(**given | {"delta": given["delta"][:0]}, **OPTIONS)


def test_parts_must_be_in_float32():
    given = draw(parts=2, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match=r"add_rms_norm: delta has dtype torch\.bfloat16; expected torch\.float32"):
        add_rms_norm(**given | {"delta": given["delta"].bfloat16()}, **OPTIONS)


def test_the_cost_moves_every_tensor_once():
    assert add_rms_norm_cost(**draw(parts=4, dtype=torch.bfloat16), **OPTIONS).bytes == 7 * 20 * (3 * 2 + 4 * 4) + 20 * 2
