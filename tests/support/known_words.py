"""Words spoken singly by held-out voices, so that it is known where each begins and ends in recordings made of them.

    python -m tests.support.known_words

speaks new ones, with the synthesizers that spoke the training data.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import soundfile

from granite_speech.training.augmentation import RATE
from granite_speech.training.bundled_checkpoint.synthesis import HELD_OUT_ACCENT, HELD_OUT_VARIANTS, Voice, find_voices, speak
from granite_speech.training.bundled_checkpoint.vocabulary import VOCABULARY
from granite_speech.transcription.transcript import Word
from tests.support.long_recordings import Spoken, assemble, draw_pauses

__all__ = ["WORDS", "KnownWord", "auc", "is_right", "known_words", "matched", "recording", "trimmed"]

WORDS = Path(__file__).parents[1] / "words"
_PLACES = WORDS / "places.json"
_DEPTH = 0.01  # a word begins and ends where its amplitude passes this part of its loudest: 40 dB
_PEAK = 0.04  # of 16 bits: small files, with their noise 20 dB below what counts
_WORDS_PER_VOICE = 6


@dataclass(frozen=True)
class KnownWord:
    """A word, `(samples,)` float32 at 16 kHz, with nothing before or after it, and who speaks it."""

    text: str
    samples: np.ndarray
    voice: str


def known_words() -> list[KnownWord]:
    """All of them, voice after voice."""
    found = []
    for one in json.loads(_PLACES.read_text()):
        samples, _ = soundfile.read(WORDS / one["audio"], dtype="float32")
        found += [KnownWord(text, samples[begin:end], one["voice"]) for text, begin, end in one["words"]]
    return found


def recording(
    file: Path, words: Sequence[KnownWord], seed: int, *, shortest: float = 0.05, longest: float = 0.6, noise_db: float | None = None
) -> list[Spoken]:
    """Write a recording of these words, and return where each is in it.

    Args:
        file: WAV or FLAC.
        words: in this order.
        seed: of the gaps and of the noise.
        shortest, longest: gaps between words, in seconds.
        noise_db: of white noise everywhere, relative to the words' level; None: no noise.
    """
    gaps = draw_pauses(np.random.default_rng(seed), len(words) + 1, shortest, longest)
    return assemble(file, [(one.samples, one.text) for one in words], gaps, noise_db=noise_db, seed=seed)


def trimmed(samples: np.ndarray) -> np.ndarray:
    """A word without what is before and after it, `(samples,)`."""
    loud = np.flatnonzero(np.abs(samples) >= _DEPTH * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1]


def matched(spoken: Sequence[Spoken], words: Sequence[Word]) -> list[tuple[Spoken, Word]]:
    """The words of a transcript that are right, with what was spoken, by the alignment of the texts with the fewest errors."""
    if not spoken or not words:
        return []
    alignment = jiwer.process_words(" ".join(one.text for one in spoken), " ".join(one.word for one in words)).alignments[0]
    pairs = []
    for part in alignment:
        if part.type == "equal":
            pairs += zip(spoken[part.ref_start_idx : part.ref_end_idx], words[part.hyp_start_idx : part.hyp_end_idx], strict=True)
    return pairs


def is_right(spoken: Sequence[Spoken], words: Sequence[Word]) -> list[bool]:
    """Whether each word of a transcript is what was spoken."""
    right = {id(word) for _, word in matched(spoken, words)}
    return [id(word) in right for word in words]


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """How often a positive one's score is above a negative one's; equal scores count half."""
    one, other = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float(np.mean((one > other) + 0.5 * (one == other)))


def _voices(rng: np.random.Generator) -> list[Voice]:
    """One voice of each held-out variant, and two more of the held-out accent."""
    groups = {name: [] for name in (*HELD_OUT_VARIANTS, "one", "other")}
    for number, voice in enumerate(one for one in find_voices() if one.held_out and one.spelling == "en"):
        accent, _, variant = voice.name.partition("+")
        if variant in HELD_OUT_VARIANTS:
            groups[variant].append(voice)
        elif accent == HELD_OUT_ACCENT:
            groups["other" if number % 2 else "one"].append(voice)
    return [group[rng.integers(len(group))] for group in groups.values()]


def _speak(seed: int = 0) -> None:
    """Write the words of each voice into one file, and their places, in samples."""
    rng, places = np.random.default_rng(seed), []
    WORDS.mkdir(exist_ok=True)
    for number, voice in enumerate(_voices(rng)):
        texts = rng.choice(VOCABULARY, _WORDS_PER_VOICE, replace=False).tolist()
        parts, words, position = [], [], 0
        for text, samples in zip(texts, speak(voice, texts, rng), strict=True):
            samples = samples * (_PEAK / np.abs(samples).max())
            parts.append(trimmed(samples))
            words.append((text, position, position + parts[-1].size))
            position += parts[-1].size
        soundfile.write(WORDS / f"{number}.flac", np.concatenate(parts), RATE, subtype="PCM_16", compression_level=1.0)
        places.append({"audio": f"{number}.flac", "voice": str(voice), "words": words})
    _PLACES.write_text("[\n" + ",\n".join(map(json.dumps, places)) + "\n]\n")


if __name__ == "__main__":
    _speak()
