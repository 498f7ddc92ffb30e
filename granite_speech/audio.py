"""Where `load_audio` was before the package had folders; `from granite_speech import load_audio` is the name to use."""

from granite_speech.inputs.audio import load_audio, resample

__all__ = ["load_audio", "resample"]
