"""Spoken training data from free synthesizers, in as many kinds of voices as possible.

A model trained only on synthesizers recognizes real people poorly if it has few kinds of voices. Three of Debian's engines are used
(espeak-ng, flite, festival), every English accent with every espeak-ng variant, and voices for other languages, most of them recorded from
people, which read English words respelled for them and so have foreign accents. Sentences come from `vocabulary`, and `augmentation`
changes clips each time they are used. `HELD_OUT_VARIANTS` and `HELD_OUT_ACCENT` never occur in training data.

Waveforms are `(samples,)` float32 NumPy arrays at 16 kHz, in [-1, 1]. All randomness comes from the `numpy.random.Generator` or seed
passed in, so equal seeds give equal data.
"""

import json
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from granite_speech.errors import InputError, MissingDependencyError
from granite_speech.training.augmentation import RATE, stretch_samples
from granite_speech.training.bundled_checkpoint.vocabulary import RESPELLING, VOCABULARY, make_sentence, respell

__all__ = ["HELD_OUT_ACCENT", "HELD_OUT_VARIANTS", "Voice", "find_voices", "synthesize"]

PACKAGES = (
    "espeak-ng flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts festival-czech festvox-czech-dita festvox-czech-krb "
    "festvox-czech-machac festvox-czech-ph festvox-italp16k festvox-itapc16k festvox-suopuhe-lj festvox-suopuhe-mv festival-ca "
    "festvox-ca-ona-hts festival-hi festvox-hi-nsk festvox-ru"
)

HELD_OUT_ACCENT = "en-gb-scotland"
HELD_OUT_VARIANTS = ("Alicia", "Hugo", "f4", "klatt4", "linda", "m3")
ACCENTS = ("en-us", "en-us-nyc", "en-gb", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", HELD_OUT_ACCENT)
FLITE_VOICES = ("awb", "kal", "kal16", "rms", "slt")
FESTIVAL_VOICES = {
    "kal_diphone": "en", "ked_diphone": "en", "cmu_us_slt_arctic_hts": "en", "czech_dita": "cs", "czech_krb": "cs", "czech_machac": "cs",
    "czech_ph": "cs", "lp_diphone": "it", "pc_diphone": "it", "hy_fi_mv_diphone": "fi", "suo_fi_lj_diphone": "fi", "upc_ca_ona_hts": "ca",
    "hindi_NSK_diphone": "hi", "msu_ru_nsh_clunits": "ru",
}  # fmt: skip

# Voices for these languages cannot read UTF-8: they say "unknown character".
FESTIVAL_ENCODINGS = {"cs": "iso-8859-2", "fi": "iso-8859-1"}
ESPEAK_LANGUAGES = {"fr": "fr-fr"} | {language: language for language in RESPELLING if language != "fr"}


@dataclass(frozen=True)
class Voice:
    """A voice of a synthesizer.

    Attributes:
        engine: "espeak-ng", "flite" or "festival".
        name: the engine's name for it, such as "en-us+f2", "slt" or "kal_diphone".
        spelling: the language whose spelling it reads, such as "en".
    """

    engine: str
    name: str
    spelling: str = "en"

    @property
    def held_out(self) -> bool:
        """Whether the voice is only for testing."""
        accent, _, variant = self.name.partition("+")
        return self.engine == "espeak-ng" and (accent == HELD_OUT_ACCENT or variant in HELD_OUT_VARIANTS)

    def __str__(self) -> str:
        return f"{self.engine}:{self.name}"


def find_voices() -> list[Voice]:
    """All voices, including held-out ones, in a fixed order.

    Raises:
        MissingDependencyError: a synthesizer or one of its voices is not installed.
    """
    missing = [program for program in ("espeak-ng", "flite", "festival") if shutil.which(program) is None]
    if not missing:
        data = Path(_run(["espeak-ng", "--version"]).stdout.decode().partition("Data at: ")[2].strip())
        variants = sorted(file.name for file in (data / "voices/!v").glob("*"))
        known = _run(["flite", "-lv"]).stdout.decode().split()
        missing = [f"flite's {voice}" for voice in FLITE_VOICES if voice not in known] + ([] if variants else ["espeak-ng's variants"])
        known = _run(["festival", "-b", "(mapcar print (voice.list))"]).stdout.decode().split()
        missing += [f"festival's {voice}" for voice in FESTIVAL_VOICES if voice not in known]
    if missing:
        raise MissingDependencyError(
            got=f"no {', '.join(missing)}",
            expected="the synthesizers of Debian 12, which speak the training data",
            remedy=f"Install them: apt-get install {PACKAGES}",
        )
    plain = [Voice("espeak-ng", f"{accent}+{variant}") for accent in ACCENTS for variant in variants]
    foreign = [Voice("espeak-ng", f"{name}+{variant}", spelling) for spelling, name in ESPEAK_LANGUAGES.items() for variant in variants]
    flite = [Voice("flite", name) for name in FLITE_VOICES]
    return plain + foreign + flite + [Voice("festival", name, spelling) for name, spelling in FESTIVAL_VOICES.items()]


def draw_voices(count: int, rng: np.random.Generator, *, held_out: bool) -> list[Voice]:
    """Choose `count` voices at random, either held-out ones, which read English spelling, or the others.

    The few voices recorded from people are chosen as often as espeak-ng's hundreds, which resemble each other.
    """
    voices = [voice for voice in find_voices() if voice.held_out == held_out and (voice.spelling == "en" or not held_out)]
    families = defaultdict(list)
    for voice in voices:
        families[voice.engine, voice.engine == "espeak-ng" and voice.spelling != "en"].append(voice)
    shares = {("espeak-ng", False): 0.45, ("espeak-ng", True): 0.1, ("flite", False): 0.2, ("festival", False): 0.25}
    weights = np.array([shares[family] for family in families])
    chosen = rng.choice(len(families), count, p=weights / weights.sum())
    members = list(families.values())
    return [members[family][rng.integers(len(members[family]))] for family in chosen]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess:
    # Festival may crash on exit, after its last file, so the exit status is ignored and the files are checked.
    return subprocess.run(["nice", "-n", "10", *command], stdin=subprocess.DEVNULL, capture_output=True, check=False)


def speak(voice: Voice, sentences: Sequence[str], rng: np.random.Generator) -> list[np.ndarray]:
    """Waveforms of sentences in one voice, without the silence around them, at random rates and pitches in the human range.

    A sentence that the voice cannot speak gives an empty waveform.
    """
    engines: dict[str, Callable] = {"espeak-ng": _espeak, "flite": _flite, "festival": _festival}
    # Punctuation changes the intonation, and commas separate words.
    endings = rng.choice(["", ".", "?", "!"], len(sentences))
    joints = rng.choice([" ", " ", ", "], len(sentences))
    texts = [
        respell(one, voice.spelling).replace(" ", joint) + ending for one, joint, ending in zip(sentences, joints, endings, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.wav") for number in range(len(texts))]
        engines[voice.engine](voice.name, texts, files, rng)
        return [_read(file) for file in files]


def _espeak(name: str, texts: Sequence[str], files: Sequence[Path], rng: np.random.Generator) -> None:
    for text, file in zip(texts, files, strict=True):
        speed, pitch, gap = rng.integers(105, 210), rng.integers(20, 80), rng.integers(0, 6)
        _run(["espeak-ng", "-v", name, "-s", str(speed), "-p", str(pitch), "-g", str(gap), "-w", str(file), text])


def _flite(name: str, texts: Sequence[str], files: Sequence[Path], rng: np.random.Generator) -> None:
    for text, file in zip(texts, files, strict=True):
        stretch = f"duration_stretch={np.exp(rng.uniform(-0.25, 0.35)):.3f}"
        _run(["flite", "-voice", name, "--setf", stretch, "-t", text, "-o", str(file)])


def _festival(name: str, texts: Sequence[str], files: Sequence[Path], rng: np.random.Generator) -> None:
    jobs = []
    for text, file in zip(texts, files, strict=True):
        stretch = f"(Parameter.set 'Duration_Stretch {np.exp(rng.uniform(-0.3, 0.35)):.3f})"
        speech = f'(unwind-protect (utt.save.wave (utt.synth (Utterance Text "{text}")) "{file}" \'riff) nil)'
        jobs.append((f"{stretch}\n{speech}\n", file))
    script = files[0].with_name("script.scm")
    while jobs:
        # One process for all, because loading a voice takes longer than speaking a sentence. If it crashes, the next one resumes after
        # the sentence that failed.
        lines = "".join(job for job, _ in jobs)
        script.write_text(f"(voice_{name})\n{lines}", encoding=FESTIVAL_ENCODINGS.get(FESTIVAL_VOICES[name], "utf-8"))
        _run(["festival", "-b", str(script)])
        last = max((number for number, (_, file) in enumerate(jobs) if file.exists()), default=-1)
        jobs = jobs[last + 2 :]


def _read(file: Path) -> np.ndarray:
    if not file.exists() or file.stat().st_size <= 44:
        return np.zeros(0, np.float32)
    samples, rate = soundfile.read(file, dtype="float32")
    samples = trim_silence(samples, rate)
    return stretch_samples(samples, rate / RATE)


def trim_silence(waveform: np.ndarray, rate: int = RATE, margin: float = 0.02) -> np.ndarray:
    """Cut silence from both ends, except for `margin` seconds. Empty if everything is silent.

    A 10 ms piece is silent if it is 45 dB below the loudest one. Recorded voices have noise in their pauses, so a piece less than 6 dB
    above the mean of the end's first 30 ms is silent too, if it is 20 dB below the loudest.
    """
    hop = rate // 100
    power = np.square(waveform[: waveform.size // hop * hop].reshape(-1, hop)).mean(1)
    if power.size == 0 or power.max() < 1e-8:
        return np.zeros(0, np.float32)
    lowest, highest = power.max() * 10**-4.5, power.max() * 10**-2.0
    first, last = (np.clip(4 * edge.mean(), lowest, highest) for edge in (power[:3], power[-3:]))
    begin, end = np.argmax(power > first), power.size - np.argmax(power[::-1] > last)
    return waveform[max(0, begin * hop - int(margin * rate)) : end * hop + int(margin * rate)]


def synthesize(
    folder: str | Path,
    count: int,
    seed: int,
    *,
    held_out: bool = False,
    workers: int = 2,
    per_process: int = 40,
    sentences: Sequence[str] = (),
) -> Path:
    """Write clips as 16 kHz WAV files, and a `manifest.jsonl` with their audio, text and voice.

    Args:
        folder: created if needed; files with the same names are overwritten.
        count: number of clips. Clips that a voice cannot speak, or speaks at an implausible length, are omitted.
        seed: determines everything random.
        held_out: use the held-out voices instead of all others.
        workers: synthesizers to run in parallel, at low priority.
        per_process: clips of one voice per synthesizer process.
        sentences: spoken in turn; if empty, `make_sentence` supplies them.

    Returns:
        The manifest's path.

    Raises:
        MissingDependencyError: a synthesizer is not installed.
        InputError: a sentence has a word outside VOCABULARY, or no clip could be spoken.
    """
    _check_words(sentences)
    folder, rng = Path(folder), np.random.default_rng(seed)
    voices = draw_voices(count, rng, held_out=held_out)
    texts = [sentences[number % len(sentences)] if sentences else make_sentence(rng) for number in range(count)]
    for number in range(0, count, 1000):
        (folder / f"{number // 1000:03d}").mkdir(parents=True, exist_ok=True)

    def record(group: tuple[Voice, list[int]]) -> list[dict[str, str]]:
        voice, numbers = group
        # Seeded by the first clip's number, so that the result does not depend on which worker takes the group.
        return _record(folder, voice, {number: texts[number] for number in numbers}, np.random.default_rng((seed, numbers[0])))

    with ThreadPoolExecutor(workers) as pool:
        lines = [line for some in pool.map(record, _group_by_voice(voices, per_process)) for line in some]
    if not lines:
        raise InputError(got=f"no clip of {count}", expected="speech", remedy="Check that espeak-ng, flite and festival work")
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["audio"])))
    return manifest


def _check_words(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        unknown = [word for word in sentence.split() if word not in VOCABULARY]
        if unknown or not sentence.strip():
            raise InputError(
                got=f"the sentence {sentence!r}" + (f" with {unknown[0]!r}" if unknown else ""),
                expected="words of VOCABULARY, for which every language has a spelling",
                remedy="Remove the word, or add it to the vocabulary",
            )


def _group_by_voice(voices: Sequence[Voice], size: int) -> list[tuple[Voice, list[int]]]:
    """Each voice with the numbers of its clips, at most `size` in a group."""
    by_voice = defaultdict(list)
    for number, voice in enumerate(voices):
        by_voice[voice].append(number)
    return [(voice, numbers[at : at + size]) for voice, numbers in by_voice.items() for at in range(0, len(numbers), size)]


def _record(folder: Path, voice: Voice, texts: dict[int, str], rng: np.random.Generator) -> list[dict[str, str]]:
    """Speak texts, by clip number, and write those of a plausible length. Returns their manifest lines."""
    lines = []
    for (number, text), waveform in zip(texts.items(), speak(voice, list(texts.values()), rng), strict=True):
        if 0.1 <= waveform.size / RATE / len(text.split()) <= 2.0:  # seconds per word
            name = f"{number // 1000:03d}/{number:06d}.wav"
            soundfile.write(folder / name, waveform * (0.5 / np.abs(waveform).max()), RATE, subtype="PCM_16")
            lines.append({"audio": name, "text": text, "voice": str(voice)})
    return lines
