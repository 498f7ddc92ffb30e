"""Packed batches, and the plan that says which utterances go into each."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from granite_speech.modules.packing import Segments
from granite_speech.training.seeds import derived_seed

__all__ = ["Batch", "BatchSource", "Row", "plan_batches"]

# Shuffled utterances are sorted by length in pools of this many batches: large enough that a batch's lengths are similar, small enough
# that its members change from epoch to epoch.
_POOL = 50


@dataclass(frozen=True)
class Row:
    """One utterance or text as token ids.

    Attributes:
        ids: the prompt with its audio tokens, then the answer; empty for a model without a language model.
        answer_length: number of ids at the end that are the answer.
        characters: the answer as labels of the CTC head, which are tokens if that has a tokenizer; empty without a CTC loss.
        name: manifest and line, for messages.
    """

    ids: list[int]
    answer_length: int
    characters: list[int]
    name: str


@dataclass(frozen=True)
class Batch:
    """Rows and their clips, each packed end to end in one tensor.

    Attributes:
        frames: `(total_frames, input_dim)` float32 log-mel features; None for texts.
        clips: bounds of each row's clip in `frames`; None for texts.
        ids: `(total_tokens,)` int64, with the audio token's id where an audio vector goes.
        rows: bounds of each row in `ids`.
        positions: `(total_tokens,)` int64, position of each token in its row.
        audio_places: `(audio tokens,)` int64, indices of the audio tokens in `ids`.
        answer_places: `(answer tokens,)` int64, indices in `ids` of the tokens that answers' tokens follow.
        answers: `(answer tokens,)` int64, the answers' tokens.
        characters: `(characters,)` int64, the answers as CTC labels, end to end.
        character_lengths: number of characters in each row.
        audio_seconds: total length of the clips.
        names: manifest and line of each row, for messages.
    """

    frames: Tensor | None
    clips: Segments | None
    ids: Tensor
    rows: Segments
    positions: Tensor
    audio_places: Tensor
    answer_places: Tensor
    answers: Tensor
    characters: Tensor
    character_lengths: tuple[int, ...]
    audio_seconds: float
    names: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Sizes that the losses are averaged over. A step of several batches divides by their sum."""
        return {"answer_tokens": len(self.answers), "characters": len(self.characters)}

    @classmethod
    def pack(
        cls,
        rows: Sequence[Row],
        features: Sequence[Tensor] | None,
        *,
        audio_token: int,
        audio_seconds: float,
        device: torch.device,
    ) -> "Batch":
        """Pack rows, and the features of their clips `(frames, input_dim)`."""
        lengths = [len(row.ids) for row in rows]
        ids = torch.tensor([one for row in rows for one in row.ids], dtype=torch.int64)
        segments = Segments(tuple(lengths), device)
        ends = segments.starts[1:]
        answered = torch.cat([torch.arange(end - row.answer_length, end) for row, end in zip(rows, ends, strict=True)])
        return cls(
            frames=None if features is None else torch.cat(list(features)).to(device),
            clips=None if features is None else Segments(tuple(len(one) for one in features), device),
            ids=ids.to(device),
            rows=segments,
            positions=torch.cat([torch.arange(length) for length in lengths]).to(device),
            audio_places=(ids == audio_token).nonzero().squeeze(1).to(device),
            answer_places=(answered - 1).to(device),
            answers=ids[answered].to(device),
            characters=torch.tensor([one for row in rows for one in row.characters], dtype=torch.int64).to(device),
            character_lengths=tuple(len(row.characters) for row in rows),
            audio_seconds=audio_seconds,
            names=tuple(row.name for row in rows),
        )


class BatchSource(Protocol):
    """Supplies a plan for each epoch, and the batch for each entry of a plan.

    Both methods must depend on their arguments alone. That makes a resumed run see the same batches as an uninterrupted one.
    """

    def plan(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, as indices. Epochs count from 0."""
        ...

    def load(self, epoch: int, indices: list[int]) -> Batch:
        """One batch. Called ahead of time, from a single background thread."""
        ...


def plan_batches(costs: Sequence[int], budget: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Batches of indices whose costs add up to at most the budget. Each index is in exactly one batch.

    A batch has utterances of similar length. Packing needs no padding, but rows of equal length share an attention call, and the CTC
    loss does pad. The order differs in each epoch.

    Args:
        costs: frames, samples or tokens of each utterance, none above the budget.
        budget: largest cost of a batch.
        seed, epoch: determine the order.
    """
    rng = random.Random(derived_seed("order", seed, epoch))
    order = list(range(len(costs)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    pool: list[int] = []
    spent = 0
    for index in order:
        pool.append(index)
        spent += costs[index]
        if spent >= _POOL * budget:
            batches += _fill(pool, costs, budget)
            pool, spent = [], 0
    batches += _fill(pool, costs, budget)
    rng.shuffle(batches)
    return batches


def _fill(pool: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Sort the pool by cost and start a new batch when one is full. The sort is stable, so equal costs keep their random order."""
    batches: list[list[int]] = []
    spent = budget
    for index in sorted(pool, key=lambda index: costs[index]):
        if spent + costs[index] > budget:
            batches.append([])
            spent = 0
        batches[-1].append(index)
        spent += costs[index]
    return batches
