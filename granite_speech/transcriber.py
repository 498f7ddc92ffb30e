"""The main job in one object: a recording in, its words out."""

import io
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import torch
from torch import Tensor

from granite_speech.audio import load_audio
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.processor import GraniteSpeechProcessor

__all__ = ["Transcriber", "transcript_request"]

# What the releases were trained to answer: 3.x after this system text, 4.x without one.
PROMPT_3 = "can you transcribe the speech into a written format?"
SYSTEM_3 = "You are Granite, developed by IBM. You are a helpful AI assistant"
PROMPT_4 = "transcribe the speech with proper punctuation and capitalization."


class Transcriber:
    """A model and its processor.

    Args:
        model: on the device where it is to run.
        processor: of the same checkpoint.
    """

    def __init__(self, model: GraniteSpeechForConditionalGeneration, processor: GraniteSpeechProcessor):
        self.model, self.processor = model, processor

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> Self:
        """Load both from a folder or hub id.

        Args:
            name_or_path: a folder, or a hub id such as "ibm-granite/granite-speech-3.3-2b".
            device: CUDA where there is one and nothing is said.
            dtype: of the weights; the checkpoint's where nothing is said.
        """
        chosen = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
        processor = GraniteSpeechProcessor.from_pretrained(name_or_path)
        return cls(GraniteSpeechForConditionalGeneration.from_pretrained(name_or_path, device=chosen, dtype=dtype), processor)

    def transcribe(
        self,
        audio: str | PathLike | BinaryIO | bytes | np.ndarray | Tensor,
        prompt: str | None = None,
        max_new_tokens: int = 400,
        *,
        sampling_rate: int | None = None,
    ) -> str:
        """The words of one recording.

        Args:
            audio: a file that `granite_speech.audio.load_audio` reads: a path, "-" for standard input, an open binary file, or its
                content as bytes; or an array or tensor `(samples,)`, `(samples, channels)` or `(channels, samples)`.
            prompt: what to ask of the speech; the release's own request for a transcript if omitted.
            max_new_tokens: the answer's length at most.
            sampling_rate: of an array, in Hz; None for the processor's. A file says its own.

        Raises:
            AudioError: a recording that cannot be used.
        """
        if not isinstance(audio, (np.ndarray, Tensor, list, tuple)):
            file = io.BytesIO(audio) if isinstance(audio, (bytes, bytearray, memoryview)) else audio
            audio, sampling_rate = load_audio(file, self.processor.audio_processor.sampling_rate), None
        inputs = self.processor(self._request(prompt), audio, device=self.model.device, sampling_rate=sampling_rate).to(self.model.device)
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens)
        return self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def _request(self, prompt: str | None) -> str:
        return transcript_request(self.processor, prompt)


def transcript_request(processor: GraniteSpeechProcessor, prompt: str | None = None) -> str:
    """The whole prompt for one recording, in the checkpoint's template where it has one; the release's own request without `prompt`."""
    template, audio_token = processor.chat_template, processor.audio_token
    if not template:
        return f"{audio_token}{prompt or PROMPT_4}"
    third_generation = "<|start_of_role|>" in str(template)
    conversation = [{"role": "system", "content": SYSTEM_3}] if third_generation else []
    conversation.append({"role": "user", "content": f"{audio_token}{prompt or (PROMPT_3 if third_generation else PROMPT_4)}"})
    return processor.apply_chat_template(conversation, add_generation_prompt=True)
