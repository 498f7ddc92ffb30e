"""The reference of rotary_write, against complex numbers and against the operations that it replaces."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from granite_kernels import KernelError, lora_linear, rotary_write
from granite_kernels.rotary_write import OPERATION

from granite_speech.modules.rotary import rotary_embedding, rotate

KINDS = ("q", "k", "v")


def draw(tokens=5, heads=(4, 2), head_dim=8, page_size=4, dtype=torch.float64, **options):
    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "page_size": page_size, **options}
    return dataclasses.replace(OPERATION.cases[0], shape=shape).inputs(dtype)


def heads_of(given, token: int) -> dict[str, torch.Tensor]:
    """One token's adapted heads, (heads, head_dim) float64, before rotation."""
    num_kv_heads, head_dim = given["k_cache"].shape[2:]
    sizes = [given["num_heads"] * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    parts, column = dict(zip(KINDS, given["qkv"][token].double().split(sizes), strict=True)), 0
    index = given["adapter_index"]
    for kind in KINDS:
        lora_b = given[f"lora_{kind}"]
        if lora_b is not None:
            low = given["low"][token, column : column + lora_b.shape[1]].double()
            column += lora_b.shape[1]
            if index is None or index[token] >= 0:
                parts[kind] = parts[kind] + given[f"scaling_{kind}"] * (lora_b.double() @ low)
    return {kind: part.unflatten(0, (-1, head_dim)) for kind, part in parts.items()}


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads rotated as complex numbers whose real parts are the first half of the features."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[half:].double(), sin[half:].double())
    return torch.cat((z.real, z.imag), dim=-1)


@pytest.mark.parametrize("adapters", [None, (0, -1, 3)])
@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 0, 0), (2, 0, 5), (3, 1, 4)])
def test_heads_are_adapted_rotated_and_written(ranks, adapters):
    given = draw(7, ranks=ranks, adapters=adapters)
    out = rotary_write(**given)
    for token, slot in enumerate(given["slots"].tolist()):
        parts, angle = heads_of(given, token), (given["cos"][token], given["sin"][token])
        place = slot // 4, slot % 4
        torch.testing.assert_close(out[token], turned(parts["q"], *angle))
        torch.testing.assert_close(given["k_cache"][place], turned(parts["k"], *angle))
        torch.testing.assert_close(given["v_cache"][place], parts["v"])
    written = torch.zeros(given["k_cache"].shape[:2], dtype=torch.bool).flatten().index_fill(0, given["slots"], True).view(-1, 4)
    for name in ("k_cache", "v_cache"):
        assert given[name][~written].isnan().all(), "a slot of no token was written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_are_those_of_the_models_own_functions(dtype: torch.dtype):
    given = draw(6, head_dim=16, dtype=dtype)
    cos, sin = rotary_embedding(torch.linspace(-1, 1, 16), torch.arange(6), dtype)
    q, k, v = given["qkv"].unflatten(1, (-1, 16)).split((4, 2, 2), dim=1)
    out = rotary_write(**{**given, "cos": cos[:, 0], "sin": sin[:, 0]})
    assert torch.equal(out, rotate(q, cos, sin))
    assert torch.equal(given["k_cache"].flatten(0, 1)[given["slots"]], rotate(k, cos, sin))
    assert torch.equal(given["v_cache"].flatten(0, 1)[given["slots"]], v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_adapter_rounds_as_lora_linear(dtype: torch.dtype):
    given = draw(6, ranks=(3, 0, 0), adapters=(0, -1), dtype=dtype)
    x, weight, lora_a = (torch.randn(size).to(dtype) for size in ((6, 12), (32, 12), (1, 3, 12)))
    given["qkv"][:, :32], given["low"] = F.linear(x, weight), F.linear(x, lora_a[0])
    given |= {"cos": torch.ones_like(given["cos"]), "sin": torch.zeros_like(given["sin"])}
    scaling, index = torch.tensor([given["scaling_q"]]), given["adapter_index"]
    expected = lora_linear(x, weight, None, lora_a, given["lora_q"][None], scaling, index, impl="torch")
    torch.testing.assert_close(rotary_write(**given).flatten(1), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_of_several_tokens_with_one_slot_one_is_kept():
    given = draw(4)
    given["slots"][1:] = 2
    rotary_write(**given)
    kept = given["v_cache"][0, 2]
    assert any(torch.equal(kept, heads_of(given, token)["v"]) for token in (1, 2, 3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_heads": 3}, r"num_heads=3 for 2 heads of k_cache; expected a multiple"),
        ({"num_heads": 0}, r"num_heads=0 for 2 heads of k_cache"),
        ({"num_heads": 6}, r"qkv has 64 features; expected \(num_heads \+ 2 \* num_kv_heads\) \* head_dim = 80\. Put"),
        ({"low": None}, r"low has 0 columns; expected 5, the ranks of lora_q, lora_k and lora_v together\. Pass"),
        ({"lora_v": None}, r"low has 5 columns; expected 2"),
        ({"lora_q": torch.zeros(16, 2, dtype=torch.float64)}, r"lora_q has shape \(16, 2\); expected \(32, rank\)"),
        ({"slots": torch.zeros(4, dtype=torch.int64)}, r"slots has shape \(4,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(KernelError, match=f"^rotary_write: {message}"):
        rotary_write(**{**draw(ranks=(2, 0, 3)), **changed})


def test_an_odd_head_and_pages_without_rows_are_refused():
    with pytest.raises(KernelError, match="k_cache has head_dim 7; expected an even number"):
        rotary_write(**{**draw(), **{name: torch.zeros(3, 4, 2, 7, dtype=torch.float64) for name in ("k_cache", "v_cache")}} | angles(7))
    with pytest.raises(KernelError, match="k_cache has page_size 0"):
        rotary_write(**{**draw(), **{name: torch.zeros(3, 0, 2, 8, dtype=torch.float64) for name in ("k_cache", "v_cache")}})


def angles(head_dim: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(5, head_dim, dtype=torch.float64) for name in ("cos", "sin")}


def test_a_gradient_is_refused():
    given = draw(ranks=(2, 0, 0))
    with pytest.raises(KernelError, match=r"lora_q, a tensor that requires a gradient; expected inference"):
        rotary_write(**{**given, "lora_q": given["lora_q"].requires_grad_()})
