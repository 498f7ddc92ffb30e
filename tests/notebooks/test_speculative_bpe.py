"""IBM's notebook about speculative decoding with drafts of a second head, which has the language model's tokens.

It differs from the one with the character head in how it drafts: a hook takes the states of a layer in the middle, whose blank
probabilities weigh the frames that are pooled for the second head. Here that head is random.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softmax

from tests.notebooks.speculation import Draft, Speculation, entropies, frames_of
from tests.support.notebook_doors import DOORS, Door, clip
from tests.support.two_libraries import assert_same

# An accelerated encoder runs as transformers wrote it while there is a hook, and says so.
pytestmark = pytest.mark.filterwarnings("ignore::granite_speech.interop.accelerate.AccelerationWarning")

WINDOW = 4


class Notebook(Speculation):
    def __init__(self, door: Door):
        super().__init__(door)
        config = self.parts.encoder.config
        self.head = random_head(config.hidden_dim, 1 + self.model.config.text_config.vocab_size).to(self.device)
        self.middle: dict[str, Tensor] = {}
        self.hook = self.parts.encoder.layers[config.num_layers // 2 - 1].register_forward_hook(self.keep)
        self.importance = torch.zeros(0)

    def keep(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.middle["states"] = output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def draft(self, audios: list[np.ndarray]) -> Draft:
        states = self.encoded(self.inputs(audios)["input_features"])
        self.importance = 1.0 - softmax(self.parts.encoder.out(self.middle["states"]).float(), dim=-1)[:, :, 0]
        pooled = weighted_means(states, self.importance)
        frames = [frames_of(audio) for audio in audios]
        lengths = [min(math.ceil(min(one, states.shape[1]) / WINDOW), pooled.shape[1]) for one in frames]
        clips, times = torch.tensor([(i, t) for i, length in enumerate(lengths) for t in range(length)], device=self.device).T
        probabilities = softmax(self.head(pooled[clips, times, :]).float(), dim=-1)
        texts, doubts = [], []
        for one in probabilities.split(lengths):
            labels = torch.unique_consecutive(one.max(dim=-1).indices, dim=-1)
            tokens = [label.item() - 1 for label in labels[labels > 0]]  # label 0 is the blank
            texts.append(self.tokenizer.decode(tokens) if tokens else "")
            doubts.append(entropies(one).max().item() if tokens else float("inf"))
        return Draft(texts, doubts, states, frames)


def random_head(width: int, labels: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(width, labels, bias=True).eval()


def weighted_means(states: Tensor, importance: Tensor) -> Tensor:
    """`(clips, frames, width)` → `(clips, windows, width)`, each frame weighted by its importance."""
    clips, frames, width = states.shape
    missing = -frames % WINDOW
    states = pad(states, (0, 0, 0, missing)).view(clips, -1, WINDOW, width)
    weights = pad(importance, (0, missing)).view(clips, -1, WINDOW)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
    return (states * weights.unsqueeze(-1)).sum(dim=2)


# Entropies of a random head are near log(324) = 5.8.
THRESHOLDS = [(9.0, 0.1), (0.7, 0.2), (0.7, 0.0)]


@cache
def opened(door: str) -> Notebook:
    return Notebook(Door(door))


def results(door: str, number: int) -> dict[str, Any]:
    notebook = opened(door)
    return notebook.run([clip(number)], THRESHOLDS) | {"middle": notebook.middle["states"], "importance": notebook.importance}


@cache
def reference(number: int) -> dict[str, Any]:
    return results("transformers", number)


@pytest.mark.parametrize("number", [0, 4, 10])
@pytest.mark.parametrize("door", DOORS[1:])
def test_every_step_gives_what_transformers_gives(door: str, number: int):
    assert_same(results(door, number), reference(number))


def test_the_clips_take_all_three_ways():
    assert [one[0][0] for one in reference(0)["speculative"]] == ["draft", "decoded", "verified"]


@pytest.mark.parametrize("door", DOORS)
def test_the_last_cell_takes_the_hook_away(door: str):
    notebook = Notebook(Door(door))
    audio = [clip(4)]
    with_hook = notebook.draft(audio)
    notebook.hook.remove()
    notebook.middle.clear()
    assert_same(notebook.encoded(notebook.inputs(audio)["input_features"]).detach(), with_hook.states)
    assert not notebook.middle
