"""What the checkpoint inside the package understands: unseen voices, real people, and a word that it is taught."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from bench import people, results
from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.training import FinetuneOptions, Utterance, finetune, read_manifest, transcripts, word_error_rate
from granite_speech.training.augmentation import RATE
from granite_speech.training.bundled_checkpoint.conditions import CONDITIONS, measure
from granite_speech.training.bundled_checkpoint.synthesis import draw_voices, speak, synthesize
from granite_speech.training.bundled_checkpoint.vocabulary import make_sentence

__all__ = ["run", "table"]

# What is heard under conditions that change the sound; as it was spoken, all are heard.
SOME = 400
# With projector and adapter alone it does not learn the word: the encoder, small as it is, knows the sounds of 70 words and no others.
# Three in four clips are of words that it knows, which it would forget otherwise; with half of them, twice the rate and twice the epochs
# it forgot more.
CLIPS, EVERY = 480, 4
OPTIONS = FinetuneOptions(epochs=10, learning_rate=1e-3, batch_seconds=30.0, train=("encoder", "projector", "adapter"), ctc_weight=0.5)


def run(*, unseen: Path, word: str, model: str, out: Path) -> str:
    """Measure, write a result file, and return its table.

    Args:
        unseen: a manifest of the held-out voices; its clips are synthesized where there is none.
        word: one that the model does not know.
        model: a checkpoint's folder or id.
        out: folder of the result file.
    """
    if not unseen.is_file():
        synthesize(unseen.parent, 1500, 2, held_out=True)
    utterances = read_manifest(unseen)
    loaded, processor = GraniteSpeechForConditionalGeneration.from_pretrained(model), GraniteSpeechProcessor.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        heard = people.hear(loaded, processor, Path(folder))
    result = {
        "kind": "words",
        "run": results.describe_run(),
        "model": model,
        "conditions": [
            measure(loaded, processor, utterances if condition == "as spoken" else utterances[:SOME], condition).to_dict()
            for condition in CONDITIONS
        ],
        "people": heard,
        "new word": teach(model, word, utterances[:300]),
    }
    results.write(out, "words", result)
    return table(result)


def teach(model: str, word: str, old: Sequence[Utterance]) -> dict[str, Any]:
    """Fine-tune on a word, among words that the model knows, and see what it makes of it in unseen voices, and of the others."""
    with tempfile.TemporaryDirectory() as folder:
        train = record(Path(folder, "train"), _sentences(word, CLIPS, 0), held_out=False)
        new = read_manifest(record(Path(folder, "new"), _sentences(word, 60 * EVERY, 1)[::EVERY], held_out=True))
        rates = {}
        for when in ("before", "after"):
            place = model if when == "before" else str(Path(folder, "tuned"))
            if when == "after":
                finetune(train, model, place, OPTIONS)
            loaded, processor = GraniteSpeechForConditionalGeneration.from_pretrained(place), GraniteSpeechProcessor.from_pretrained(place)
            heard = transcripts(loaded, processor, new)
            rates[when] = {
                "word found": sum(word in text.split() for text in heard) / len(heard),
                "wer with the word": word_error_rate([one.text for one in new], heard),
                "wer without": word_error_rate([one.text for one in old], transcripts(loaded, processor, old)),
            }
    return {
        "word": word,
        "clips": CLIPS,
        "one in": EVERY,
        "heard with it": len(new),
        "heard without": len(old),
        "options": asdict(OPTIONS),
        **rates,
    }


def _sentences(word: str, count: int, seed: int) -> list[str]:
    """Sentences, one in `EVERY` of which has the word: by itself, or among others."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        words = make_sentence(draw).split()[:5]
        if number % EVERY == 0:
            words = [word] if number % (2 * EVERY) == 0 else [*words[: len(words) // 2], word, *words[len(words) // 2 :]]
        made.append(" ".join(words))
    return made


def record(folder: Path, sentences: Sequence[str], *, held_out: bool) -> Path:
    """Sentences in voices that read English; returns the manifest."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(len(sentences))
    voices = [voice for voice in draw_voices(200, draw, held_out=held_out) if voice.spelling == "en"]
    lines = []
    for first in range(0, len(sentences), 6):
        some = sentences[first : first + 6]
        for sentence, waveform in zip(some, speak(voices[first // 6 % len(voices)], some, draw), strict=True):
            if waveform.size:
                name = f"{len(lines)}.wav"
                soundfile.write(folder / name, np.pad(waveform, RATE // 10) * (0.5 / np.abs(waveform).max()), RATE)
                lines.append(json.dumps({"audio": name, "text": sentence}))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    columns = {
        "wer": "words wrong",
        "wer_of_single_words": "of one alone",
        "wer_of_single_digits": "of one digit",
        "ctc_wer": "wrong in the encoder's own text",
        "ctc_is_text": "the two texts equal",
    }
    rows = [f"| as it is heard | utterances | {' | '.join(columns.values())} |", "|---|---|" + "---|" * len(columns)]
    for one in result["conditions"]:
        rows.append(f"| {one['condition']} | {one['utterances']} | " + " | ".join(f"{one[name]:.1%}" for name in columns) + " |")
    head = f"Held-out voices, sentences drawn anew, commit {result['run']['commit'][:8]}:"
    taught = result["new word"]
    before, after = taught["before"], taught["after"]
    tail = (
        f'Taught "{taught["word"]}" by `finetune` on {taught["clips"]} made clips, one in {taught["one in"]} with it: found in '
        f"{before['word found']:.0%} of {taught['heard with it']} utterances before, {after['word found']:.0%} after; words wrong in "
        f"those {before['wer with the word']:.1%} before, {after['wer with the word']:.1%} after; in {taught['heard without']} "
        f"without it {before['wer without']:.1%} before, {after['wer without']:.1%} after."
    )
    return "\n".join([head, "", *rows, "", people.sentence(result["people"]), "", tail])
