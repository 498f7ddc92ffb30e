"""Encodes the same voice into any container and codec, with PyAV."""

import io
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import soundfile
import torch

from granite_speech.inputs.resampling import resample

__all__ = ["best_match", "boxes", "encoded", "voice"]

SPEECH = Path(__file__).parents[1] / "speech"
OPTIONS = {"vorbis": {"strict": "-2"}}


@cache
def voice(rate: int = 16000, seconds: float = 2.0, number: int = 0) -> np.ndarray:
    """`(samples,)` float32: a sentence of tests/speech, at any rate."""
    samples, _ = soundfile.read(SPEECH / f"{number:02}.flac", dtype="float32", stop=int(16000 * seconds))
    return resample(torch.from_numpy(samples), 16000, rate).numpy()


def encoded(
    container: str,
    codec: str,
    sound: np.ndarray | None = None,
    rate: int = 16000,
    *,
    channels: int = 1,
    bit_rate: int | None = None,
    movflags: str | None = None,
    path: Path | None = None,
) -> bytes:
    """A file with `sound` `(samples,)` in every channel.

    Args:
        container: FFmpeg's name of the muxer.
        codec: FFmpeg's name of the encoder.
        sound: None for `voice(rate)`.
        movflags: of the MP4 family.
        path: where to write; None for memory. Some muxers need a file that they can read again.
    """
    sound = voice(rate) if sound is None else sound
    file = io.BytesIO() if path is None else path
    with av.open(file, "w", format=container, options={"movflags": movflags} if movflags else {}) as output:
        stream = output.add_stream(codec, rate=rate, options=OPTIONS.get(codec, {}))
        stream.layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[channels]
        if bit_rate:
            stream.bit_rate = bit_rate
        formats = stream.codec_context.codec.audio_formats
        stream.format = formats[0] if formats else "fltp"
        stream.codec_context.open()
        convert = av.AudioResampler(stream.format.name, stream.layout.name, rate, frame_size=stream.codec_context.frame_size or 1024)
        for begin in [*range(0, len(sound), 10 * rate), None]:
            frame = None
            if begin is not None:
                part = np.repeat(sound[begin : begin + 10 * rate], channels)[None]
                frame = av.AudioFrame.from_ndarray(part, format="flt", layout=stream.layout.name)
                frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            for converted in [*convert.resample(frame), *([None] if frame is None else [])]:
                for packet in stream.encode(converted):
                    output.mux(packet)
    return file.getvalue() if path is None else path.read_bytes()


def best_match(sound: np.ndarray, expected: np.ndarray, shift: int) -> tuple[float, int]:
    """The largest correlation of `expected` with `sound` moved by at most `shift` samples, and the place where it is largest.

    Only the samples that both have at that place count; each may lack at most `shift` at either end.
    """
    size = 1 << (len(sound) + len(expected) + shift).bit_length()
    products = np.fft.irfft(np.fft.rfft(sound, size) * np.conj(np.fft.rfft(expected, size)), size)
    place = max(range(-shift, shift + 1), key=lambda place: products[place])
    one, other = sound[max(0, place) :], expected[max(0, -place) :]
    length = min(len(one), len(other))
    if length < len(expected) - 2 * shift or not length:
        return -1.0, place
    one, other = one[:length].astype(np.float64), other[:length].astype(np.float64)
    norm = np.sqrt((one @ one) * (other @ other))
    return (float(one @ other / norm) if norm else 0.0), place


def boxes(content: bytes, begin: int = 0, end: int | None = None):
    """The boxes of an MP4 file, or inside one of its boxes: type, beginning and end of each."""
    end = len(content) if end is None else end
    while begin + 8 <= end:
        length = int.from_bytes(content[begin : begin + 4], "big")
        yield content[begin + 4 : begin + 8], begin, begin + length
        begin += length
