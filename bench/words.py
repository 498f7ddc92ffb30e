"""Word error rates of the bundled checkpoint on held-out voices, real people, and a new word that it is fine-tuned on."""

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

# Utterances measured in each condition that changes the sound; all are measured as spoken.
SOME = 400
# Projector and adapter alone do not learn the word: the small encoder only knows the sounds of its 70 words. Three in four clips have
# known words only, or the model forgets them; with two in four, twice the learning rate and twice the epochs it forgot more.
CLIPS, EVERY = 480, 4
OPTIONS = FinetuneOptions(epochs=10, learning_rate=1e-3, batch_seconds=30.0, train=("encoder", "projector", "adapter"), ctc_weight=0.5)
COLUMNS = {
    "wer": "all",
    "wer_of_single_words": "single words",
    "wer_of_single_digits": "single digits",
    "ctc_wer": "the encoder's own text",
    "ctc_is_text": "share with both texts equal",
}
# Plainer names for conditions in the committed result files.
LABELS = {
    "nothing above 4 kHz (3.2 to 4, one in five elsewhere)": "low-pass at 3.2 to 4 kHz (one in five: 2.5 to 6.5)",
    "a quarter faster": "25% faster",
    "a fifth slower": "20% slower",
    "all of the training's changes": "all augmentations of training",
}


def run(*, unseen: Path, word: str, model: str, out: Path) -> str:
    """Measure, write a result file, and return its table.

    Args:
        unseen: manifest of the held-out voices; synthesized if it does not exist.
        word: one that the model does not know.
        model: a checkpoint's folder or hub id.
        out: folder for the result file.
    """
    if not unseen.is_file():
        synthesize(unseen.parent, 1500, 2, held_out=True)
    utterances = read_manifest(unseen)
    loaded, processor = _load(model)
    with tempfile.TemporaryDirectory() as folder:
        real = people.measure(loaded, processor, Path(folder))
    conditions = []
    for condition in CONDITIONS:
        chosen = utterances if condition == "as spoken" else utterances[:SOME]
        conditions.append(measure(loaded, processor, chosen, condition).to_dict())
    result = {
        "kind": "words",
        "run": results.describe_run(),
        "model": model,
        "conditions": conditions,
        "people": real,
        "new word": learn_word(model, word, utterances[:300]),
    }
    results.write(out, "words", result)
    return table(result)


def _load(model: str) -> tuple[GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor]:
    return GraniteSpeechForConditionalGeneration.from_pretrained(model), GraniteSpeechProcessor.from_pretrained(model)


def learn_word(model: str, word: str, old: Sequence[Utterance]) -> dict[str, Any]:
    """Fine-tune on a new word among known ones, and measure before and after on held-out voices, with the word and without (`old`)."""
    with tempfile.TemporaryDirectory() as folder:
        train = record(Path(folder, "train"), _sentences(word, CLIPS, 0), held_out=False)
        new = read_manifest(record(Path(folder, "new"), _sentences(word, 60 * EVERY, 1)[::EVERY], held_out=True))
        before = _rates(model, word, new, old)
        tuned = str(Path(folder, "tuned"))
        finetune(train, model, tuned, OPTIONS)
        after = _rates(tuned, word, new, old)
    return {  # with the keys of the committed result files
        "word": word,
        "clips": CLIPS,
        "one in": EVERY,
        "heard with it": len(new),
        "heard without": len(old),
        "options": asdict(OPTIONS),
        "before": before,
        "after": after,
    }


def _rates(model: str, word: str, new: Sequence[Utterance], old: Sequence[Utterance]) -> dict[str, float]:
    loaded, processor = _load(model)
    answers = transcripts(loaded, processor, new)
    return {
        "word found": sum(word in text.split() for text in answers) / len(answers),
        "wer with the word": word_error_rate([utterance.text for utterance in new], answers),
        "wer without": word_error_rate([utterance.text for utterance in old], transcripts(loaded, processor, old)),
    }


def _sentences(word: str, count: int, seed: int) -> list[str]:
    """Sentences, one in `EVERY` of which has the word, alone or among others."""
    rng = np.random.default_rng(seed)
    sentences = []
    for number in range(count):
        words = make_sentence(rng).split()[:5]
        if number % EVERY == 0:
            middle = len(words) // 2
            words = [word] if number % (2 * EVERY) == 0 else [*words[:middle], word, *words[middle:]]
        sentences.append(" ".join(words))
    return sentences


def record(folder: Path, sentences: Sequence[str], *, held_out: bool) -> Path:
    """Synthesize sentences in voices that read English; returns the manifest."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(sentences))
    voices = [voice for voice in draw_voices(200, rng, held_out=held_out) if voice.spelling == "en"]
    lines = []
    for first in range(0, len(sentences), 6):
        some = sentences[first : first + 6]
        for sentence, waveform in zip(some, speak(voices[first // 6 % len(voices)], some, rng), strict=True):
            if waveform.size:
                name = f"{len(lines)}.wav"
                soundfile.write(folder / name, np.pad(waveform, RATE // 10) * (0.5 / np.abs(waveform).max()), RATE)
                lines.append(json.dumps({"audio": name, "text": sentence}))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    lines = [
        f"Word error rates on held-out voices and new sentences, commit {result['run']['commit'][:8]}:",
        "",
        f"| condition | utterances | {' | '.join(COLUMNS.values())} |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for measured in result["conditions"]:
        rates = " | ".join(f"{measured[name]:.1%}" for name in COLUMNS)
        lines.append(f"| {LABELS.get(measured['condition'], measured['condition'])} | {measured['utterances']} | {rates} |")
    return "\n".join([*lines, "", people.sentence(result["people"]), "", _new_word(result["new word"])])


def _new_word(measured: dict[str, Any]) -> str:
    before, after = measured["before"], measured["after"]
    return (
        f'The new word "{measured["word"]}", after `finetune` on {measured["clips"]} synthetic clips, one in {measured["one in"]} of which '
        f"has it: recognized in {before['word found']:.0%} of {measured['heard with it']} utterances before and {after['word found']:.0%} "
        f"after. Word error rate of those utterances: {before['wer with the word']:.1%} before, {after['wer with the word']:.1%} after; of "
        f"{measured['heard without']} utterances without it: {before['wer without']:.1%} before, {after['wer without']:.1%} after."
    )
