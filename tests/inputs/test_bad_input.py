"""Bad input of every kind gives one clear error of this package, quickly, without allocating what a file claims.

Each case in the table has a name, a call on `good` (a model, its processor and the files of its checkpoint), the class of the
error and a part of its message.
"""

import io
import json
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from granite_speech import AutoModelForSpeechSeq2Seq, AutoProcessor, GraniteSpeechFeatureExtractor
from granite_speech.errors import (
    AudioError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    GraniteSpeechError,
    InputError,
    UnsupportedError,
)
from granite_speech.inputs.audio import load_audio, resample
from granite_speech.inputs.chat_template import render_chat_template
from granite_speech.transcription.transcriber import Transcriber
from tests.support.random_checkpoint import write_checkpoint
from tests.support.sound_headers import au_header, rf64_header, wav_header

SECONDS = 1.0
MEGABYTES = 200
PROMPT = "<|audio|>what?"
CHAT = [{"role": "user", "content": "hello"}]


def memory(line: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    return next(int(one.split()[1]) * 1024 for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(line))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> SimpleNamespace:
    """Valid objects and files. Each path runs once, so that imports and lasting allocations come before memory is measured."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    transcriber = Transcriber.from_pretrained(folder, device="cpu")
    noise = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    transcriber.transcribe(noise, max_new_tokens=2)
    resample(noise, 44100)
    good = SimpleNamespace(
        folder=folder, transcriber=transcriber, model=transcriber.model, processor=transcriber.processor, noise=noise, sounds={}
    )
    good.extractor = good.processor.audio_processor
    good.inputs = dict(good.processor(PROMPT, noise))
    for kind in ("wav", "flac", "mp3", "ogg"):
        file = folder.parent / f"{folder.name}-sound.{kind}"
        soundfile.write(file, noise.repeat(4).numpy(), 16000)
        assert load_audio(file).shape[0] > 60000
        good.sounds[kind] = file.read_bytes()
    with suppress(OSError):  # if this is forbidden, an earlier peak of this process hides smaller ones
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    good.memory_before = memory("VmHWM")
    return good


# --- how a case is built --------------------------------------------------------------------------------------------------------------


def in_file(name: str, content: bytes | Callable[[Any], bytes]) -> Callable:
    """load_audio on a file of that content."""

    def act(good, tmp_path):
        (tmp_path / name).write_bytes(content(good) if callable(content) else content)
        return load_audio(tmp_path / name)

    return act


def with_file(load: Callable, name: str, content: bytes | str | dict | Callable[[bytes], bytes] | None) -> Callable:
    """`load` on a copy of the checkpoint with one file changed or removed."""

    def act(good, tmp_path):
        for file in good.folder.iterdir():
            shutil.copy(file, tmp_path)
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
        value = content(before) if callable(content) else content
        if isinstance(value, dict):
            value = json.dumps(json.loads(before) | value)
        if value is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(value.encode() if isinstance(value, str) else value)
        return load(tmp_path)

    return act


def processor_with(name: str, content) -> Callable:
    return with_file(AutoProcessor.from_pretrained, name, content)


def model_with(name: str, content) -> Callable:
    return with_file(AutoModelForSpeechSeq2Seq.from_pretrained, name, content)


def config_with(part: str, **values) -> Callable:
    return model_with("config.json", lambda before: {part: json.loads(before)[part] | values})


def extract(audio, **options) -> Callable:
    return lambda good, tmp_path: good.extractor(audio, **options)


def process(text, audio=None, **options) -> Callable:
    return lambda good, tmp_path: good.processor(text, good.noise if audio is None else audio, **options)


def render(template: str, chat=CHAT, **options) -> Callable:
    return lambda good, tmp_path: good.processor.apply_chat_template(chat, chat_template=template, **options)


def forward(**changes) -> Callable:
    return lambda good, tmp_path: good.model(**good.inputs | {k: v(good) if callable(v) else v for k, v in changes.items()})


def generate(**changes) -> Callable:
    changes = {"max_new_tokens": 2} | changes
    return lambda good, tmp_path: good.model.generate(**good.inputs | {k: v(good) if callable(v) else v for k, v in changes.items()})


def transcribe(audio, **options) -> Callable:
    return lambda good, tmp_path: good.transcriber.transcribe(audio, **options)


def half(kind: str) -> Callable[[Any], bytes]:
    return lambda good: good.sounds[kind][: len(good.sounds[kind]) // 2]


def noisy(kind: str) -> Callable[[Any], bytes]:
    """The file's first bytes, which identify the format, then noise."""
    return lambda good: good.sounds[kind][:4] + np.random.default_rng(0).bytes(5000)


def closed_file():
    file = io.BytesIO(b"RIFF")
    file.close()
    return file


def ids(*values) -> torch.Tensor:
    return torch.tensor([values])


SOUND = torch.zeros(1000)
NAN = torch.tensor([0.0, torch.nan, 0.0])

CASES: dict[str, tuple[Callable, type[GraniteSpeechError], str]] = {
    # the feature extractor
    "no samples": (extract(np.zeros(0)), AudioError, "no samples"),
    "clips without samples": (extract(torch.zeros(3, 0)), AudioError, "no samples"),
    "a batch of no clips": (extract(torch.zeros(0, 100)), AudioError, "no clips"),
    "an empty list": (extract([]), AudioError, "no clips"),
    "NaN": (extract(NAN), AudioError, "NaN"),
    "infinity": (extract(np.array([0.0, np.inf])), AudioError, "infinite"),
    "minus infinity": (extract([SOUND, torch.tensor([-torch.inf])]), AudioError, "clip 1 has NaN or infinite"),
    "a float64 beyond float32": (extract(np.array([1e300])), AudioError, "infinite"),
    "a sample too large": (extract(torch.tensor([1e20])), AudioError, "1e\\+20"),
    "complex samples": (extract(torch.zeros(9, dtype=torch.complex64)), AudioError, "complex64"),
    "int32 samples": (extract(np.zeros(9, dtype=np.int32)), AudioError, "int32"),
    "bool samples": (extract(torch.zeros(9, dtype=torch.bool)), AudioError, "bool"),
    "samples that are text": (extract(np.array(["a", "b"])), AudioError, "<U1"),
    "samples that are objects": (extract(np.array([None, 1.0])), AudioError, "object"),
    "rank 0": (extract(torch.tensor(0.5)), AudioError, r"shape \(\)"),
    "rank 3": (extract(np.zeros((1, 1, 9))), AudioError, r"shape \(1, 1, 9\)"),
    "two channels in a list": (extract([torch.zeros(2, 9)]), AudioError, r"shape \(2, 9\)"),
    "a list of numbers": (extract([0.1, 0.2]), AudioError, "float"),
    "a path for samples": (extract("speech.wav"), InputError, "str"),
    "bytes for samples": (extract(b"RIFF"), InputError, "bytes"),
    "None for samples": (extract(None), InputError, "NoneType"),
    "samples of no device": (extract(torch.zeros(9, device="meta")), AudioError, "meta"),
    "sparse samples": (extract(torch.zeros(9).to_sparse()), AudioError, "sparse"),
    "a device that does not exist": (extract(SOUND, device="abacus"), InputError, "abacus"),
    "an FFT of 10**12": (lambda good, tmp_path: GraniteSpeechFeatureExtractor(n_fft=10**12), ConfigError, "n_fft"),
    "10**9 mel bands": (lambda good, tmp_path: GraniteSpeechFeatureExtractor(n_mels=10**9), ConfigError, "n_mels"),
    "a hop of 0": (lambda good, tmp_path: GraniteSpeechFeatureExtractor(hop_length=0), ConfigError, "hop_length"),
    "a spectrogram of another kind": (
        lambda good, tmp_path: GraniteSpeechFeatureExtractor(melspec_kwargs={"power": 1.0}),
        UnsupportedError,
        "power",
    ),
    "melspec_kwargs that are a list": (lambda good, tmp_path: GraniteSpeechFeatureExtractor(melspec_kwargs=[1]), ConfigError, "melspec"),
    # the processor
    "audio without a placeholder": (process("what?"), InputError, "0 placeholder"),
    "a placeholder without audio": (lambda good, tmp_path: good.processor(PROMPT), InputError, "0 clip"),
    "two clips for one placeholder": (process(PROMPT, [SOUND, SOUND]), InputError, "2 clip"),
    "one clip for two placeholders": (process(PROMPT * 2), InputError, "2 placeholder"),
    "nine channels": (process(PROMPT, torch.zeros(1000, 9)), AudioError, r"shape \(1000, 9\)"),
    "three rows for two placeholders": (process(PROMPT * 2, torch.zeros(3, 1000)), AudioError, r"shape \(3, 1000\)"),
    "two channels for two placeholders": (process(PROMPT * 2, torch.zeros(1000, 2)), AudioError, r"shape \(1000, 2\)"),
    "clips with channels in one array": (process(PROMPT * 2, torch.zeros(2, 2, 1000)), AudioError, r"shape \(2, 2, 1000\)"),
    "a hundred thousand clips of two samples": (process(PROMPT, torch.zeros(10**5, 9)), AudioError, r"shape \(100000, 9\)"),
    "a clip too short for a token": (process(PROMPT, torch.zeros(159)), AudioError, "159 samples"),
    "a clip too short for a token, at another rate": (process(PROMPT, torch.zeros(1), sampling_rate=48000), AudioError, "1 samples"),
    "no text": (process(None), InputError, "NoneType"),
    "text in bytes": (process(PROMPT.encode()), InputError, "bytes"),
    "texts that are numbers": (process([1, 2]), InputError, "text of type"),
    "an empty list of texts": (lambda good, tmp_path: good.processor([]), InputError, "text of type"),
    "text that is not Unicode": (process(PROMPT + "\ud800"), InputError, "surrogate|Unicode"),
    "tensors of another library": (process(PROMPT, return_tensors="tf"), InputError, "tf"),
    "padding of another kind": (process(PROMPT, padding="most"), InputError, "most"),
    "an unknown option": (process(PROMPT, colour=True), InputError, "colour"),
    "truncation of audio tokens": (process(PROMPT, max_length=2, truncation=True), InputError, "truncation"),
    "an address for a clip": (process(PROMPT, "https://example.org/a.wav"), InputError, "network address"),
    "words for a clip": (process(PROMPT, ["no file"]), AudioError, "does not exist"),
    "a clip of words and numbers": (process(PROMPT, [0.1, "a"]), AudioError, "numbers"),
    "an address without data": (process(PROMPT, "data:audio/wav,abc"), AudioError, "base64"),
    "an entry without audio": (process(PROMPT, {"text": "a"}), InputError, "'text'"),
    "an entry with a rate in words": (process(PROMPT, {"array": SOUND, "sampling_rate": "fast"}), AudioError, "'fast'"),
    "control tokens as text": (render("{{ messages }}", sanitize_control_tokens=True), UnsupportedError, "sanitize_control_tokens"),
    "an image": (process(PROMPT, images=[1]), UnsupportedError, "images"),
    "a rate of 0": (process(PROMPT, sampling_rate=0), AudioError, "rate of 0"),
    "a rate that is not a number": (process(PROMPT, sampling_rate=float("nan")), AudioError, "nan"),
    "a rate in words": (process(PROMPT, sampling_rate="16000"), AudioError, "'16000'"),
    "NaN at another rate": (process(PROMPT, NAN, sampling_rate=44100), AudioError, "NaN"),
    "ids below 0": (lambda good, tmp_path: good.processor.decode([3, -100]), InputError, "-100"),
    "ids that are text": (lambda good, tmp_path: good.processor.decode("abc"), InputError, "abc|str"),
    "an id beyond 64 bits": (lambda good, tmp_path: good.processor.decode([2**70]), InputError, str(2**70)),
    # sound files
    "a missing file": (lambda good, tmp_path: load_audio(tmp_path / "a.wav"), AudioError, "does not exist"),
    "a folder for a file": (lambda good, tmp_path: load_audio(tmp_path), AudioError, "a folder"),
    "a name with a zero byte": (lambda good, tmp_path: load_audio("a\0b.wav"), AudioError, "does not exist"),
    "a number for a file": (lambda good, tmp_path: load_audio(5), AudioError, "int"),
    "None for a file": (lambda good, tmp_path: load_audio(None), AudioError, "NoneType"),
    "a file opened as text": (lambda good, tmp_path: load_audio(io.StringIO("RIFF")), AudioError, "as text"),
    "a closed file": (lambda good, tmp_path: load_audio(closed_file()), AudioError, "closed"),
    "a requested rate of 0": (lambda good, tmp_path: load_audio(io.BytesIO(good.sounds["wav"]), 0), AudioError, "rate of 0"),
    "an empty file": (in_file("a.wav", b""), AudioError, "does not decode"),
    "words in a wav": (in_file("a.wav", b"this is no sound" * 99), AudioError, "does not decode"),
    "a raw file": (in_file("a.raw", b"\0" * 999), AudioError, "does not decode"),
    **{
        f"half a {kind}": (in_file(f"a.{kind}", half(kind)), AudioError, "cut off|does not decode")
        for kind in ("wav", "flac", "mp3", "ogg")
    },
    **{
        f"a corrupt {kind}": (in_file(f"a.{kind}", noisy(kind)), AudioError, "decode|cut off|samples|rate")
        for kind in ("wav", "flac", "ogg")
    },
    "a corrupt mp3": (in_file("a.mp3", np.random.default_rng(0).bytes(5000)), AudioError, "does not decode"),
    "a wav without samples": (in_file("a.wav", wav_header(data=b"")), AudioError, "no samples"),
    "a wav of NaN": (in_file("a.wav", wav_header(bits=32, data=struct.pack("<f", float("nan")) * 9)), AudioError, "NaN"),
    "a wav at 0 Hz": (in_file("a.wav", wav_header(rate=0)), AudioError, "rate|decode"),
    "a wav at 2**31 Hz": (in_file("a.wav", wav_header(rate=2**31 - 1)), AudioError, "rate|decode"),
    "a wav of 65535 channels": (in_file("a.wav", wav_header(channels=65535)), AudioError, "decode|samples"),
    "a header of 10**6 channels": (in_file("a.au", au_header(channels=10**6)), AudioError, "decode|samples"),
    "a header of 2 GB": (in_file("a.wav", wav_header(claimed=2**31 - 100000)), AudioError, "cut off"),
    "a header of 10**12 frames": (in_file("a.wav", rf64_header(10**12)), AudioError, "cut off"),
    # the processor's files
    "no such folder": (
        lambda good, tmp_path: AutoProcessor.from_pretrained(tmp_path / "x"),
        CheckpointNotFoundError,
        "not an existing folder",
    ),
    "no name": (lambda good, tmp_path: AutoProcessor.from_pretrained(""), CheckpointNotFoundError, "''"),
    "an option that does not exist": (
        lambda good, tmp_path: AutoProcessor.from_pretrained(tmp_path, colour=True),
        InputError,
        "colour",
    ),
    "no tokenizer.json": (processor_with("tokenizer.json", None), CheckpointNotFoundError, "tokenizer.json"),
    "half a tokenizer.json": (processor_with("tokenizer.json", lambda all: all[: len(all) // 2]), CheckpointError, "tokenizer.json"),
    "a tokenizer.json of another kind": (processor_with("tokenizer.json", "[]"), CheckpointError, "tokenizer.json"),
    "half a tokenizer_config.json": (processor_with("tokenizer_config.json", lambda all: all[:99]), CheckpointError, "not parse"),
    "a list for tokenizer_config.json": (processor_with("tokenizer_config.json", "[1]"), CheckpointError, "a list"),
    "JSON ten thousand deep": (processor_with("tokenizer_config.json", "[" * 10**4 + "]" * 10**4), CheckpointError, "not parse"),
    "padding upwards": (processor_with("tokenizer_config.json", {"padding_side": "up"}), CheckpointError, "'up'"),
    "added tokens that are numbers": (
        processor_with("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}),
        CheckpointError,
        "added_tokens_decoder",
    ),
    "templates without names": (
        lambda good, tmp_path: with_file(AutoProcessor.from_pretrained, "tokenizer_config.json", {"chat_template": [{"a": 1}]})(
            SimpleNamespace(folder=_without_template(good, tmp_path)), tmp_path
        ),
        CheckpointError,
        "chat_template",
    ),
    "a template that is not UTF-8": (processor_with("chat_template.jinja", b"\xff\xfe\xff"), CheckpointError, "chat_template.jinja"),
    "half a processor_config.json": (processor_with("processor_config.json", lambda all: all[:50]), CheckpointError, "not parse"),
    "a number for an audio_processor": (
        processor_with("processor_config.json", {"audio_processor": 5}),
        CheckpointError,
        "audio_processor",
    ),
    "10**9 mel bands in a file": (
        processor_with("processor_config.json", {"audio_processor": {"n_mels": 10**9}}),
        ConfigError,
        "n_mels",
    ),
    "another model's extractor": (
        processor_with("processor_config.json", {"audio_processor": {"feature_extractor_type": "WhisperFeatureExtractor"}}),
        UnsupportedError,
        "Whisper",
    ),
    "an audio token that is a number": (processor_with("processor_config.json", {"audio_token": 7}), CheckpointError, "audio_token"),
    # the model's files
    "no config.json": (model_with("config.json", None), CheckpointNotFoundError, "config.json"),
    "half a config.json": (model_with("config.json", lambda all: all[: len(all) // 2]), CheckpointError, "not parse"),
    "another model": (model_with("config.json", {"model_type": "whisper"}), UnsupportedError, "whisper"),
    "no model_type": (model_with("config.json", {"model_type": None}), ConfigError, "model_type"),
    "10**9 layers": (config_with("encoder_config", num_layers=10**9), ConfigError, "num_layers"),
    "a width of 10**12": (config_with("text_config", hidden_size=10**12), ConfigError, "hidden_size"),
    "a vocabulary larger than the file's": (config_with("text_config", vocab_size=10**7), CheckpointError, "embed_tokens"),
    "no weights": (model_with("model.safetensors", None), CheckpointNotFoundError, "weights|safetensors"),
    "empty weights": (model_with("model.safetensors", b""), CheckpointError, "model.safetensors"),
    "half the weights": (model_with("model.safetensors", lambda all: all[: len(all) // 2]), CheckpointError, "model.safetensors"),
    "a header of 10**12 bytes": (
        model_with("model.safetensors", lambda all: struct.pack("<Q", 10**12) + all[8:]),
        CheckpointError,
        "model.safetensors",
    ),
    "a header that is not JSON": (
        model_with("model.safetensors", lambda all: all[:8] + b"x" + all[9:]),
        CheckpointError,
        "model.safetensors",
    ),
    "half an adapter": (model_with("adapter_config.json", None), CheckpointError, "adapter"),
    "half an adapter's weights": (model_with("adapter_model.safetensors", lambda all: all[:99]), CheckpointError, "adapter_model"),
    "weights of a dtype that is not supported": (
        lambda good, tmp_path: AutoModelForSpeechSeq2Seq.from_pretrained(good.folder, dtype="int8"),
        InputError,
        "int8",
    ),
    "weights on a device that does not exist": (
        lambda good, tmp_path: AutoModelForSpeechSeq2Seq.from_pretrained(good.folder, device_map="abacus"),
        InputError,
        "abacus",
    ),
    # the chat template
    "no messages": (render("x", []), InputError, "no messages"),
    "messages that are text": (render("{{ messages[0].role.x.y }}", "hello"), InputError, "messages|str"),
    "one message for many": (render("x", CHAT[0]), InputError, "dict|messages"),
    "a role the template refuses": (render(None, [{"role": "king", "content": "x"}]), InputError, "unknown role king"),
    "contents that do not fit": (render(None, [{"role": "user", "content": 5}]), InputError, "failed"),
    "a template that is wrong": (render("{% for %}"), InputError, "failed"),
    "a template that reaches for Python": (render("{{ ''.__class__.__mro__[1].__subclasses__() }}"), InputError, "failed"),
    "10**9 characters, one by one": (render("{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}"), InputError, "wrote more"),
    "10**9 characters, by *": (render("{{ 'x' * 10**9 }}"), InputError, "size"),
    "10**9 characters, by a filter": (render("{{ 'x' | center(10**9) }}"), InputError, "failed"),
    "10**9 characters, by indent": (render("{{ 'x\ny' | indent(10**9) }}"), InputError, "failed"),
    "10**9 characters, by a method": (render("{{ 'x'.ljust(10**9) }}"), InputError, "failed"),
    "10**9 characters, by format": (render("{{ '{:>1000000000}'.format(1) }}"), InputError, "failed"),
    "10**9 characters, by %": (render("{{ '%1000000000d' % 1 }}"), InputError, "failed"),
    "2**30 characters, by ~": (
        render("{% set n = namespace(s='x') %}{% for i in range(30) %}{% set n.s = n.s ~ n.s %}{% endfor %}"),
        InputError,
        "failed",
    ),
    "2**30 characters, by +": (
        render("{% set n = namespace(s='x') %}{% for i in range(30) %}{% set n.s = n.s + n.s %}{% endfor %}"),
        InputError,
        "failed",
    ),
    "10**9 characters, by join": (render("{{ (['x' * 10**6] * 1000) | map('upper') | join }}"), InputError, "failed"),
    "10**9 characters, by a method join": (render("{{ ''.join((['x' * 10**6] * 1000) | map('string')) }}"), InputError, "failed"),
    "10**9 characters, by replace": (render("{{ ('x' * 10**5).replace('x', 'y' * 10**4) }}"), InputError, "failed"),
    "10**9 numbers in a range": (render("{{ range(10**9) | list | length }}"), InputError, "failed"),
    "a number of 10**9 digits": (render("{{ 10 ** 1000000000 }}"), InputError, "size"),
    "a tool that is a function": (render("x", tools=[print]), InputError, "a tool"),
    "a message to continue": (render("x", continue_final_message=True), InputError, "continue_final_message"),
    # forward
    "ids that are floats": (forward(input_ids=torch.zeros(1, 3)), InputError, "float32"),
    "ids of rank 1": (forward(input_ids=torch.zeros(3, dtype=torch.int64)), InputError, r"\(3,\)"),
    "no ids": (forward(input_ids=None), InputError, "neither"),
    "an id beyond the vocabulary": (forward(input_ids=ids(1, 10**6), attention_mask=None, input_features=None), InputError, "1000000"),
    "an id below 0": (forward(input_ids=ids(1, -5), attention_mask=None, input_features=None), InputError, "-5"),
    "audio vectors without placeholders": (forward(input_ids=ids(1, 2), attention_mask=None), InputError, "0 audio tokens"),
    "placeholders without audio": (forward(input_features=None), InputError, "0 audio vectors"),
    "features of rank 2": (forward(input_features=torch.zeros(50, 160)), InputError, r"\(50, 160\)"),
    "features of another width": (forward(input_features=torch.zeros(1, 50, 80)), InputError, "80 features"),
    "features in a list": (forward(input_features=[[0.0]]), InputError, "list"),
    "lengths of two clips for one": (forward(input_features_lengths=[50, 50]), InputError, r"\[50, 50\]"),
    "a length beyond the features": (forward(input_features_lengths=[10**12]), InputError, "1000000000000"),
    "a features' mask of another shape": (forward(input_features_mask=torch.ones(1, 3)), InputError, r"\(1, 3\)"),
    "a mask of another shape": (forward(attention_mask=torch.ones(1, 3)), InputError, r"\(1, 3\)"),
    "positions of another shape": (forward(position_ids=torch.ones(1, 3, dtype=torch.int64)), InputError, r"\(1, 3\)"),
    "a cache of another library": (forward(past_key_values=((),)), InputError, "tuple"),
    "labels of another shape": (forward(labels=torch.zeros(1, 3, dtype=torch.int64)), InputError, r"\(1, 3\)"),
    "an unknown argument": (forward(audio=1), InputError, "audio"),
    # generate
    "no beams": (generate(num_beams=0), InputError, "num_beams"),
    "a negative number of tokens": (generate(max_new_tokens=-1), InputError, "-1"),
    "tokens in words": (generate(max_new_tokens="5"), InputError, "'5'"),
    "a length shorter than the prompt": (generate(max_new_tokens=None, max_length=3), InputError, "max_length=3"),
    "an end that is a word": (generate(eos_token_id="end"), InputError, "end"),
    "padding on the right": (
        generate(attention_mask=lambda good: good.inputs["attention_mask"].clone().index_fill_(1, torch.tensor([-1]), 0)),
        InputError,
        "on the right",
    ),
    "a prompt in a list": (generate(input_ids=[[1, 2]]), InputError, "list"),
    # transcribe
    "a missing recording": (transcribe("nowhere.wav"), AudioError, "nowhere.wav"),
    "a recording of NaN": (transcribe(NAN), AudioError, "NaN"),
    "a recording without samples": (transcribe(torch.zeros(0)), AudioError, "no samples"),
    "a recording that is a number": (transcribe(5), AudioError, "int"),
    "two recordings, one of them missing": (transcribe([SOUND, "nowhere.wav"]), AudioError, r"recording 1 \('nowhere.wav'\)"),
    "numbers and a file": (transcribe([0.1, "nowhere.wav"]), AudioError, "recording 0: a float"),
    "whole numbers": (transcribe([1, 2]), AudioError, "int64"),
    "two recordings in a list of recordings": (transcribe([[SOUND, SOUND]]), AudioError, "recording 0: a list of 2 recordings"),
    "a recording too short for a token": (transcribe(torch.zeros(159)), AudioError, "159 samples"),
    "a file too short for a token": (transcribe(io.BytesIO(wav_header(data=b"\1\2" * 159))), AudioError, "159 samples"),
    "bytes without sound": (transcribe(b"RIFF"), AudioError, "does not decode"),
    "a prompt with two placeholders": (transcribe(SOUND, prompt=PROMPT * 2), InputError, "occurs 2 times"),
    "a negative max_new_tokens": (transcribe(SOUND, max_new_tokens=-1), InputError, "-1"),
}


def _without_template(good, tmp_path: Path) -> Path:
    folder = tmp_path / "without template"
    shutil.copytree(good.folder, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize("name", CASES)
def test_bad_input(good, tmp_path, name):
    act, kind, said = CASES[name]
    started = time.process_time()  # not wall-clock time: the machine may be busy
    with pytest.raises(kind, match=said) as caught:
        act(good, tmp_path)
    seconds = time.process_time() - started
    error = caught.value
    assert isinstance(error, GraniteSpeechError)
    assert all((error.got, error.expected, error.remedy)) and str(error) == f"{error.got}; expected {error.expected}. {error.remedy}."
    assert len(str(error)) < 1500, "an error quotes only a part of a long value"
    assert seconds < SECONDS
    assert memory("VmHWM") - good.memory_before < MEGABYTES * 1e6


GOOD: dict[str, Callable] = {
    "one hop": extract(torch.zeros(160)),
    "one hop at another rate": process(PROMPT, torch.zeros(480), sampling_rate=48000),
    "silence": extract(np.zeros(16000)),
    "one hop transcribed": transcribe(torch.zeros(160), max_new_tokens=1),
    "two channels": process(PROMPT, torch.zeros(2, 1000)),
    "a recording in bytes": lambda good, tmp_path: good.transcriber.transcribe(good.sounds["mp3"], max_new_tokens=1),
    "two recordings transcribed": transcribe([SOUND, SOUND], max_new_tokens=1),
    "numbers": transcribe([0.1] * 16_000, max_new_tokens=1),
    "no new tokens": transcribe(SOUND, max_new_tokens=0),
    "a wav of one sample": in_file("a.wav", wav_header()),
    "a whole ogg in memory": lambda good, tmp_path: load_audio(io.BytesIO(good.sounds["ogg"])),
    "an RF64 with its length": in_file("a.wav", rf64_header(100)),
    "a wav of an unknown length": in_file("a.wav", wav_header(data=b"\1\2" * 99, claimed=2**32 - 1)),
}


@pytest.mark.parametrize("name", GOOD)
def test_unusual_but_valid_input(good, tmp_path, name):
    assert GOOD[name](good, tmp_path) is not None


BUILDING = """
{%- set n = namespace(s='a') %}{% set n.s = n.s ~ 1 ~ none + '' if false else n.s ~ 1 ~ none %}{{ n.s + 'b' * 3 }}
{{- '%s-%5d|' % ('x', 7) }}{{ '{:>4}{}'.format(1, 'y') }}{{ 'a,b'.replace(',', ';').center(9).split(';') | join('+') }}
{{- ['p', 2] | join }}{{ 'u\nv' | indent(2) }}{{ 'k' | center(5) | replace('k', 'kk') }}{{ '-'.join(['c', 'd']) }}{{ '%d' | format(4) }}
{%- set block %}{{ n.s }}{{ messages | length }}{% endset %}{{ block ~ [1] + [2] if false else block }}{{ 7 % 4 + 2 ** 3 * 1.5 }}
{{- 'on 20250409, %s' % 'x' ~ '{} of 99999999: {:.2f}'.format(1, 2.5) ~ '%(a)3s' % {'a': 1} }}
{%- for row in range(5) | batch(2, 0) %}{{ row }}{% endfor %}{{ 'word wrap' | wordwrap(5) }}{{ 'z'.zfill(3) }}{{ 'a\tb'.expandtabs(2) }}
"""


def test_templates_within_bounds_render_as_in_jinja():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(BUILDING).render(messages=CHAT)
    assert render_chat_template(BUILDING, messages=CHAT) == plain and len(plain) > 80
