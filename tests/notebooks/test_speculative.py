"""IBM's notebook about speculative decoding with drafts of the encoder's character head."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import softmax

from tests.notebooks.speculation import Draft, Speculation, entropies, frames_of
from tests.support.notebook_doors import DOORS, Door, clip
from tests.support.two_libraries import assert_same

# No part of an accelerated model may have to run as transformers wrote it.
pytestmark = pytest.mark.filterwarnings("error::granite_speech.interop.accelerate.AccelerationWarning")


class Notebook(Speculation):
    @torch.no_grad()
    def draft(self, audios: list[np.ndarray]) -> Draft:
        states = self.encoded(self.inputs(audios)["input_features"].to(torch.float32))
        probabilities = softmax(self.parts.encoder.out(states).float(), dim=-1)
        texts, doubts = [], []
        for one, doubt in zip(probabilities, entropies(probabilities), strict=True):
            labels = torch.unique_consecutive(one.max(dim=-1).indices, dim=-1)
            labels = labels[labels > 0].tolist()
            texts.append("".join(map(chr, labels)))
            doubts.append(doubt.max().item() if labels else float("inf"))
        return Draft(texts, doubts, states, [frames_of(audio) for audio in audios])


# The notebook's thresholds, and one pair with which no draft is taken without the language model.
THRESHOLDS = [(3.0, 0.1), (1.0, 0.1), (0.7, 0.2), (0.0, 0.2)]
SINGLE = [(0,), (4,), (7,), (10,)]
RAGGED = [(0, 7, 10), (4, 8, 10)]


@cache
def opened(door: str, beams: int) -> Notebook:
    return Notebook(Door(door), beams)


def results(door: str, beams: int, clips: tuple[int, ...]) -> dict[str, Any]:
    return opened(door, beams).run([clip(number) for number in clips], THRESHOLDS)


@cache
def reference(beams: int, clips: tuple[int, ...]) -> dict[str, Any]:
    return results("transformers", beams, clips)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("clips", SINGLE + RAGGED, ids=str)
@pytest.mark.parametrize("door", DOORS[1:])
def test_every_step_gives_what_transformers_gives(door: str, clips: tuple[int, ...], beams: int):
    ours, theirs = results(door, beams, clips), reference(beams, clips)
    if door == "import changed" and clips in RAGGED:
        # transformers pads a shorter clip before it computes features, so only words and decisions are the same.
        ours, theirs = (
            [one["draft"]["texts"], one["counts"], one["fallback"], one["standard"], one["speculative"]] for one in (ours, theirs)
        )
    assert_same(ours, theirs)


def test_the_clips_take_all_three_ways():
    ways = {way for clips in SINGLE + RAGGED for turn in reference(1, clips)["speculative"] for way, _ in turn}
    assert ways == {"draft", "verified", "decoded"}


def test_drafts_and_fallbacks_are_transcripts():
    for clips, words in {(0,): "nine one five seven", (10,): "bed repeat bed"}.items():
        found = results("import changed", 1, clips)
        assert found["draft"]["texts"] == found["fallback"] == [words]
        assert found["standard"][0].endswith(words)
