"""Decode steps of the engine for models of released shapes with random weights: `rehearse` counts them, `steps_gpu` times them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from unittest.mock import patch

import torch

from bench import shapes
from granite_speech.engine.state import DecodeState, Row, StateSize
from granite_speech.engine.step import DecodeStep, Selection
from granite_speech.generation.options import GenerationOptions
from granite_speech.modules.cache import PagePool
from granite_speech.modules.fused_layers import FusedLayers
from granite_speech.modules.quantized import projections
from granite_speech.modules.side_by_side import arrange

__all__ = ["CONTEXT", "INT8", "MODELS", "Answers", "random_model", "unfused"]

MODELS = {"4.1-2b": False, "3.3-2b": True}  # whether it has an adapter
INT8 = " int8"  # at the end of a model's name: its projections have int8 weights
# Keys of each sequence before a decode step. The number of its launches does not depend on it.
CONTEXT = 300


def random_model(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> Any:
    """A model with random weights as its first request on a GPU would leave it: its weights lie side by side.

    Args:
        name: a key of MODELS, with INT8 after it for int8 weights.
        device, dtype: of the weights.
        layers: of encoder and language model; None: the released numbers.
    """
    shape = name.removesuffix(INT8)
    model = shapes.build(shape, adapter=MODELS[shape], device=device, dtype=dtype, layers=layers)
    for module in projections(model.decoder) if shape != name else ():
        module.store_int8(module.weight.detach())
    arrange(model.decoder, model.lm_head)
    arrange(model.encoder)
    return model


@contextmanager
def unfused() -> Iterator[None]:
    """Steps that are made and run in this block call one module after another, as where each must be seen, for example by a hook."""
    with patch.object(FusedLayers, "of", lambda *_: None):
        yield


@dataclass(frozen=True)
class Answers:
    """Answers in progress, with pages for their keys and values, and nothing in them yet."""

    model: Any
    state: DecodeState
    rows: list[Row]

    @classmethod
    def of(cls, model: Any, rows: int, context: int, more: int) -> Self:
        """Answers with `context` keys each, and pages for `more` tokens."""
        config = model.config.text_config
        pool = PagePool(config, dtype=model.dtype, device=model.device)
        pages = pool.count(context + more)
        pool.require(rows * pages)
        state = DecodeState(StateSize.of(rows, pages, 1), config.vocab_size, pool)
        options = GenerationOptions(max_new_tokens=more + 1, eos_token_id=(), pad_token_id=0)
        fixed = {"prompt": context, "keys": context, "position": context - 1, "has_audio": True}
        answers = cls(model, state, [Row(options, token=(1 + 97 * row) % config.vocab_size, **fixed) for row in range(rows)])
        answers.restart()
        state.write_block_table(torch.tensor([pool.take(pages) for _ in range(rows)], dtype=torch.int32))
        return answers

    def restart(self) -> None:
        """Go back to `context` keys."""
        self.state.enter(self.rows)

    def step(self, steps: int = 1) -> DecodeStep:
        """Greedy steps of all answers."""
        return DecodeStep(self.model, self.state, Selection(), len(self.rows), mixed=False, steps=steps)
