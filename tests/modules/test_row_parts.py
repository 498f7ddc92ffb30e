"""Feed-forwards on a CPU compute many rows in parts; the result is that of all rows at once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from granite_speech.modules import row_parts
from granite_speech.modules.adapter import attach_adapter
from granite_speech.modules.adapter_config import AdapterConfig
from tests.support.small_models import small_model


@pytest.fixture
def ten_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of at most ten rows of 64 or 128 values in float32."""
    monkeypatch.setattr(row_parts, "_CPU_BYTES", 10 * 128 * 4)


def rows_of(module: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, list[int]]:
    """The result of a call, and the rows that the module saw, one number for each call of it."""
    seen: list[int] = []
    with_hook = module.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    try:
        return call(), seen
    finally:
        with_hook.remove()


@torch.no_grad()
def test_the_encoders_feed_forward(ten_rows: None):
    feed_forward, x = small_model().encoder.layers[0].ff1, torch.randn(23, 32)
    expected = feed_forward(x[None])[0]  # padded, as modules with hooks run
    found, rows = rows_of(feed_forward.down_proj, lambda: feed_forward(x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert rows == [8, 8, 7]
    assert feed_forward(x[:0]).shape == (0, 32)


@torch.no_grad()
def test_the_language_models_mlp_and_the_rows_of_its_adapter(ten_rows: None):
    model = small_model()
    mlp, x = model.decoder.layers[1].mlp, torch.randn(41, 32)
    attach_adapter(model, AdapterConfig.plain(4, 8, ["up_proj"]), ["language_model.model.layers.1.mlp.up_proj"])
    for matrix in (mlp.up_proj.lora_A, mlp.up_proj.lora_B):
        nn.init.normal_(matrix.weight)
    index = torch.arange(41, dtype=torch.int32) % 2 - 1
    expected = mlp(x[None])[0]
    found, rows = rows_of(mlp.act_fn, lambda: mlp(x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert rows == [14, 14, 13]
    both = mlp(x, adapter_index=index)
    for first, adapter in enumerate((-1, 0)):
        some = x[first::2]
        alone = mlp(some, adapter_index=torch.full((len(some),), adapter, dtype=torch.int32))
        torch.testing.assert_close(both[first::2], alone, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(both[0], found[0], atol=1e-2)
    assert mlp(x[:0]).shape == (0, 32)


def test_gradients_need_all_rows_at_once(ten_rows: None):
    feed_forward, x = small_model().encoder.layers[0].ff1, torch.randn(23, 32)
    _, rows = rows_of(feed_forward.down_proj, lambda: feed_forward(x))
    assert rows == [23]
