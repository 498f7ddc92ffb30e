"""What plus checkpoints can be asked for beside a plain transcript: tags for speakers or for times, and the rest of a text."""

from typing import Any

from granite_speech.errors import InputError

__all__ = ["PROMPT_MODES", "check_prompt_mode"]

PROMPT_MODES = ("default", "speaker_attributed", "word_timestamps")


def check_prompt_mode(prompt_mode: Any, prefix_text: Any, *, task: str) -> None:
    """Refuse what makes no sense with any checkpoint.

    Args:
        prompt_mode, prefix_text, task: as for `inputs.requests.request_for`.

    Raises:
        InputError: an unknown mode, a prefix_text that is not text, or either with a translation.
    """
    if not isinstance(prompt_mode, str) or prompt_mode not in PROMPT_MODES:
        expected = f"one of {', '.join(map(repr, PROMPT_MODES))}"
        raise InputError(got=f"prompt_mode={prompt_mode!r:.60}", expected=expected, remedy="Correct it, or omit it")
    if not isinstance(prefix_text, str | None):
        raise InputError(got=f"prefix_text of type {type(prefix_text).__name__}", expected="text, or None", remedy="Pass those")
    given = f"prompt_mode={prompt_mode!r}" if prompt_mode != "default" else "prefix_text" if prefix_text else None
    if given and task == "translate":
        raise InputError(got=f"{given} with task='translate'", expected="task='transcribe'", remedy="Omit one of them")
