"""Several channels: the layouts that are accepted, and how they become one channel."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from granite_speech.errors import AudioError, InputError
from granite_speech.inputs.audio import load_audio, read_blocks
from granite_speech.inputs.channels import mix
from granite_speech.inputs.features import GraniteSpeechFeatureExtractor
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.transcription.transcriber import Transcriber

FILES = Path(__file__).parents[1] / "audio_files"
PROMPT = "<|audio|>what?"
WORDS = "nine one five seven"


def voice(samples: int = 8000, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def transcriber():
    return Transcriber.from_pretrained("embedded", device="cpu")


@pytest.fixture(scope="module")
def processor(transcriber) -> GraniteSpeechProcessor:
    return transcriber.processor


# --- layouts -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
@pytest.mark.parametrize("form", ["numpy", "torch", "int16", "list"])
def test_channels_come_first_or_last(processor, channels, form):
    clip = torch.stack([voice(seed=seed) for seed in range(channels)]).mul(32768).round().div(32768)
    expected = processor(PROMPT, clip.mean(0))
    make = {
        "numpy": lambda clip: clip.numpy(),
        "torch": lambda clip: clip,
        "int16": lambda clip: (clip * 32768).to(torch.int16),
        "list": lambda clip: [clip.numpy()],
    }[form]
    for layout in (clip, clip.T):
        batch = processor(PROMPT, make(layout))
        assert batch.input_ids.tolist() == expected.input_ids.tolist()
        torch.testing.assert_close(batch.input_features, expected.input_features, rtol=0, atol=1e-5)


def test_rows_are_clips_if_there_are_as_many_placeholders(processor):
    clips = torch.stack([voice(seed=1), voice(seed=2)])
    batch = processor([PROMPT, PROMPT], clips)
    for row, clip in zip(batch.input_features, clips, strict=True):
        torch.testing.assert_close(row, processor(PROMPT, clip).input_features[0], rtol=0, atol=1e-6)
    one = processor(PROMPT, clips)
    torch.testing.assert_close(one.input_features, processor(PROMPT, clips.mean(0)).input_features, rtol=0, atol=1e-5)
    many = torch.stack([voice(seed=seed) for seed in range(9)])
    assert processor(PROMPT * 9, many).input_features.shape[0] == 9


def test_a_list_may_mix_layouts(processor):
    clips = [voice(seed=1), torch.stack([voice(900, 2), voice(900, 3)], dim=1).numpy(), voice(700, 4)[None]]
    batch = processor(PROMPT * 3, clips)
    assert batch.input_features_lengths.tolist() == [25, 3, 2]
    alone = processor(PROMPT, clips[1].mean(1)).input_features[0]
    torch.testing.assert_close(batch.input_features[1, :3], alone, rtol=0, atol=1e-5)


def test_channels_at_another_rate(processor):
    clip = torch.stack([voice(24000, 1), voice(24000, 2)], dim=1)
    expected = processor(PROMPT, clip.mean(1), sampling_rate=48000)
    torch.testing.assert_close(processor(PROMPT, clip, sampling_rate=48000).input_features, expected.input_features, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("placeholders", "audio"),
    [
        (1, np.zeros((1000, 9), np.float32)),
        (1, np.zeros((9, 1000), np.float32)),
        (2, np.zeros((1000, 2), np.float32)),
        (3, np.zeros((2, 1000), np.float32)),
        (0, np.zeros((2, 1000), np.float32)),
        (1, np.zeros((1, 2, 1000), np.float32)),
        (1, np.zeros((0, 1000), np.float32)),
        (1, np.float32(0.5)[None][0:1].reshape(())),
        (2, [np.zeros(1000, np.float32)]),
        (1, [np.zeros((1000, 9), np.float32)]),
        (2, [np.zeros(1000, np.float32), np.zeros((12, 1000), np.float32)]),
    ],
)
def test_other_layouts_are_refused_before_anything_is_computed(processor, monkeypatch, placeholders, audio):
    for work in ("extract_packed", "__call__"):
        monkeypatch.setattr(GraniteSpeechFeatureExtractor, work, lambda *_, **__: pytest.fail("features were computed"))
    monkeypatch.setattr("granite_speech.inputs.clips._as_float32", lambda *_: pytest.fail("samples were converted"))
    with pytest.raises(AudioError) as caught:
        processor(PROMPT * placeholders or "no placeholder", audio)
    for part in (f"{placeholders} placeholder(s)", "(clips, samples)", "(samples, channels)", "(channels, samples)"):
        assert part in str(caught.value)


def test_values_that_are_not_audio_are_input_errors(processor):
    for audio, words in (("speech.wav", "does not exist"), (b"RIFF", "does not decode"), ({"array": 1}, "a int"), (5, "audio of type int")):
        with pytest.raises(InputError, match=words):
            processor(PROMPT, audio)


# --- one channel of several --------------------------------------------------------------------------------------------------------


def test_channels_that_do_not_cancel_are_averaged():
    one, other = voice(seed=1), voice(seed=2)
    for channels in ([one, one], [one, other], [one, 0 * one], [one, -0.3 * one], [one, one, -one], [one, *[0 * one] * 7]):
        clip = torch.stack(channels)
        assert torch.equal(mix(clip), clip.mean(0))
    assert torch.equal(mix(torch.zeros(2, 100)), torch.zeros(100))


@pytest.mark.parametrize("louder", [0, 1])
def test_the_louder_of_channels_that_cancel_is_used(louder):
    one = voice(seed=1)
    pair = [one, -0.9 * one] if louder == 0 else [-0.9 * one, one]
    assert torch.equal(mix(torch.stack(pair)), one)
    noisy = torch.stack(pair) + 0.02 * torch.stack([voice(seed=3), voice(seed=4)])
    assert torch.equal(mix(noisy), noisy[louder])
    offset = torch.stack(pair) + 0.5
    assert torch.equal(mix(offset), offset[louder]), "a constant offset is not sound"


def stereo_file(channels: list[torch.Tensor], rate: int = 16000) -> io.BytesIO:
    file = io.BytesIO()
    soundfile.write(file, torch.stack(channels, dim=1).numpy(), rate, format="WAV", subtype="FLOAT")
    return file


@pytest.mark.parametrize("rate", [16000, 44100])
def test_whether_channels_cancel_is_decided_for_the_whole_file(rate):
    """The voice, inverted in one channel, begins after a long silence, so the first block alone does not show it."""
    one = torch.cat([torch.zeros(20 * rate), voice(10 * rate)])
    file = stereo_file([0.9 * one, -one], rate)
    expected = load_audio(stereo_file([-one], rate))
    torch.testing.assert_close(load_audio(file), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat(list(read_blocks(file, block_seconds=1))), expected, rtol=0, atol=1e-6)
    # Loud and equal in both channels first: the mean keeps most of the energy, so it is used.
    mixed = stereo_file([torch.cat([one.flip(0), one]), torch.cat([one.flip(0), -0.1 * one])], rate)
    samples, _ = soundfile.read(io.BytesIO(mixed.getvalue()), dtype="float32")
    mean = load_audio(stereo_file([torch.from_numpy(samples.mean(1))], rate))
    torch.testing.assert_close(load_audio(mixed), mean, rtol=0, atol=1e-6)


def test_inverted_channels_keep_their_words(transcriber):
    path = FILES / "opposite_polarity.wav"
    assert transcriber.transcribe(path) == WORDS
    array, rate = soundfile.read(path, dtype="float32")
    assert transcriber.transcribe(array) == transcriber.transcribe(torch.from_numpy(array.T.copy())) == WORDS
    assert transcriber.transcribe(path.read_bytes()) == transcriber.transcribe(array[:, 0], sampling_rate=rate) == WORDS


def test_arrays_at_another_rate(transcriber):
    array, rate = soundfile.read(FILES / "header_never_filled.wav", samplerate=8000, channels=1, subtype="PCM_16", format="RAW", start=22)
    assert transcriber.transcribe(array, sampling_rate=rate) == WORDS
