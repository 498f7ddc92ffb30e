"""A model small enough to train within a test, with utterances that it can tell apart, since each word is a tone, and a trainer."""

import json
import wave
from functools import partial
from pathlib import Path

import torch

from granite_speech import GraniteSpeechConfig, GraniteSpeechFeatureExtractor, GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from granite_speech.modules.adapter import attach_adapter
from granite_speech.modules.adapter_config import AdapterConfig
from granite_speech.training import Dialogue, SpeechData, Trainer, TrainerOptions, parameter_groups, prepare, read_manifest, speech_loss
from tests.support.small_tokenizer import write_tokenizer

__all__ = ["PARTS", "TEXTS", "make_trainer", "write_manifest", "write_model", "write_sound"]

PARTS = ("encoder", "projector", "adapter", "language_model")
TEXTS = ("one two", "two one one", "three")
PITCHES = {"one": 500, "two": 1500, "three": 3200}


def write_model(folder: Path, *, adapter: bool = True, seed: int = 0, dropout: float = 0.0) -> GraniteSpeechForConditionalGeneration:
    """Write a complete checkpoint with about 80,000 parameters. Its adapter has rank 4 and changes nothing yet."""
    vocab_size, audio_token_index = write_tokenizer(folder)
    tokenizer = GraniteSpeechTokenizer.from_folder(folder)
    config = GraniteSpeechConfig(
        text_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocab_size,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 1 / 12,
            "residual_multiplier": 0.22,
            "logits_scaling": 2.0,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        encoder_config={
            "num_layers": 2,
            "hidden_dim": 32,
            "num_heads": 2,
            "output_dim": 128,
            "context_size": 20,
            "max_pos_emb": 20,
            "feedforward_mult": 2,
            "conv_kernel_size": 7,
            "dropout": dropout,
        },
        projector_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "encoder_hidden_size": 32,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        },
        audio_token_index=audio_token_index,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = GraniteSpeechForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08 if "embed_tokens" in name else 1.0 / parameter.shape[-1] ** 0.5)
    if adapter:
        layers = range(config.text_config.num_hidden_layers)
        modules = [f"language_model.model.layers.{layer}.self_attn.{name}" for layer in layers for name in ("q_proj", "v_proj")]
        model.adapter_config = AdapterConfig.plain(4, 8, ["q_proj", "v_proj"])
        attach_adapter(model, model.adapter_config, modules)
    model.save_pretrained(folder)
    extractor = GraniteSpeechFeatureExtractor(projector_window_size=config.window_size, projector_downsample_rate=config.downsample_rate)
    GraniteSpeechProcessor(extractor, tokenizer).save_pretrained(folder)
    return model.eval()


def write_sound(file: Path, text: str) -> Path:
    """Write a WAV in which each word is a tone of a quarter of a second, with a little noise."""
    time = torch.arange(4000) / 16000
    tones = [torch.sin(2 * torch.pi * PITCHES[word] * time) * torch.hann_window(4000) for word in text.split()]
    samples = 0.5 * torch.cat(tones)
    samples = samples + 0.005 * torch.randn(len(samples), generator=torch.Generator().manual_seed(len(text)))
    with wave.open(str(file), "wb") as stream:
        stream.setparams((1, 2, 16000, 0, "NONE", ""))
        stream.writeframes((samples * 32767).to(torch.int16).numpy().tobytes())
    return file


def write_manifest(folder: Path, texts: tuple[str, ...] = TEXTS, name: str = "train.jsonl") -> Path:
    """Write sound files and their manifest to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, text in enumerate(texts):
        sound = write_sound(folder / f"{name}-{number}.wav", text)
        lines.append(json.dumps({"audio": sound.name, "text": text}))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def _add_noise(waveform: torch.Tensor, generator: torch.Generator, epoch: int) -> torch.Tensor:
    return waveform + 0.01 * torch.randn(waveform.shape, generator=generator)


def make_trainer(
    folder: Path,
    output: Path | None = None,
    *,
    parts: tuple[str, ...] = PARTS,
    dtype: str = "float32",
    model: GraniteSpeechForConditionalGeneration | None = None,
    loss=None,
    identity: dict | None = None,
    seconds: float = 1.5,
    **options,
) -> Trainer:
    """Trains the model in folder/model on folder/train.jsonl, with everything that is random: order, augmentation, dropout."""
    model = model or GraniteSpeechForConditionalGeneration.from_pretrained(folder / "model", dtype=dtype)
    groups = parameter_groups(prepare(model, parts), 0.01)
    dialogue = Dialogue(GraniteSpeechProcessor.from_pretrained(folder / "model"), model.config)
    data = SpeechData(read_manifest(folder / "train.jsonl"), dialogue, batch_seconds=seconds, ctc=True, augment=_add_noise)
    loss = loss or partial(speech_loss, ctc_weight=0.5 if "encoder" in parts else 0.0)
    options = TrainerOptions(**{"steps": 6, "learning_rate": 3e-3, "checkpoint_every": 2, **options})
    return Trainer(model, loss, data, groups, options, folder=output, identity=identity, progress=False)
