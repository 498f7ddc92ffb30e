"""The earlier import path of `load_audio`. New code uses `from granite_speech import load_audio`."""

from granite_speech.inputs.audio import load_audio, resample

__all__ = ["load_audio", "resample"]
