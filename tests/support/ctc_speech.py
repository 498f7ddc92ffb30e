"""What a few words sound like to a small TurboCTC model: each word is a tone or two. The model is in `tests/tones`.

`python -m tests.support.ctc_speech` trains it again, in a minute or five.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.inputs.batch import BatchFeature
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.inputs.ctc_tokenizer import GraniteSpeech5Tokenizer
from granite_speech.inputs.delta_features import GraniteSpeech5FeatureExtractor
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from tests.support.paths import ROOT

__all__ = ["RATE", "TONES", "WORDS", "sentence", "sound"]

TONES = ROOT / "tests" / "tones"

RATE = 16000
# The tokens of each word, and the pitch of each token in Hz.
WORDS = {"one": ("▁one",), "two": ("▁t", "wo"), "three": ("▁three",), "four": ("▁f", "our")}
_PITCHES = {"▁one": 400, "▁t": 800, "wo": 1300, "▁three": 2000, "▁f": 3000, "our": 4500}
_TONE, _PAUSE = 0.3, 0.15  # seconds
_STEPS, _BATCHES, _CLIPS, _LENGTH, _RATE_OF_LEARNING = 110, 6, 6, 5, 6e-3


def sentence(rng: np.random.Generator, words: int) -> list[str]:
    """Random words."""
    return [str(one) for one in rng.choice(list(WORDS), words)]


def sound(words: Sequence[str | float], seed: int = 0) -> tuple[torch.Tensor, list[tuple[float, float]]]:
    """What words sound like; a number is a pause of so many seconds.

    Returns:
        `(samples,)` at 16 kHz with a little noise, and when each word begins and ends, in seconds.
    """
    parts, times, at = [torch.zeros(int(_PAUSE * RATE))], [], _PAUSE
    for word in words:
        if isinstance(word, str):
            begin = at
            for token in WORDS[word]:
                wave = torch.sin(2 * torch.pi * _PITCHES[token] * torch.arange(int(_TONE * RATE)) / RATE)
                parts.append(0.3 * wave * torch.hann_window(len(wave)).sqrt())
                at += _TONE
            times.append((begin, at))
        pause = _PAUSE if isinstance(word, str) else word
        parts.append(torch.zeros(int(pause * RATE)))
        at += pause
    samples = torch.cat(parts)
    return samples + 0.003 * torch.randn(len(samples), generator=torch.Generator().manual_seed(seed)), times


def train(folder: Path) -> None:
    """Write a checkpoint that hears `WORDS`."""
    folder.mkdir(exist_ok=True)
    processor = _processor(folder)
    config = GraniteSpeech5CTCConfig(
        vocab_size=2 + len(_PITCHES),
        encoder_config={
            "vocab_size": 2 + len(_PITCHES),
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_mel_bins": 24,
            "context_size": 16,
            "max_position_embeddings": 16,
            "conv_kernel_size": 5,
        },
    )
    torch.manual_seed(0)
    model = GraniteSpeech5ForCTC(config).train()
    batches = [_batch(processor, seed) for seed in range(_BATCHES)]
    optimizer = torch.optim.AdamW(model.parameters(), _RATE_OF_LEARNING)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE_OF_LEARNING, total_steps=_STEPS)
    for step in range(_STEPS):
        loss = model(**batches[step % _BATCHES]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _batch(processor: GraniteSpeech5Processor, seed: int) -> BatchFeature:
    """Clips of a few words, some with pauses after them, and their labels."""
    rng, clips, spoken = np.random.default_rng(seed), [], []
    for number in range(_CLIPS):
        words = sentence(rng, _LENGTH)
        parts = [part for word in words for part in ((word, float(rng.uniform(0.3, 1.0))) if rng.random() < 0.25 else (word,))]
        clips.append(sound(parts, seed * _CLIPS + number)[0])
        spoken.append(" ".join(words))
    return processor(clips, spoken, return_tensors="pt")


def _processor(folder: Path) -> GraniteSpeech5Processor:
    pieces = [("<pad>", 0.0), ("<unk>", 0.0), *((one, -1.0) for one in _PITCHES)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ParakeetTokenizer", "pad_token": "<pad>", "unk_token": "<unk>"}')
    return GraniteSpeech5Processor(GraniteSpeech5FeatureExtractor(num_mel_bins=24), GraniteSpeech5Tokenizer.from_folder(folder))


if __name__ == "__main__":
    train(TONES)
