"""Twelve sentences spoken by held-out voices, and the embedded checkpoint's scores for them.

    python -m tests.support.spoken build/embedded/unseen/manifest.jsonl

chooses and writes new ones; run it after training the checkpoint again.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import soundfile
import torch

from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.inputs.requests import transcript_request
from granite_speech.training import Utterance, ctc_transcripts, read_manifest, transcripts

__all__ = ["SPEECH", "assert_understood", "load", "scores", "sentences"]

SPEECH = Path(__file__).parents[1] / "speech"
_SCORES = SPEECH / "scores.json"


def sentences() -> list[Utterance]:
    return read_manifest(SPEECH / "manifest.jsonl")


def load(folder: str | Path = "embedded") -> tuple[GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor]:
    return GraniteSpeechForConditionalGeneration.from_pretrained(folder), GraniteSpeechProcessor.from_pretrained(folder)


@torch.no_grad()
def scores(model, processor, utterances: Sequence[Utterance]) -> list[float]:
    """Negative log-likelihood of each right answer, in nats. Even a small change of the arithmetic changes it."""
    request, found = transcript_request(processor), []
    for one in utterances:
        inputs = processor(request, one.waveform(16_000))
        tokenizer = processor.tokenizer
        answer = torch.tensor([[*tokenizer.encode(" " + one.text, add_special_tokens=False), tokenizer.eos_token_id]])
        ids = torch.cat([inputs["input_ids"], answer], 1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**inputs).logits[0, -answer.shape[1] - 1 : -1]
        found.append(float(torch.nn.functional.cross_entropy(logits.float(), answer[0], reduction="sum")))
    return found


def assert_understood(model, processor) -> None:
    """Assert that model and encoder give the right words, and the model the recorded scores."""
    utterances = sentences()
    right = [one.text for one in utterances]
    assert transcripts(model, processor, utterances) == right
    assert ctc_transcripts(model, processor, utterances) == right
    recorded = json.loads(_SCORES.read_text())
    for one, score in zip(utterances, scores(model, processor, utterances), strict=True):
        assert math.isclose(score, recorded[one.text], rel_tol=1e-3, abs_tol=1e-3), (one.text, score, recorded[one.text])


def _choose(manifest: str) -> None:
    """Write the first correctly transcribed sentences of the wanted lengths, and their scores."""
    model, processor = load()
    some = read_manifest(manifest)[:300]
    texts, spelled = transcripts(model, processor, some), ctc_transcripts(model, processor, some)
    wanted = [1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8]
    chosen = []
    for one, text, letters in zip(some, texts, spelled, strict=True):
        count = len(one.text.split())
        if one.text == text == letters and count in wanted and one.text not in {other.text for other in chosen}:
            wanted.remove(count)
            chosen.append(one)
    assert not wanted, f"no correctly transcribed sentences of {wanted} words"
    SPEECH.mkdir(exist_ok=True)
    lines = []
    for number, one in enumerate(chosen):
        soundfile.write(SPEECH / f"{number:02d}.flac", one.waveform(16_000).numpy(), 16_000)
        lines.append(json.dumps({"audio": f"{number:02d}.flac", "text": one.text, "voice": one.voice}))
    (SPEECH / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    right = [one.text for one in sentences()]
    _SCORES.write_text(json.dumps(dict(zip(right, scores(model, processor, sentences()), strict=True)), indent=1) + "\n")


if __name__ == "__main__":
    _choose(sys.argv[1])
