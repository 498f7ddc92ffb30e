"""The kernel of rotary_write: tile edges, heads per program, and rows that must not see each other."""

import pytest
import torch
from granite_kernels import KernelError, rotary_write, rotary_write_triton
from granite_kernels.rotary_write import OPERATION
from granite_kernels.testing import assert_operation_accurate, outcome_of

from tests.kernels.test_operations import same
from tests.kernels.test_rotary_write import draw


def results(given, **changed):
    return outcome_of(OPERATION, lambda **inputs: rotary_write(**inputs, impl="triton"), {**given, **changed})


@pytest.mark.parametrize("heads", [(6, 2), (6, 6)])
def test_the_number_of_heads_per_program_changes_no_bits(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    given = draw(5, heads, dtype=torch.bfloat16, ranks=(3, 2, 0), adapters=(0, -1))
    expected = results(given)
    for fill in (1, 5):  # up to 8 heads, and 2 or 3
        monkeypatch.setattr(rotary_write_triton, "_FILL", {80: fill})
        assert same(results(given), expected)


@pytest.mark.parametrize("tokens", [15, 16, 17])
def test_tile_edges(tokens: int):
    assert_operation_accurate(OPERATION, draw(tokens, (2, 1), dtype=torch.float32, ranks=(2, 0, 2)), impl="triton")


def test_a_token_gets_the_same_bits_alone():
    given = draw(18, dtype=torch.bfloat16, ranks=(3, 0, 2), adapters=(0, -1))
    expected = results(given)
    for token in (0, 1, 17):
        alone = {name: given[name][token : token + 1] for name in ("qkv", "cos", "sin", "slots", "low", "adapter_index")}
        out = results(given, **alone)
        assert torch.equal(out["out"][0], expected["out"][token])
        place = divmod(int(given["slots"][token]), 4)
        assert all(torch.equal(out[f"after {name}"][place], expected[f"after {name}"][place]) for name in ("k_cache", "v_cache"))


def test_rows_without_the_adapter_have_the_bits_of_a_call_without_one():
    given = draw(6, dtype=torch.float32, ranks=(3, 3, 3), adapters=(0, -1, -1))
    for name in ("lora_q", "lora_k", "lora_v"):
        given[name][:] = torch.nan
    plain = results(given, low=None, lora_q=None, lora_k=None, lora_v=None)
    out = results(given)
    without = given["adapter_index"] < 0
    assert torch.equal(out["out"][without], plain["out"][without])
    for name in ("after k_cache", "after v_cache"):
        rows = (one[name].flatten(0, 1)[given["slots"][without]] for one in (out, plain))
        assert torch.equal(*rows)


def test_ranks_of_several_tiles():
    assert_operation_accurate(OPERATION, draw(3, (2, 1), 4, dtype=torch.float32, ranks=(70, 33, 32)), impl="triton")


def test_a_head_dim_above_128_is_refused():
    with pytest.raises(KernelError, match=r"^rotary_write: head_dim 130; expected at most 128\. Use impl='torch'"):
        rotary_write(**draw(1, (1, 1), 130, dtype=torch.float32), impl="triton")
