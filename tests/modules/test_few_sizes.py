"""Products on a CPU in 16 bits: any number of rows gives the usual result, from a few numbers of rows."""

import pytest
import torch
import torch.nn.functional as F

from granite_speech.modules import few_sizes
from tests.support.small_models import small_model


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The numbers of rows that PyTorch multiplies."""
    found, own = set(), F.linear
    monkeypatch.setattr(F, "linear", lambda x, *arguments: found.add(x.numel() // x.shape[-1]) or own(x, *arguments))
    return found


@torch.no_grad()
def test_rows_are_rounded_up_and_results_are_not_changed(seen: set[int]):
    weight, bias = torch.randn(6, 8).bfloat16(), torch.randn(6).bfloat16()
    for rows in range(400):
        x = torch.randn(rows, 8).bfloat16()
        torch.testing.assert_close(few_sizes.linear(x, weight, bias), x @ weight.T + bias, rtol=2e-2, atol=2e-2)
    assert len(seen) <= 60
    assert all(rows <= size <= rows * 9 // 8 + 8 for rows in range(1, 400) for size in [min(one for one in seen if one >= rows)])
    assert few_sizes.linear(torch.ones(5, 7, 8).bfloat16(), weight).shape == (5, 7, 6)


def test_float32_and_gradients_are_left_alone():
    for x in (torch.randn(99, 8), torch.randn(99, 8).double(), torch.randn(99, 8).bfloat16().requires_grad_()):
        assert few_sizes.with_few_sizes(x) is x


@torch.no_grad()
def test_an_encoder_of_clips_of_many_lengths_multiplies_few_numbers_of_rows(seen: set[int]):
    model = small_model().bfloat16()
    for frames in range(64, 128):
        states = model.encoder(torch.randn(1, frames, model.config.encoder_config.input_dim).bfloat16(), [frames]).last_hidden_state
        assert states.shape[1] == frames
    assert len(seen) <= 9
