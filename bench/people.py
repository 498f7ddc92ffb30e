"""Real people: recordings in two of Debian's packages, of words that the checkpoint inside the package knows."""

import json
from pathlib import Path
from typing import Any

import soundfile

from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.errors import MissingDependencyError
from granite_speech.training import ctc_transcripts, read_manifest, transcripts, word_error_rate
from granite_speech.training.bundled_checkpoint.vocabulary import DIGITS, NUMBERS

__all__ = ["hear", "sentence"]

PACKAGES = "asterisk-core-sounds-en-wav pocketsphinx-testdata"
# A telephone announcer at 8 kHz, a file a number; and at 16 kHz a speaker of the TIDIGITS corpus and a player of cards.
ANNOUNCED = Path("/usr/share/asterisk/sounds/en_US_f_Allison/digits")
ANNOUNCEMENTS = [*range(21), *range(30, 100, 10), "hundred", "thousand"]
TESTED = Path("/usr/share/pocketsphinx/test/data")
RECORDINGS = {
    **{ANNOUNCED / f"{name}.wav": word for name, word in zip(ANNOUNCEMENTS, DIGITS | NUMBERS, strict=True)},
    TESTED / "tidigits/dhd.2934z.raw": "two nine three four zero",
    TESTED / "cards/004.wav": "five five",
}


def hear(model: GraniteSpeechForConditionalGeneration, processor: GraniteSpeechProcessor, folder: Path) -> dict[str, Any]:
    """What the model makes of them, for a result file; `folder` takes their manifest, and as WAV what has no header.

    Raises:
        MissingDependencyError: the packages are not installed.
    """
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
    utterances = read_manifest(manifest)
    right, heard = [one.text for one in utterances], transcripts(model, processor, utterances)
    return {
        "packages": PACKAGES,
        "recordings": len(utterances),
        "words": sum(len(text.split()) for text in right),
        "wer": round(word_error_rate(right, heard), 4),
        "ctc_wer": round(word_error_rate(right, ctc_transcripts(model, processor, utterances)), 4),
        "misheard": [pair for pair in zip(right, heard, strict=True) if pair[0] != pair[1]],
    }


def sentence(heard: dict[str, Any]) -> str:
    """What `hear` returned, in words."""
    misheard = ", ".join(f'"{right}" as "{wrong}"' for right, wrong in heard["misheard"]) or "none"
    first, second = heard["packages"].split()
    return (
        f"Numbers in {heard['recordings']} recordings of three real people (Debian's {first}, at 8 kHz, and {second}): "
        f"{heard['wer']:.0%} of {heard['words']} words wrong, {heard['ctc_wer']:.0%} in the encoder's own text. Misheard: {misheard}."
    )
