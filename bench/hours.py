"""An hour of audio on a CPU: 200 utterances with pauses, and the same utterances as files of their own.

Voices held out of training speak them. The recordings are an hour with pauses of digital silence, one with noise in it, the first ten
minutes of the former, and twelve minutes of speech without pauses. Each is transcribed in a process of its own, which measures its memory.
Where the words of an utterance differ from those that its own file gives, the result file says how.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from bench import results
from granite_speech import Transcriber
from granite_speech.training import read_manifest, word_error_rate
from granite_speech.training.bundled_checkpoint.synthesis import synthesize
from granite_speech.transcription.transcript import Segment
from tests.support.long_recordings import Spoken, assemble, cut_out, differences, draw_pauses, passages

__all__ = ["pauses_of_an_hour", "read_utterances", "run", "table"]

ROOT = Path(__file__).parents[1]
UTTERANCES, HOUR, PART, CONTINUOUS = 200, 3600.0, 600.0, 720.0
NOISE_DB = -40.0
ROUNDS = 3
KINDS = ("lost", "doubled", "added", "changed")
# Of a passage with more utterances, only the number of words that differ is in the result file.
LISTED = 5

Utterance = tuple[np.ndarray, str]


def run(*, manifest: Path, out: Path) -> str:
    """Measure, write the result file, and return its table.

    Args:
        manifest: of the held-out voices; synthesized if it does not exist.
        out: folder for the result file.
    """
    utterances, rng = read_utterances(manifest), np.random.default_rng(0)
    pauses = pauses_of_an_hour(utterances, rng)
    endless = _in_turn(utterances, CONTINUOUS, rng)
    with tempfile.TemporaryDirectory() as name, Transcriber.from_pretrained("embedded", dtype="float32") as transcriber:
        folder = Path(name)
        hour, part, noisy, joined = (folder / f"{name}.wav" for name in ("hour", "part", "noisy", "joined"))
        truth = assemble(hour, utterances, pauses)
        some = [one for one in truth if one.end <= PART]
        _copy_beginning(hour, part)
        recordings = [
            ("an hour, digital silence in its pauses", hour, truth),
            ("its first ten minutes", part, some),
            (
                f"an hour, noise {-NOISE_DB:.0f} dB below the speech",
                noisy,
                assemble(noisy, utterances, pauses, noise_db=NOISE_DB),
            ),
            ("twelve minutes without pauses", joined, assemble(joined, endless, [0.0] * (len(endless) + 1))),
        ]
        measurements = [{"what": what} | _measure(transcriber, file, truth, folder / "alone") for what, file, truth in recordings]
    result = {
        "kind": "hours",
        "run": results.describe_run(),
        "shape": {"model": "embedded", "dtype": "float32", "format": "16-bit WAV, 16 kHz", "rounds": ROUNDS},
        "pauses": {"shortest": min(pauses), "longest": max(pauses)},
        "measurements": measurements,
        "memory_ratio": _above(measurements[0]) / _above(measurements[1]),
    }
    file = results.write(out, "hours", result)
    return f"{table(result)}\n\n{file}"


def read_utterances(manifest: Path) -> list[Utterance]:
    """Those of the manifest, synthesized if it does not exist."""
    if not manifest.is_file():
        synthesize(manifest.parent, UTTERANCES + 20, 7, held_out=True)  # a few cannot be spoken
    chosen = read_manifest(manifest)[:UTTERANCES]
    return [(soundfile.read(one.audio, dtype="float32")[0], one.text) for one in chosen]


def pauses_of_an_hour(utterances: Sequence[Utterance], rng: np.random.Generator) -> tuple[float, ...]:
    """From 0.3 s on, so that utterances and pauses are an hour together."""
    spoken = sum(samples.size for samples, _ in utterances) / 16_000
    return draw_pauses(rng, len(utterances) + 1, 0.3, 30.0, total=HOUR - spoken)


def _in_turn(utterances: Sequence[Utterance], seconds: float, rng: np.random.Generator) -> list[Utterance]:
    """All utterances in random order, again and again, for at least some seconds."""
    chosen: list[Utterance] = []
    while sum(samples.size for samples, _ in chosen) < seconds * 16_000:
        chosen += [utterances[number] for number in rng.permutation(len(utterances))]
    ends = np.cumsum([samples.size for samples, _ in chosen])
    return chosen[: int(np.searchsorted(ends, seconds * 16_000)) + 1]


def _copy_beginning(hour: Path, part: Path) -> None:
    samples, rate = soundfile.read(hour, stop=round(PART * 16_000), dtype="int16")
    soundfile.write(part, samples, rate, subtype="PCM_16")


def _measure(transcriber: Transcriber, file: Path, truth: Sequence[Spoken], folder: Path) -> dict[str, Any]:
    """One recording in a process of its own, against each of its utterances as a file of its own."""
    command = [sys.executable, "-m", "bench.hours_process", str(ROUNDS), str(file)]
    done = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    alone = [one.text for one in transcriber.stream(cut_out(file, truth, folder))]
    transcript = done.pop("transcript")
    segments = [Segment(**one) for one in transcript["segments"] if one["start"] < truth[-1].end]
    seconds = statistics.median(done["seconds"])
    return {
        "utterances": len(truth),
        "audio_seconds": transcript["duration"],
        **compare(truth, alone, segments),
        "windows": len(transcript["segments"]),
        "window_seconds": sum(one["end"] - one["start"] for one in transcript["segments"]),
        "warnings": transcript["warnings"],
        **done,
        "rtfx": transcript["duration"] / seconds,
    }


def compare(truth: Sequence[Spoken], alone: Sequence[str], segments: Sequence[Segment]) -> dict[str, Any]:
    """Word error rates, and what differs between the utterances alone and in the recording.

    Args:
        truth: the utterances of a recording.
        alone: what each gives as a file of its own.
        segments: of the recording's transcript.
    """
    texts, found = dict(zip(truth, alone, strict=True)), []
    counts, at_cuts = Counter(), Counter()
    heard = passages(truth, segments)
    for one in heard:
        separate = " ".join(" ".join(texts[spoken] for spoken in one.spoken).split())
        differing = differences(separate, one.text)
        for difference in differing:
            count = max(len(difference.expected), len(difference.heard))
            counts[difference.kind] += count
            at_cuts[difference.kind] += count * (len(one.segments) > 1)
        if differing and len(one.spoken) <= LISTED:
            place = {"start": (one.spoken or one.segments)[0].start, "cuts": [cut.end for cut in one.segments[:-1]]}
            words = {"spoken": one.expected, "alone": separate, "here": one.text}
            found.append(place | words | {"differences": [asdict(difference) for difference in differing]})
    return {
        "wer_alone": word_error_rate([one.text for one in truth], list(alone)),
        "wer": word_error_rate([" ".join(one.expected for one in heard)], [" ".join(one.text for one in heard)]),
        "words": {kind: counts[kind] for kind in KINDS},
        "words in cut passages": {kind: at_cuts[kind] for kind in KINDS},
        "passages": len(heard),
        "differing": found,
    }


def _above(measurement: dict[str, Any]) -> int:
    return measurement["memory"]["peak above import"]


def _listed(words: dict[str, int]) -> str:
    return ", ".join(str(words[kind]) for kind in KINDS)


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    run, measurements = result["run"], result["measurements"]
    threads = measurements[0]["threads"]
    lines = [
        f"Long recordings with the bundled checkpoint, {result['shape']['dtype']}, {result['shape']['format']}: {run['machine']}, "
        f"{threads} thread{'s' * (threads > 1)}, torch {run['versions']['torch']}, commit {run['commit'][:8]}, median of "
        f"{result['shape']['rounds']}; pauses of {result['pauses']['shortest']:.1f} to {result['pauses']['longest']:.0f} s:",
        "",
        "| recording | utterances | WER of each alone | WER in it | words lost, doubled, added, changed | where it was cut | time | "
        "times real time | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in measurements:
        lines.append(
            f"| {one['what']} | {one['utterances']} | {one['wer_alone']:.2%} | {one['wer']:.2%} | "
            f"{_listed(one['words'])} | {_listed(one['words in cut passages'])} | {results.time_text(statistics.median(one['seconds']))} | "
            f"{one['rtfx']:,.0f} | {_above(one) / 2**20:.0f} MiB |"
        )
    notes = [
        "- Words lost, doubled, added and changed: between the utterances as files of their own and the recording; then those of them in "
        "speech that no pause divides and that was cut into several windows.",
        "- The time includes reading the file, but not loading the model.",
        "- Peak memory is the process's peak of resident memory (VmHWM) less its resident memory after the imports, before the model is "
        f"loaded. The hour's is {result['memory_ratio']:.2f} times that of its first ten minutes.",
    ]
    return "\n".join([*lines, "", *notes])
