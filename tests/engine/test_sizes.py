"""The pages of an engine that is not told how many."""

import pytest

from granite_speech import Engine
from tests.support.small_models import small_model


@pytest.mark.parametrize("context, tokens", [(4096, 8 * 1024), (20_001, 20_016), (1 << 40, 131_072)])
def test_the_default_holds_a_prompt_as_long_as_the_context(context, tokens, monkeypatch):
    model = small_model()
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", context)
    with Engine(model, None, max_rows=8) as engine:
        assert engine.max_pages * engine.page_size == tokens
