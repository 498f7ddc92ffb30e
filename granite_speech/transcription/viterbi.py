"""The likeliest path of a sequence of labels through frames, by CTC's rules: torchaudio's, or the same here if it cannot be imported."""

from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np
import torch

__all__ = ["best_path", "likeliest_labels"]


def best_path(emissions: np.ndarray, targets: Sequence[int]) -> list[tuple[int, int]] | None:
    """The first and last frame of each target on the likeliest path; None if there are not enough frames for any path.

    Args:
        emissions: `(frames, labels)` float32 log-probabilities; label 0 is the blank.
        targets: labels, none of them 0. Equal neighbours need a blank between them.
    """
    repeats = sum(one == other for one, other in pairwise(targets))
    if len(targets) + repeats > len(emissions):
        return None
    if not targets:
        return []
    return _spans(_forced_align(emissions, targets), len(targets))


def _forced_align(emissions: np.ndarray, targets: Sequence[int]) -> list[int]:
    """The label of each frame."""
    try:
        from torchaudio.functional import forced_align
    except (ImportError, OSError, RuntimeError):  # not installed, or built for a different CUDA from torch
        return likeliest_labels(emissions, targets)
    path, _ = forced_align(torch.from_numpy(emissions)[None], torch.tensor([targets], dtype=torch.int32), blank=0)
    return path[0].tolist()


def likeliest_labels(emissions: np.ndarray, targets: Sequence[int]) -> list[int]:
    """The label of each frame on the likeliest path, as `torchaudio.functional.forced_align` gives it (Viterbi).

    Arguments are those of `best_path`, which has checked that there is a path.
    """
    states = np.zeros(2 * len(targets) + 1, np.int64)  # a blank before, between and after the targets
    states[1::2] = targets
    may_skip = np.zeros(len(states), bool)  # the blank between two different targets
    may_skip[3::2] = states[3::2] != states[1:-2:2]
    score = np.full(len(states), -np.inf, np.float32)
    score[:2] = emissions[0, states[:2]]
    steps = np.zeros((len(emissions), len(states)), np.int8)  # how many states a frame is beyond the one before it
    for frame in range(1, len(emissions)):
        one, two = np.full_like(score, -np.inf), np.full_like(score, -np.inf)
        one[1:], two[2:] = score[:-1], np.where(may_skip[2:], score[:-2], -np.inf)
        choices = np.stack([score, one, two])
        steps[frame] = choices.argmax(0)
        score = choices.max(0) + emissions[frame, states]
    state = len(states) - 1 if score[-1] > score[-2] else len(states) - 2
    labels = []
    for frame in range(len(emissions) - 1, -1, -1):
        labels.append(int(states[state]))
        state -= steps[frame, state]
    return labels[::-1]


def _spans(path: Sequence[int], count: int) -> list[tuple[int, int]]:
    spans, frame = [], 0
    for label, members in groupby(path):
        length = len(list(members))
        if label:
            spans.append((frame, frame + length - 1))
        frame += length
    assert len(spans) == count
    return spans
