"""The earlier import path of `load_audio`. New code uses `from granite_speech import load_audio`."""

from granite_speech.inputs.audio import AudioWarning, load_audio, read_blocks, resample

__all__ = ["AudioWarning", "load_audio", "read_blocks", "resample"]
