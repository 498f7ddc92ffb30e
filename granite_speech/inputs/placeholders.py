"""Audio tokens in a prompt: one placeholder for each clip becomes as many tokens as the clip has, unless that was done before."""

import re
from collections.abc import Sequence
from itertools import islice

__all__ = ["count_placeholders", "expand", "moved", "tokens_for"]


def count_placeholders(texts: Sequence[str], audio_token: str) -> tuple[int, list[int]]:
    """The number of audio tokens in all texts, and in each run of them with nothing in between."""
    total = sum(text.count(audio_token) for text in texts)
    if total == 0:
        return 0, []
    pattern = re.compile(f"(?:{re.escape(audio_token)})+")
    return total, [len(run[0]) // len(audio_token) for text in texts for run in pattern.finditer(text)]


def tokens_for(runs: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
    """For each audio token in the prompts the number of tokens that replace it.

    With one placeholder for each clip these are the clips' sizes. Otherwise each run is either of placeholders, one for each clip, or
    it is expanded already: as long as the sizes of some clips together. Then each of its tokens stays one.

    Args:
        runs: lengths of the runs of audio tokens, in order.
        sizes: audio tokens of each clip, in order.

    Returns:
        None if the runs do not fit the clips.
    """
    if sum(runs) == len(sizes):
        return list(sizes)
    # Clips that the runs so far can stand for → how they do.
    readings: dict[int, list[list[int]]] = {0: []}
    for run in runs:
        found: dict[int, list[list[int]]] = {}
        for used, before in readings.items():
            total, clips = 0, used
            while clips < len(sizes) and total < run:
                total, clips = total + sizes[clips], clips + 1
            if total == run:
                found.setdefault(clips, [*before, [1] * run])
            if used + run <= len(sizes):
                found.setdefault(used + run, [*before, list(sizes[used : used + run])])
        readings = found
    reading = readings.get(len(sizes))
    return None if reading is None else [one for part in reading for one in part]


def expand(texts: Sequence[str], audio_token: str, counts: Sequence[int]) -> list[str]:
    """The texts with each audio token repeated as often as its entry of `counts` says."""
    pieces = [text.split(audio_token) for text in texts]
    count = iter(counts)
    return [piece[0] + "".join(audio_token * next(count) + rest for rest in piece[1:]) for piece in pieces]


def moved(
    texts: Sequence[str], audio_token: str, counts: Sequence[int], spans: Sequence[Sequence[tuple[int, int]]]
) -> list[list[tuple[int, int]]]:
    """Ranges of characters in texts, as ranges in the expanded texts."""
    count, result = iter(counts), []
    for text, ranges in zip(texts, spans, strict=True):
        starts = [found.start() for found in re.finditer(re.escape(audio_token), text)]
        grown = [(one - 1) * len(audio_token) for one in islice(count, len(starts))]

        def place(character: int, starts=starts, grown=grown) -> int:
            return character + sum(extra for start, extra in zip(starts, grown, strict=True) if start < character)

        result.append([(place(begin), place(end)) for begin, end in ranges])
    return result
