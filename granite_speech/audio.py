"""Where `load_audio` was before the package had folders. `from granite_speech import load_audio` is the name to use."""

from granite_speech.inputs.audio import AudioWarning, load_audio, read_blocks, resample

__all__ = ["AudioWarning", "load_audio", "read_blocks", "resample"]
