"""IBM's Granite Speech with hand-written Triton kernels: speech in, text out.

    from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor

Names and arguments are those of transformers; neither transformers nor peft is needed. Each name is imported when it is first
used, so that importing the package itself is fast.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "auto": (
        "AutoConfig",
        "AutoFeatureExtractor",
        "AutoModel",
        "AutoModelForCTC",
        "AutoModelForMultimodalLM",
        "AutoModelForSeq2SeqLM",
        "AutoModelForSpeechSeq2Seq",
        "AutoProcessor",
        "AutoTokenizer",
    ),
    "config": (
        "Blip2QFormerConfig",
        "GraniteConfig",
        "GraniteSpeechConfig",
        "GraniteSpeechEncoderConfig",
        "GraniteSpeechPlusConfig",
        "GraniteSpeechPlusEncoderConfig",
    ),
    "config_ctc": ("GraniteSpeech5CTCConfig", "GraniteSpeech5EncoderConfig"),
    "engine.counters": ("Counters",),
    "engine.engine": ("Engine",),
    "engine.graphs": ("CaptureWarning",),
    "engine.handle": ("Answer", "Handle"),
    "errors": (
        "AudioError",
        "CheckpointError",
        "CheckpointNotFoundError",
        "ConfigError",
        "EngineError",
        "GraniteSpeechError",
        "InputError",
        "KernelError",
        "MissingDependencyError",
        "OutputError",
        "UnsupportedError",
    ),
    "generation.config": ("GenerationConfig",),
    "inputs.audio": ("AudioWarning", "load_audio", "read_blocks"),
    "inputs.ctc_processor": ("GraniteSpeech5Processor",),
    "inputs.delta_features": ("GraniteSpeech5FeatureExtractor",),
    "inputs.features": ("GraniteSpeechFeatureExtractor",),
    "inputs.processor": ("GraniteSpeechProcessor",),
    "interop.accelerate": ("AccelerationWarning", "accelerate", "restore"),
    "model": ("GraniteSpeechForConditionalGeneration", "GraniteSpeechModel", "GraniteSpeechPlusForConditionalGeneration"),
    "model_ctc": ("GraniteSpeech5ForCTC",),
    "modules.ctc_encoder": ("GraniteSpeech5Encoder",),
    "modules.encoder": ("GraniteSpeechCTCEncoder",),
    "transcription.load_model": ("available_models", "load_model"),
    "transcription.options": ("TranscribeOptions",),
    "transcription.plot": ("plot_words",),
    "transcription.result": ("TranscriptionResult",),
    "transcription.transcribe": ("transcribe",),
    "transcription.transcriber": ("Transcriber", "TranscriptWarning", "TruncatedAnswerWarning"),
    "transcription.transcript": ("Segment", "Transcript", "TranscriptNote", "Word"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]

# Type checkers and editors understand only import statements, and these would import torch at run time.
if TYPE_CHECKING:
    from granite_speech.auto import AutoConfig as AutoConfig
    from granite_speech.auto import AutoFeatureExtractor as AutoFeatureExtractor
    from granite_speech.auto import AutoModel as AutoModel
    from granite_speech.auto import AutoModelForCTC as AutoModelForCTC
    from granite_speech.auto import AutoModelForMultimodalLM as AutoModelForMultimodalLM
    from granite_speech.auto import AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM
    from granite_speech.auto import AutoModelForSpeechSeq2Seq as AutoModelForSpeechSeq2Seq
    from granite_speech.auto import AutoProcessor as AutoProcessor
    from granite_speech.auto import AutoTokenizer as AutoTokenizer
    from granite_speech.config import Blip2QFormerConfig as Blip2QFormerConfig
    from granite_speech.config import GraniteConfig as GraniteConfig
    from granite_speech.config import GraniteSpeechConfig as GraniteSpeechConfig
    from granite_speech.config import GraniteSpeechEncoderConfig as GraniteSpeechEncoderConfig
    from granite_speech.config import GraniteSpeechPlusConfig as GraniteSpeechPlusConfig
    from granite_speech.config import GraniteSpeechPlusEncoderConfig as GraniteSpeechPlusEncoderConfig
    from granite_speech.config_ctc import GraniteSpeech5CTCConfig as GraniteSpeech5CTCConfig
    from granite_speech.config_ctc import GraniteSpeech5EncoderConfig as GraniteSpeech5EncoderConfig
    from granite_speech.engine.counters import Counters as Counters
    from granite_speech.engine.engine import Engine as Engine
    from granite_speech.engine.graphs import CaptureWarning as CaptureWarning
    from granite_speech.engine.handle import Answer as Answer
    from granite_speech.engine.handle import Handle as Handle
    from granite_speech.errors import AudioError as AudioError
    from granite_speech.errors import CheckpointError as CheckpointError
    from granite_speech.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from granite_speech.errors import ConfigError as ConfigError
    from granite_speech.errors import EngineError as EngineError
    from granite_speech.errors import GraniteSpeechError as GraniteSpeechError
    from granite_speech.errors import InputError as InputError
    from granite_speech.errors import KernelError as KernelError
    from granite_speech.errors import MissingDependencyError as MissingDependencyError
    from granite_speech.errors import OutputError as OutputError
    from granite_speech.errors import UnsupportedError as UnsupportedError
    from granite_speech.generation.config import GenerationConfig as GenerationConfig
    from granite_speech.inputs.audio import AudioWarning as AudioWarning
    from granite_speech.inputs.audio import load_audio as load_audio
    from granite_speech.inputs.audio import read_blocks as read_blocks
    from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor as GraniteSpeech5Processor
    from granite_speech.inputs.delta_features import GraniteSpeech5FeatureExtractor as GraniteSpeech5FeatureExtractor
    from granite_speech.inputs.features import GraniteSpeechFeatureExtractor as GraniteSpeechFeatureExtractor
    from granite_speech.inputs.processor import GraniteSpeechProcessor as GraniteSpeechProcessor
    from granite_speech.interop.accelerate import AccelerationWarning as AccelerationWarning
    from granite_speech.interop.accelerate import accelerate as accelerate
    from granite_speech.interop.accelerate import restore as restore
    from granite_speech.model import GraniteSpeechForConditionalGeneration as GraniteSpeechForConditionalGeneration
    from granite_speech.model import GraniteSpeechModel as GraniteSpeechModel
    from granite_speech.model import GraniteSpeechPlusForConditionalGeneration as GraniteSpeechPlusForConditionalGeneration
    from granite_speech.model_ctc import GraniteSpeech5ForCTC as GraniteSpeech5ForCTC
    from granite_speech.modules.ctc_encoder import GraniteSpeech5Encoder as GraniteSpeech5Encoder
    from granite_speech.modules.encoder import GraniteSpeechCTCEncoder as GraniteSpeechCTCEncoder
    from granite_speech.transcription.load_model import available_models as available_models
    from granite_speech.transcription.load_model import load_model as load_model
    from granite_speech.transcription.options import TranscribeOptions as TranscribeOptions
    from granite_speech.transcription.plot import plot_words as plot_words
    from granite_speech.transcription.result import TranscriptionResult as TranscriptionResult
    from granite_speech.transcription.transcribe import transcribe as transcribe
    from granite_speech.transcription.transcriber import Transcriber as Transcriber
    from granite_speech.transcription.transcriber import TranscriptWarning as TranscriptWarning
    from granite_speech.transcription.transcriber import TruncatedAnswerWarning as TruncatedAnswerWarning
    from granite_speech.transcription.transcript import Segment as Segment
    from granite_speech.transcription.transcript import Transcript as Transcript
    from granite_speech.transcription.transcript import TranscriptNote as TranscriptNote
    from granite_speech.transcription.transcript import Word as Word


def _warn_of_ibms_package() -> None:
    """Warn if IBM's own distribution `granite-speech`, which has the same import name, is installed too.

    The folders are listed first, because importing importlib.metadata takes longer than the rest of this file.
    """
    for folder in sys.path:
        try:
            names = os.listdir(folder or os.curdir)
        except OSError:  # a zip file, or a missing folder
            continue
        if any(name.lower().startswith(("granite_speech-", "granite-speech-")) for name in names):
            break
    else:
        return
    from importlib.metadata import PackageNotFoundError, version
    from warnings import warn

    try:
        theirs = version("granite-speech")
    except PackageNotFoundError:
        return
    warn(
        f"IBM's distribution granite-speech {theirs} and granite-speech-triton are both installed, and both have the import package "
        "granite_speech. The one installed last has overwritten files of the other, and removing either breaks the other. Uninstall "
        "both (pip uninstall granite-speech granite-speech-triton), then install the one you want.",
        RuntimeWarning,
        stacklevel=3,
    )


_warn_of_ibms_package()


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
