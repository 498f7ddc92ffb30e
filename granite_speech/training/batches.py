"""Batches: which utterances go together, and what the losses read of them, packed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from granite_speech.modules.packing import Segments
from granite_speech.training.seeds import derived_seed

__all__ = ["Batch", "BatchSource", "Row", "plan_batches"]

# Batches' worth of shuffled utterances that are sorted by length together: enough that a batch's lengths are alike, few enough that
# its company changes from epoch to epoch.
_POOL = 50


@dataclass(frozen=True)
class Row:
    """One utterance or text as token ids.

    Attributes:
        ids: prompt, audio tokens in place, and answer.
        answer_length: how many ids at the end are the answer.
        characters: the answer as the CTC head's labels; empty where no CTC loss is asked for.
        name: the line it comes from.
    """

    ids: list[int]
    answer_length: int
    characters: list[int]
    name: str


@dataclass(frozen=True)
class Batch:
    """Rows and their clips, each end to end in one tensor.

    Attributes:
        frames: `(total_frames, input_dim)` float32 log-mel features; None for texts.
        clips: where each row's clip lies in `frames`; None for texts.
        ids: `(total_tokens,)` int64, the audio token's id where an audio vector goes.
        rows: where each row lies in `ids`.
        positions: `(total_tokens,)` int64, counted along each row.
        audio_places: `(audio tokens,)` int64, the places of the audio vectors in `ids`.
        answer_places: `(answer tokens,)` int64, the places whose next token is of an answer.
        answers: `(answer tokens,)` int64, those next tokens.
        characters: `(characters,)` int64, the answers as CTC labels, one behind the other.
        character_lengths: of each row.
        audio_seconds: of all clips together.
        names: the lines they come from.
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
        """What the losses are means over; a step of several batches divides by their sum."""
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
        """Put rows, and the features of their clips `(frames, input_dim)`, one behind the other."""
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
    """Where the loop gets its batches: a plan for each epoch, and the batch that a piece of a plan stands for.

    Both must be functions of their arguments alone, which is what lets training go on from a checkpoint where it would have gone
    without the interruption.
    """

    def plan(self, epoch: int) -> list[list[int]]:
        """The epoch's batches as indices, epochs counted from 0."""
        ...

    def load(self, epoch: int, indices: list[int]) -> Batch:
        """One batch. Called from one thread of its own, ahead of its use."""
        ...


def plan_batches(costs: Sequence[int], budget: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Batches of indices whose costs add up to at most the budget; each index is in one of them.

    Utterances of like length come together: packed batches have no padding to save, but rows of one length share an attention call and
    a CTC batch is padded. Their order is drawn anew each epoch.

    Args:
        costs: frames or tokens of each utterance, none above the budget.
        budget: of a batch.
        seed, epoch: which order; the same two give the same plan.
    """
    draw = random.Random(derived_seed("order", seed, epoch))
    order = list(range(len(costs)))
    draw.shuffle(order)
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
    draw.shuffle(batches)
    return batches


def _fill(pool: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """The pool sorted by cost and cut where a batch is full; the sort is stable, so equals stay in their drawn order."""
    batches: list[list[int]] = []
    spent = budget
    for index in sorted(pool, key=lambda index: costs[index]):
        if spent + costs[index] > budget:
            batches.append([])
            spent = 0
        batches[-1].append(index)
        spent += costs[index]
    return batches
