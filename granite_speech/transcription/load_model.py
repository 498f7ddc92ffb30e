"""`load_model` and its `transcribe`, with the names, arguments and results of IBM's package granite-speech 0.0.3."""

import re
import sys
from collections.abc import Iterable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Self, overload
from warnings import warn

import torch

from granite_speech.errors import CheckpointError, CheckpointNotFoundError, InputError
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.recordings import Recording
from granite_speech.inputs.requests import window_limit
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.transcription.ctc_piece import LONGEST_WINDOW
from granite_speech.transcription.result import TranscriptionResult
from granite_speech.transcription.transcriber import Transcriber

__all__ = ["LoadedModel", "available_models", "load_model"]

_DEFAULT = "granite-speech-4.1-2b"
_TURBO = "granite-speech-5.0-470m-turboctc"
_RELEASES = (_DEFAULT, "granite-speech-4.1-2b-plus", "granite-4.0-1b-speech", "granite-speech-3.3-8b", "granite-speech-3.3-2b", _TURBO)
_OWNER = "ibm-granite/"
_WHISPERS = re.compile(r"(openai/whisper-|whisper-)?((tiny|base|small|medium)(\.en)?|large(-v[123])?(-turbo)?|turbo)")
# Options of whisper that mean nothing here, and why. IBM's package ignores them with a warning too.
_IGNORED = {
    "condition_on_previous_text": "each window is transcribed on its own",
    "carry_initial_prompt": "each window gets the whole prompt",
    "prepend_punctuations": "words are those between spaces, with their punctuation",
    "append_punctuations": "words are those between spaces, with their punctuation",
}


def available_models() -> list[str]:
    """The names that `load_model` takes beside folders and hub ids: IBM's releases that are supported, and "embedded", the small model
    inside the package."""
    return [*_RELEASES, "embedded"]


def load_model(
    name: str | PathLike = _DEFAULT,
    *,
    device: str | torch.device | None = None,
    download_root: str | PathLike | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    token: str | bool | None = None,
    llama_cpp_binary: str | None = None,
    llama_cpp_quant: str | None = None,
    llama_cpp_mmproj: str | None = None,
    llama_cpp_extra_args: Sequence[str] | None = None,
    llama_cpp_timeout: float | None = None,
) -> "LoadedModel":
    """A model that transcribes recordings, as IBM's package loads one.

        model = granite_speech.load_model("granite-speech-4.1-2b")
        result = model.transcribe("audio.wav")
        print(result["text"])

    Args:
        name: one of `available_models()`, the folder of a checkpoint, or a hub id. The name of a repository with GGUF files, such as
            "ibm-granite/granite-speech-4.1-2b-GGUF", means the checkpoint that these were made from.
        device: "cuda", "cpu" and so on; None or "auto" for CUDA if available, else the CPU.
        download_root: the cache for downloads; None for Hugging Face's.
        revision: branch, tag or commit on the hub.
        local_files_only: use only what has been downloaded before.
        dtype, quantize: as for `Transcriber.from_pretrained`.
        token: access token for the hub.
        llama_cpp_binary, llama_cpp_quant, llama_cpp_mmproj, llama_cpp_extra_args, llama_cpp_timeout: of IBM's package; ignored.

    Warns:
        UserWarning: options of llama.cpp, which is not used.

    Raises:
        CheckpointNotFoundError: no such checkpoint, or a model of whisper.
        CheckpointError, ConfigError, InputError, KernelError, MissingDependencyError: as `Transcriber.from_pretrained`.
    """
    llama_cpp = {
        "llama_cpp_binary": llama_cpp_binary,
        "llama_cpp_quant": llama_cpp_quant,
        "llama_cpp_mmproj": llama_cpp_mmproj,
        "llama_cpp_extra_args": llama_cpp_extra_args,
        "llama_cpp_timeout": llama_cpp_timeout,
    }
    if given := [option for option, value in llama_cpp.items() if value is not None]:
        warn(f"{', '.join(given)} ignored: llama.cpp is not used", UserWarning, stacklevel=2)
    download = {"cache_dir": download_root, "revision": revision, "local_files_only": local_files_only, "token": token}
    device = None if device == "auto" else device
    transcriber = Transcriber.from_pretrained(_checkpoint(name), device=device, dtype=dtype, quantize=quantize, **download)
    return LoadedModel(transcriber, fspath(name))


def _checkpoint(name: str | PathLike) -> str | Path:
    """The folder or hub id that is meant.

    Raises:
        CheckpointNotFoundError: it is a model of whisper.
        CheckpointError: it is a GGUF file.
    """
    if not isinstance(name, str):
        return name
    path = Path(name).expanduser()
    if path.is_dir():
        return name
    if name.lower().endswith(".gguf"):
        raise CheckpointError(
            got=f"the GGUF file {name!r}",
            expected="the checkpoint that it was made from: llama.cpp is not used",
            remedy=f"Pass one of {', '.join(available_models())}, a folder, or a hub id",
        )
    if _WHISPERS.fullmatch(name):
        raise CheckpointNotFoundError(
            got=f"{name!r}, a model of whisper",
            expected=f"one of {', '.join(available_models())}, a folder, or a hub id",
            remedy=f"Pass for example {_DEFAULT!r}",
        )
    if name.removeprefix(_OWNER).startswith("granite-"):
        name = re.sub("-gguf$", "", name, flags=re.IGNORECASE)
    return _OWNER + name if name in _RELEASES else name


class LoadedModel:
    """A model that transcribes recordings. Any number of threads may use it.

    Its thread and memory are freed by `close`, at the end of `with load_model(…) as model:`, or when nobody holds it any more.

    Args:
        transcriber: of its checkpoint.
        name: of the checkpoint, as the caller gave it.
    """

    def __init__(self, transcriber: Transcriber, name: str):
        self.transcriber, self.name = transcriber, name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, device={str(self.device)!r})"

    @property
    def model(self) -> GraniteSpeechForConditionalGeneration | GraniteSpeech5ForCTC:
        """The model itself."""
        return self.transcriber.model

    @property
    def processor(self) -> GraniteSpeechProcessor | GraniteSpeech5Processor:
        """The processor of the checkpoint."""
        return self.transcriber.processor

    @property
    def tokenizer(self) -> GraniteSpeechTokenizer:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @overload  # the first one, because a str is a sequence of str
    def transcribe(self, audio: Recording, **options: Any) -> TranscriptionResult: ...

    @overload
    def transcribe(self, audio: Sequence[Recording], **options: Any) -> list[TranscriptionResult]: ...

    def transcribe(
        self,
        audio: Any,
        *,
        sample_rate: int | None = None,
        task: str = "transcribe",
        language: str | None = None,
        target_language: str | None = None,
        prompt: str | None = None,
        prompt_mode: str = "default",
        prefix_text: str | None = None,
        keyword_biases: Iterable[str] | str | None = None,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        temperature: float | tuple[float, ...] | list[float] = 0.0,
        verbose: bool | None = None,
        chunk_length: float | None = None,
        chunk_overlap: float = 0.0,
        segmentation: str | None = None,
        vad_threshold: float = 0.2,
        vad_min_speech_duration: float = 0.2,
        vad_min_silence_duration: float = 0.5,
        vad_speech_pad: float = 0.2,
        initial_prompt: str | None = None,
        word_timestamps: bool | None = None,
        fp16: bool | None = None,
        clip_timestamps: Any = None,
        **whisper_options: Any,
    ) -> TranscriptionResult | list[TranscriptionResult]:
        """The text of one recording, or of each in a list, of any length.

            result = model.transcribe("talk.mp3", language="de", keyword_biases=["Watson"])
            result = model.transcribe("fr.wav", task="translate", language="fr")
            result = plus.transcribe("meeting.wav", prompt_mode="speaker_attributed")

        Args:
            audio: as `Transcriber.transcribe` takes it: a path, an open file, bytes, an array or tensor; or a list of these.
            sample_rate: of arrays, in Hz; None for 16,000. Not used for files. `sampling_rate` is the same.
            task, language, target_language, prompt, temperature, chunk_overlap, clip_timestamps: as for `TranscribeOptions`.
            prompt_mode: of plus checkpoints: "speaker_attributed" says who speaks, and "word_timestamps" has the model write where words
                end. Numbers of speakers begin again in each window.
            prefix_text: of plus checkpoints: the text, with its tags, of the beginning of the recording. The result is what comes after it.
            keyword_biases: names and terms to expect. `keywords` is the same.
            max_new_tokens: the longest answer for a window; None for that of `TranscribeOptions`.
            num_beams: only 1: decoding is greedy.
            verbose: True prints the text of each segment to standard error.
            chunk_length: the longest window, in seconds; None for the longest that the checkpoint transcribes well.
            segmentation: None for "energy": windows end in pauses. "fixed" cuts every chunk_length seconds, as IBM's package does.
            vad_threshold, vad_min_speech_duration, vad_min_silence_duration, vad_speech_pad: only with these values.
            initial_prompt: the same as prompt.
            word_timestamps: give each word its time and confidence; None: of a transcript, unless prompt_mode="word_timestamps" has them
                written. With both, the times are found as for any other checkpoint.
            fp16: ignored: dtype of `load_model` decides.
            whisper_options: others of whisper and of `TranscribeOptions`.

        Returns:
            A `TranscriptionResult`; for a list, a list in the same order.

        Warns:
            As `Transcriber.transcribe`.
            UserWarning: an option that is ignored and would change the result elsewhere.

        Raises:
            As `Transcriber.transcribe`.
        """
        call = dict(locals())
        for name in ("self", "audio", "verbose", "fp16", "whisper_options"):
            del call[name]
        call |= whisper_options
        ignored = [f"{name} ignored: {reason}" for name, reason in _IGNORED.items() if call.pop(name, None) not in (None, False)]
        if fp16 is not None and fp16 != (self.model.dtype != torch.float32):
            dtype = str(self.model.dtype).removeprefix("torch.")
            remedy = f"Pass dtype='{'bfloat16' if fp16 else 'float32'}' to load_model"
            ignored.append(f"fp16={fp16!r:.20} ignored: the model is in {dtype}. {remedy}")
        for message in ignored:
            warn(message, UserWarning, stacklevel=2)
        if call.pop("stream", False):
            raise InputError(got="stream=True", expected="a whole result", remedy="Call transcriber.transcribe of this object")
        if word_timestamps is None:
            call["word_timestamps"] = task == "transcribe" and prompt_mode != "word_timestamps"
        done = self.transcriber.transcribe(audio, **call)
        several, is_ctc = done if isinstance(done, list) else [done], isinstance(self.model, GraniteSpeech5ForCTC)
        limit = LONGEST_WINDOW if is_ctc else window_limit(self.model.config, task)
        results = [TranscriptionResult.of(one, call, limit) for one in several]
        for line in [segment.text for one in results for segment in one.segments if segment.text] if verbose else []:
            print(line, file=sys.stderr, flush=True)
        return results if isinstance(done, list) else results[0]

    def close(self, cancel: bool = False) -> None:
        """As `Transcriber.close`. A later call works again."""
        self.transcriber.close(cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)
