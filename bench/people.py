"""Word error rate on recordings of real people: two of Debian's packages have words that the bundled checkpoint knows."""

import json
from pathlib import Path
from typing import Any

import soundfile

from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.errors import MissingDependencyError
from granite_speech.training import ctc_transcripts, read_manifest, transcripts, word_error_rate
from granite_speech.training.bundled_checkpoint.vocabulary import DIGITS, NUMBERS

__all__ = ["measure", "sentence"]

PACKAGES = "asterisk-core-sounds-en-wav pocketsphinx-testdata"
# A telephone announcer at 8 kHz, one number per file; and at 16 kHz a speaker of the TIDIGITS corpus and a card player.
ANNOUNCER = Path("/usr/share/asterisk/sounds/en_US_f_Allison/digits")
ANNOUNCEMENTS = [*range(21), *range(30, 100, 10), "hundred", "thousand"]
POCKETSPHINX = Path("/usr/share/pocketsphinx/test/data")
RECORDINGS = {
    **{ANNOUNCER / f"{name}.wav": word for name, word in zip(ANNOUNCEMENTS, DIGITS | NUMBERS, strict=True)},
    POCKETSPHINX / "tidigits/dhd.2934z.raw": "two nine three four zero",
    POCKETSPHINX / "cards/004.wav": "five five",
}


def measure(model: GraniteSpeechForConditionalGeneration, processor: GraniteSpeechProcessor, folder: Path) -> dict[str, Any]:
    """Transcribe the recordings; returns the entry for a result file.

    Args:
        model: in evaluation mode.
        processor: of the same checkpoint.
        folder: gets their manifest, and WAV copies of headerless files.

    Raises:
        MissingDependencyError: the packages are not installed.
    """
    utterances = read_manifest(_write_manifest(folder))
    right, answers = [utterance.text for utterance in utterances], transcripts(model, processor, utterances)
    return {
        "packages": PACKAGES,
        "recordings": len(utterances),
        "words": sum(len(text.split()) for text in right),
        "wer": round(word_error_rate(right, answers), 4),
        "ctc_wer": round(word_error_rate(right, ctc_transcripts(model, processor, utterances)), 4),
        "misheard": [pair for pair in zip(right, answers, strict=True) if pair[0] != pair[1]],
    }


def _write_manifest(folder: Path) -> Path:
    lines = []
    for file, words in RECORDINGS.items():
        if not file.is_file():
            raise MissingDependencyError(
                got=f"no {str(file)!r}", expected="recordings of real people", remedy=f"Install them: apt-get install {PACKAGES}"
            )
        audio = file
        if file.suffix == ".raw":
            audio = folder / f"{file.stem}.wav"
            soundfile.write(audio, *soundfile.read(file, samplerate=16000, channels=1, subtype="PCM_16", format="RAW"))
        lines.append(json.dumps({"audio": str(audio), "text": words}))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def sentence(measured: dict[str, Any]) -> str:
    """The result of `measure` as a sentence."""
    errors = ", ".join(f'"{right}" as "{wrong}"' for right, wrong in measured["misheard"]) or "none"
    announcer, speakers = measured["packages"].split()
    return (
        f"Numbers in {measured['recordings']} recordings of three real people (Debian's {announcer}, at 8 kHz, and {speakers}): word error "
        f"rate {measured['wer']:.0%} over {measured['words']} words, and {measured['ctc_wer']:.0%} for the encoder's own text. Recordings "
        f"transcribed wrongly: {errors}."
    )
