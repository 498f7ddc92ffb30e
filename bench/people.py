"""Real people: recordings in two of Debian's packages, of words that the checkpoint inside the package knows."""

import json
from pathlib import Path
from typing import Any

import soundfile

from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.errors import MissingDependencyError
from granite_speech.training import VOCABULARY, ctc_transcripts, read_manifest, transcripts, word_error_rate

__all__ = ["hear", "sentence"]

PACKAGES = "asterisk-core-sounds-en-wav pocketsphinx-testdata"
# A telephone announcer at 8 kHz, a file a number; and at 16 kHz a speaker of the TIDIGITS corpus and a player of cards.
NUMBERS = [*range(21), *range(30, 100, 10)]
ANNOUNCED = Path("/usr/share/asterisk/sounds/en_US_f_Allison/digits")
TESTED = Path("/usr/share/pocketsphinx/test/data")
RECORDINGS = {
    **{ANNOUNCED / f"{number}.wav": word for number, word in zip(NUMBERS, VOCABULARY, strict=False)},
    ANNOUNCED / "hundred.wav": "hundred",
    ANNOUNCED / "thousand.wav": "thousand",
    TESTED / "tidigits/dhd.2934z.raw": "two nine three four zero",
    TESTED / "cards/004.wav": "five five",
}


def hear(model: GraniteSpeechForConditionalGeneration, processor: GraniteSpeechProcessor, folder: Path) -> dict[str, Any]:
    """What the model makes of them, for a result file; `folder` takes copies of them as WAV.

    Raises:
        MissingDependencyError: the packages are not installed.
    """
    lines = []
    for number, (file, words) in enumerate(RECORDINGS.items()):
        if not file.is_file():
            raise MissingDependencyError(
                got=f"no {str(file)!r}", expected="recordings of real people", remedy=f"Install them: apt-get install {PACKAGES}"
            )
        headless = {"samplerate": 16000, "channels": 1, "subtype": "PCM_16", "format": "RAW"} if file.suffix == ".raw" else {}
        soundfile.write(folder / f"{number}.wav", *soundfile.read(file, **headless))
        lines.append(json.dumps({"audio": f"{number}.wav", "text": words}))
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
