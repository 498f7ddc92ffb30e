"""A tiny data set of speech, and the collator of Hugging Face's fine-tuning example, for training with transformers' Trainer."""

import json
from functools import cache
from typing import Any

import torch

from granite_speech import load_audio
from tests.support.paths import ROOT
from tests.support.two_libraries import PROMPT

__all__ = ["Collator", "columns", "speech"]

_SHORT = ("03.flac", "01.flac", "04.flac", "05.flac")  # one word each, at most 0.6 s


@cache
def _recordings() -> tuple[tuple[torch.Tensor, str], ...]:
    lines = (json.loads(line) for line in (ROOT / "tests/speech/manifest.jsonl").read_text().splitlines())
    words = {one["audio"]: one["text"] for one in lines}
    return tuple((load_audio(ROOT / "tests/speech" / name), words[name]) for name in _SHORT)


def speech(count: int, *, samples: int | None = None) -> list[dict[str, Any]]:
    """`count` examples with "audio", `(samples,)` float32, and "text"; the texts have different lengths.

    Args:
        samples: cut or pad every clip to this length, so that a batch has no padded audio.
    """
    found = []
    for number in range(count):
        audio, word = _recordings()[number % len(_recordings())]
        if samples is not None:
            audio = torch.nn.functional.pad(audio, (0, max(0, samples - len(audio))))[:samples]
        found.append({"audio": audio.clone(), "text": " ".join([word] * (1 + number % 3))})
    return found


class Collator:
    """Prompts padded on the left, and answers on the right; labels are the answers.

    Args:
        processor: of either package.
        answers: False leaves the answers to `generate`.
        lengths: keep `input_features_lengths`, which only this package has.
    """

    def __init__(self, processor: Any, *, answers: bool = True, lengths: bool = True):
        self.processor, self.answers, self.lengths = processor, answers, lengths

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts, clips = [PROMPT] * len(rows), [one["audio"] for one in rows]
        batch = dict(self.processor(prompts, clips, return_tensors="pt", padding=True, padding_side="left"))
        if not self.lengths:
            batch.pop("input_features_lengths", None)
        if self.answers:
            batch |= self._with_answers(batch, [one["text"] for one in rows])
        return batch

    def _with_answers(self, batch: dict[str, torch.Tensor], texts: list[str]) -> dict[str, torch.Tensor]:
        tokenizer, ids, mask = self.processor.tokenizer, batch["input_ids"], batch["attention_mask"]
        ends = tokenizer([text + tokenizer.eos_token for text in texts], return_tensors="pt", padding=True, padding_side="right")
        labels = ends["input_ids"].masked_fill(ends["attention_mask"] == 0, -100)
        return {
            "input_ids": torch.cat([ids, ends["input_ids"]], dim=1),
            "attention_mask": torch.cat([mask, ends["attention_mask"]], dim=1),
            "labels": torch.cat([torch.full_like(ids, -100), labels], dim=1),
        }


def columns(processor: Any, count: int) -> list[dict[str, Any]]:
    """Examples that are features already, all of one width, with a column that no model takes."""
    collate, rows = Collator(processor, lengths=False), speech(count, samples=6400)
    return [{name: one[0] for name, one in collate([row | {"text": "nine"}]).items()} | {"speaker": "A"} for row in rows]
