"""From a recording to its text, with a model and its processor in one object."""

import io
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Self
from warnings import warn

import numpy as np
import torch
from granite_kernels import OPERATIONS
from torch import Tensor

from granite_speech.errors import AudioError
from granite_speech.generation.options import GenerationOptions
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.recordings import transcript_request
from granite_speech.model import GraniteSpeechForConditionalGeneration

__all__ = ["Transcriber", "TruncatedAnswerWarning"]


class TruncatedAnswerWarning(UserWarning):
    """An answer reached a limit before the model finished it, so the text is incomplete."""


class Transcriber:
    """A model and its processor.

    Args:
        model: the model, on the device where it should run.
        processor: the processor of the same checkpoint.
    """

    def __init__(self, model: GraniteSpeechForConditionalGeneration, processor: GraniteSpeechProcessor):
        self.model, self.processor = model, processor

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> Self:
        """Loads both from a folder or hub id.

        Args:
            name_or_path: a folder, or a hub id such as "ibm-granite/granite-speech-3.3-2b".
            device: of the model; None for CUDA if available, else the CPU.
            dtype: of the weights; None for the checkpoint's.

        Raises:
            CheckpointError, ConfigError, InputError: a checkpoint, device or dtype that cannot be used.
            KernelError: GRANITE_SPEECH_KERNELS asks for kernels that cannot run on the device.
        """
        chosen = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
        processor = GraniteSpeechProcessor.from_pretrained(name_or_path)
        model = GraniteSpeechForConditionalGeneration.from_pretrained(name_or_path, device=chosen, dtype=dtype)
        for operation in OPERATIONS.values():
            operation.resolve(None, model.device, model.dtype)  # fails here rather than at the first recording
        return cls(model, processor)

    def transcribe(
        self,
        audio: str | PathLike | BinaryIO | bytes | np.ndarray | Tensor,
        prompt: str | None = None,
        max_new_tokens: int = 400,
        *,
        sampling_rate: int | None = None,
    ) -> str:
        """The text of one recording.

        Args:
            audio: a file that `granite_speech.load_audio` reads: a path, "-" for standard input, an open binary file, or its
                content as bytes; or an array or tensor `(samples,)`, `(samples, channels)` or `(channels, samples)`.
            prompt: the request; the release's own request for a transcript if omitted.
            max_new_tokens: the longest answer.
            sampling_rate: of an array, in Hz; None for the processor's. Not used for files.

        Warns:
            TruncatedAnswerWarning: the answer reached max_new_tokens, or the end of the model's context, before it ended.

        Raises:
            AudioError: a recording that cannot be used, or one too long for the model's context.
        """
        if not isinstance(audio, (np.ndarray, Tensor, list, tuple)):
            file = io.BytesIO(audio) if isinstance(audio, (bytes, bytearray, memoryview)) else audio
            audio, sampling_rate = load_audio(file, self.processor.audio_processor.sampling_rate), None
        inputs = self.processor(self._request(prompt), audio, device=self.model.device, sampling_rate=sampling_rate).to(self.model.device)
        columns, context = inputs["input_ids"].shape[1], self.model.config.text_config.max_position_embeddings
        if columns >= context:
            raise AudioError(
                got=f"a recording whose prompt has {columns} tokens",
                expected=f"fewer than the {context} tokens of the model's context",
                remedy="Transcribe it in shorter pieces",
            )
        limit = min(max_new_tokens, context - columns)
        ids = self.model.generate(**inputs, max_new_tokens=limit)[0, columns:].tolist()
        if not self._has_ended(ids, limit):
            where, remedy = "which is max_new_tokens", "Raise max_new_tokens"
            if limit < max_new_tokens:
                where, remedy = f"where the model's context of {context} tokens ends", "Transcribe the recording in shorter pieces"
            warn(f"the answer was cut off after {limit} tokens, {where}. {remedy}.", TruncatedAnswerWarning, stacklevel=2)
        return self.processor.decode(ids, skip_special_tokens=True).strip()

    def _has_ended(self, ids: list[int], limit: int) -> bool:
        """Whether an answer of at most `limit` tokens is complete."""
        model = self.model
        options = GenerationOptions.resolve({}, None, model.generation_config, model.config.text_config, columns=0)
        return len(ids) < limit or not set(options.eos_token_id).isdisjoint(ids[-1:])

    def _request(self, prompt: str | None) -> str:
        return transcript_request(self.processor, prompt)
