"""What people pass for a recording and its request, as the processor needs it."""

import io
from collections.abc import Mapping
from os import PathLike
from typing import Any, BinaryIO
from warnings import warn

import numpy as np
from torch import Tensor

from granite_speech.inputs.audio import AudioWarning, load_with_warning
from granite_speech.inputs.processor import GraniteSpeechProcessor

__all__ = ["PROMPT_3", "Recording", "read_recording", "samples_of", "transcript_request"]

Recording = str | PathLike | BinaryIO | bytes | np.ndarray | Tensor

# The requests that the releases were trained on: 3.x with this system text, 4.x without one.
PROMPT_3 = "can you transcribe the speech into a written format?"
SYSTEM_3 = "You are Granite, developed by IBM. You are a helpful AI assistant"
PROMPT_4 = "transcribe the speech with proper punctuation and capitalization."


def transcript_request(processor: GraniteSpeechProcessor, prompt: str | None = None) -> str:
    """The full prompt for one recording, in the checkpoint's chat template if it has one.

    Args:
        processor: of the model.
        prompt: the request; None asks for a transcript. One that has the placeholder gets no other. One that also ends as the chat
            template ends a prompt is complete, and is returned as it is.
    """
    template, audio_token = processor.chat_template, processor.audio_token
    place = "" if audio_token in (prompt or "") else audio_token
    if not template:
        return f"{place}{prompt or PROMPT_4}"
    if not place and _is_complete(processor, prompt):
        return prompt
    third_generation = "<|start_of_role|>" in str(template)
    conversation = [{"role": "system", "content": SYSTEM_3}] if third_generation else []
    conversation.append({"role": "user", "content": f"{place}{prompt or (PROMPT_3 if third_generation else PROMPT_4)}"})
    return processor.apply_chat_template(conversation, add_generation_prompt=True)


def _is_complete(processor: GraniteSpeechProcessor, prompt: str) -> bool:
    """Whether the prompt ends with what the chat template writes after the user's words."""
    words = "what?"
    rendered = processor.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)
    _, found, end = rendered.rpartition(words)
    return bool(found and end.strip()) and prompt.rstrip().endswith(end.strip())


def samples_of(recording: Any, processor: GraniteSpeechProcessor, sampling_rate: int | None) -> tuple[Any, int | None]:
    """Samples and their rate for `processor`: files and bytes are decoded, at the model's rate (None); anything else is
    unchanged, and read by the processor.

    Args:
        recording: a `Recording`, an entry of `datasets`, or a list of clips for a prompt with several.
        processor: of the model.
        sampling_rate: of an array, in Hz; None for the model's.

    Raises:
        AudioError: a file that cannot be used.
    """
    samples, rate, warning = read_recording(recording, processor, sampling_rate)
    if warning is not None:
        warn(warning, AudioWarning, stacklevel=2)
    return samples, rate


def read_recording(recording: Any, processor: GraniteSpeechProcessor, sampling_rate: int | None) -> tuple[Any, int | None, str | None]:
    """As `samples_of`, with the text of a file's `AudioWarning`, or None, in place of the warning."""
    if isinstance(recording, (np.ndarray, Tensor, list, tuple, Mapping)) or hasattr(recording, "get_all_samples"):
        return recording, sampling_rate, None
    file = io.BytesIO(recording) if isinstance(recording, (bytes, bytearray, memoryview)) else recording
    samples, warning = load_with_warning(file, processor.audio_processor.sampling_rate)
    return samples, None, warning
