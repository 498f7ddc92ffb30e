"""Times and confidences of words with the bundled checkpoint, where it is known when each word was said; and what they cost.

Voices held out of training speak words singly, which are joined with known gaps. The recordings of a condition have the same words.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import hours, results
from granite_speech import Transcriber
from granite_speech.training import read_manifest
from granite_speech.training.bundled_checkpoint.synthesis import synthesize
from granite_speech.training.bundled_checkpoint.vocabulary import VOCABULARY
from granite_speech.transcription.transcript import Word
from tests.support.known_words import KnownWord, auc, is_right, matched, recording, trimmed
from tests.support.long_recordings import Spoken, assemble

__all__ = ["run", "table"]

WORDS, IN_A_RECORDING = 700, 50
CLIPS, ROUNDS = 48, 7
# What is done to the recordings: gaps in seconds, and white noise in decibels relative to the words.
CONDITIONS: dict[str, dict[str, Any]] = {
    "gaps of 0.05 to 0.6 s": {},
    "gaps of 0 to 0.03 s": {"shortest": 0.0, "longest": 0.03},
    "noise 40 dB below": {"noise_db": -40.0},
    "noise 20 dB below": {"noise_db": -20.0},
    "noise 10 dB below": {"noise_db": -10.0},
    "noise 5 dB below": {"noise_db": -5.0},
    "noise as loud": {"noise_db": 0.0},
}
QUANTILES = {"median": 0.5, "95 %": 0.95, "99 %": 0.99}
CONFIDENCES = ("confidence", "ctc_confidence", "lm_confidence")


def run(*, manifest: Path, utterances: Path, out: Path) -> str:
    """Measure, write the result file, and return its table.

    Args:
        manifest: of single words; synthesized if it does not exist.
        utterances: manifest of the utterances that the cost is measured on, those of `bench hours`; likewise.
        out: folder for the result file.
    """
    words = _words(manifest)
    with tempfile.TemporaryDirectory() as name, Transcriber.from_pretrained("embedded", dtype="float32") as transcriber:
        folder = Path(name)
        measured = {condition: _transcribed(transcriber, words, folder, changes) for condition, changes in CONDITIONS.items()}
        result = {
            "kind": "times",
            "run": results.describe_run(),
            "shape": {"model": "embedded", "dtype": "float32", "words": len(words), "voices": len({one.voice for one in words})},
            "conditions": {condition: _errors(pairs) | _confidence(pairs) for condition, pairs in measured.items()},
            "all noise": _confidence([pair for name, pairs in measured.items() if "noise" in name for pair in pairs]),
            "cost": _cost(transcriber, utterances, folder),
        }
    file = results.write(out, "times", result)
    return f"{table(result)}\n\n{file}"


def _words(manifest: Path) -> list[KnownWord]:
    if not manifest.is_file():
        rng = np.random.default_rng(1)
        texts = [word for _ in range(-(-WORDS // len(VOCABULARY))) for word in rng.permutation(VOCABULARY).tolist()]
        synthesize(manifest.parent, WORDS, 5, held_out=True, sentences=texts)
    words = [KnownWord(one.text, trimmed(one.waveform(16_000).numpy()), one.voice) for one in read_manifest(manifest)]
    return sorted(words, key=lambda one: one.voice)


def _transcribed(
    transcriber: Transcriber, words: Sequence[KnownWord], folder: Path, changes: dict[str, Any]
) -> list[tuple[list[Spoken], tuple[Word, ...]]]:
    """What was spoken in each recording, and the words of its transcript."""
    files, spoken = [], []
    for first in range(0, len(words), IN_A_RECORDING):
        files.append(folder / f"{first}.wav")
        spoken.append(recording(files[-1], words[first : first + IN_A_RECORDING], first, **changes))
    found = [one.words for one in transcriber.stream(files, word_timestamps=True)]
    return list(zip(spoken, found, strict=True))


def _errors(pairs: Sequence[tuple[list[Spoken], tuple[Word, ...]]]) -> dict[str, Any]:
    """How far the times of the right words are off, in milliseconds."""
    right = [pair for spoken, words in pairs for pair in matched(spoken, words)]
    errors = {
        "starts": np.array([word.start - one.start for one, word in right]) * 1000,
        "ends": np.array([word.end - one.end for one, word in right]) * 1000,
    }
    return {"right": len(right)} | {
        name: {"bias": float(np.median(values))} | {label: float(np.quantile(np.abs(values), q)) for label, q in QUANTILES.items()}
        for name, values in errors.items()
    }


def _confidence(pairs: Sequence[tuple[list[Spoken], tuple[Word, ...]]]) -> dict[str, Any]:
    """How well each confidence tells right words from wrong ones."""
    words = [word for _, several in pairs for word in several]
    right = [truth for spoken, several in pairs for truth in is_right(spoken, several)]
    found: dict[str, Any] = {"heard": len(words), "wrong": right.count(False), "auc": {}}
    for name in CONFIDENCES:
        scores = [(getattr(word, name) or 0.0, truth) for word, truth in zip(words, right, strict=True)]
        good, bad = [score for score, truth in scores if truth], [score for score, truth in scores if not truth]
        found["auc"][name] = auc(good, bad) if good and bad else None
    return found


def _cost(transcriber: Transcriber, manifest: Path, folder: Path) -> dict[str, Any]:
    """Seconds with and without words, in turns, of some clips together and of an hour."""
    utterances, rng = hours.read_utterances(manifest), np.random.default_rng(0)
    hour = folder / "hour.wav"
    assemble(hour, utterances, hours.pauses_of_an_hour(utterances, rng))
    jobs = {f"{CLIPS} clips": [samples for samples, _ in utterances[:CLIPS]], "an hour": [hour]}
    return {"threads": torch.get_num_threads()} | {name: _in_turns(transcriber, audio) for name, audio in jobs.items()}


def _in_turns(transcriber: Transcriber, audio: list[Any]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    calls: dict[str, Callable[[], Any]] = {
        name: lambda asked=name == "with": list(transcriber.stream(audio, word_timestamps=asked)) for name in seconds
    }
    texts = [list(map(str, call())) for call in calls.values()]
    if texts[0] != texts[1]:
        raise SystemExit("the texts with and without words differ, so nothing was timed")
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    shares = [1 - one / other for one, other in zip(seconds["without"], seconds["with"], strict=True)]
    return {"seconds": seconds, "share": statistics.median(shares)}


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    run, shape = result["run"], result["shape"]
    lines = [
        f"Times of words with the bundled checkpoint, {shape['dtype']}, {shape['words']} words of {shape['voices']} voices: "
        f"{run['machine']}, torch {run['versions']['torch']}, commit {run['commit'][:8]}:",
        "",
        "| recordings | right words | start: bias | median | 95% | 99% | end: bias | median | 95% | 99% | wrong words | AUC | "
        "of the CTC head | of the language model |",
        "|" + "---|" * 14,
    ]
    for name, one in result["conditions"].items():
        errors = [f"{one[edge][what]:{'+' * (what == 'bias')}.0f}" for edge in ("starts", "ends") for what in ("bias", *QUANTILES)]
        lines.append(f"| {name} | {one['right']} | {' | '.join(errors)} | {_aucs(one)} |")
    lines.append(f"| all with noise | {'| ' * 9}{_aucs(result['all noise'])} |")
    cost = result["cost"]
    lines += ["", f"What they cost, with {cost['threads']} threads, median of {ROUNDS} in turns:", ""]
    lines += ["| recordings | without words | with words | their share |", "|---|---|---|---|"]
    for name in (name for name in cost if name != "threads"):
        without, with_words = (results.time_text(statistics.median(cost[name]["seconds"][which])) for which in ("without", "with"))
        lines.append(f"| {name} | {without} | {with_words} | {cost[name]['share']:.1%} |")
    return "\n".join(
        [
            *lines,
            "",
            "- Errors are those of right words, in milliseconds. A word begins and ends where it is 40 dB below its peak.",
            "- AUC: how often a right word has a higher confidence than a wrong one. The first is of `confidence`.",
        ]
    )


def _aucs(one: dict[str, Any]) -> str:
    return " | ".join([str(one["wrong"]), *("" if one["auc"][name] is None else f"{one['auc'][name]:.3f}" for name in CONFIDENCES)])
