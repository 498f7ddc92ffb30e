"""Requests for a transcript or a translation, in the words that each family of checkpoints was trained on; and how long a recording each
checkpoint can answer at once.

The words are IBM's. Those of 3.x are from the README of ibm-granite/granite-speech-models, whose system text also has two dates, and for
translation from vLLM's `granite_speech`. Those of 4.x and of plus are from `prompts.py` of ibm-granite/granite-speech and its
examples/model_card_examples.md; 3.x has no words of its own for keywords and a given language, and gets those of plus. How an answer
continues a text is from the model card of granite-speech-4.1-2b-plus.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from granite_speech.config import TASKS
from granite_speech.errors import InputError
from granite_speech.inputs.languages import requested_languages
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.prompt_modes import check_prompt_mode
from granite_speech.inputs.text_options import check_choice

__all__ = ["PROMPT_3", "PROMPT_4", "SYSTEM_3", "request_for", "transcript_request", "window_limit"]

PROMPT_3 = "can you transcribe the speech into a written format?"
SYSTEM_3 = "You are Granite, developed by IBM. You are a helpful AI assistant"
PROMPT_4 = "transcribe the speech with proper punctuation and capitalization."
# The model was trained with these dates: they are not today's.
SYSTEM_PLUS = f"Knowledge Cutoff Date: April 2024.\nToday's Date: December 19, 2024.\n{SYSTEM_3}"
# The audio token is the first id after the vocabulary: 49,155 to 49,159 in 3.x, and 100,352 in 4.x, of which only plus has 3.x's template.
_VOCABULARY_4 = 100_000

# The requests of plus whose answers have tags, by prompt_mode.
_TAGGED_PLUS = {
    "speaker_attributed": (
        "Speaker attribution: Transcribe and denote who is speaking by adding [Speaker 1]: and [Speaker 2]: tags before speaker turns."
    ),
    "word_timestamps": (
        "Timestamps: Transcribe the speech. After each word, add a timestamp tag showing the end time in centiseconds, "
        "e.g. hello [T:45] world [T:82]"
    ),
}

# Seconds. In longer windows the releases may repeat themselves, and translations be in the language of the speech.
_WINDOW_LIMITS = {"transcribe": 30.0, "translate": 10.0}


@dataclass(frozen=True)
class _Family:
    """The words of one family. {} is the English name of a language.

    Attributes:
        system: a message before the request, or None.
        transcribe, transcribe_from, translate: the requests; `transcribe_from` names the language of the speech.
        with_keywords: the requests that keywords follow, by task, if they are not the same.
        gap: between the placeholder and the request.
        tagged: requests whose answers have tags, by prompt_mode.
        continues: whether an answer can continue a text, as the family was trained to.
    """

    system: str | None
    transcribe: str
    transcribe_from: str
    translate: str
    with_keywords: dict[str, str]
    gap: str = ""
    tagged: dict[str, str] = field(default_factory=dict)
    continues: bool = False

    def request(self, task: str, language: str | None, target: str | None, has_keywords: bool) -> str:
        if has_keywords and task in self.with_keywords:
            return self.with_keywords[task].format(target)
        if task == "translate":
            return self.translate.format(target)
        return self.transcribe if language is None else self.transcribe_from.format(language)


_THIRD = _Family(
    system=SYSTEM_3,
    transcribe=PROMPT_3,
    transcribe_from="can you transcribe the {} speech into a written format?",
    translate="translate the speech to {}",
    with_keywords={},
)
_PLUS = replace(_THIRD, system=SYSTEM_PLUS, gap=" ", tagged=_TAGGED_PLUS, continues=True)
_FOURTH = _Family(
    system=None,
    transcribe=PROMPT_4,
    transcribe_from="transcribe the {} speech with proper punctuation and capitalization.",
    translate="translate the speech to {} with proper punctuation and capitalization.",
    with_keywords={"transcribe": "transcribe the speech to text.", "translate": "translate the speech to {}."},
)


def request_for(
    processor: GraniteSpeechProcessor,
    *,
    task: str = "transcribe",
    language: str | None = None,
    target_language: str | None = None,
    keywords: str | Iterable[str] = (),
    prompt: str | None = None,
    prompt_mode: str = "default",
    prefix_text: str | None = None,
    model_type: str | None = None,
) -> str:
    """The full prompt for one clip, in the checkpoint's chat template if it has one, with one placeholder.

    Args:
        processor: of the model.
        task: "transcribe", or "translate" to another language.
        language: of the speech, as a code ("de", "de-DE") or an English name; None or "auto" if it is not known. The models find it out.
        target_language: of a translation, likewise; English if None.
        keywords: names and terms that the speech may contain: "Kim, EBITDA", or several strings. IBM trained 4.x on such lists.
        prompt: a request in other words, to which keywords are added; the task then only matters for what is checked. One that has the
            placeholder gets no other. One that also ends as the chat template ends a prompt is complete.
        prompt_mode: of plus checkpoints: "speaker_attributed" or "word_timestamps" ask for an answer with tags, in which the language
            is not named. `transcription.tagged_answers` reads them. With a prompt, that is the request.
        prefix_text: of plus checkpoints: how the answer begins, as an earlier answer to the beginning of the clip ended, with its tags if
            it has any. The answer is what comes after it.
        model_type: of the model's configuration; None to go by the template and the vocabulary, which tell the releases apart.

    Raises:
        InputError: another task; an unknown code; a target without translation, or the same as the language; keywords that are not text,
            or come with a prompt that is complete; more than one placeholder; a prompt_mode or prefix_text that the checkpoint was not
            trained on, or that comes with a translation.
    """
    check_choice("task", task, TASKS)
    check_prompt_mode(prompt_mode, prefix_text, task=task)
    spoken, target = requested_languages(task, language, target_language)
    terms = _keywords(keywords, processor.audio_token)
    family = _family(processor, model_type)
    _check_prompt(prompt)
    _check_family(family, prompt_mode, prefix_text)
    if terms and prompt and _is_complete(processor, prompt):
        raise InputError(
            got="keywords for a prompt that ends with the start of the answer",
            expected="a request that they can be added to",
            remedy="Write the keywords into the prompt, or pass only the request",
        )
    words = prompt or family.tagged.get(prompt_mode) or family.request(task, spoken, target, bool(terms))
    text = _in_template(processor, family, _with_keywords(words, terms), (prefix_text or "").rstrip())
    if text.count(processor.audio_token) != 1:
        raise InputError(
            got=f"a prompt in which {processor.audio_token} occurs {text.count(processor.audio_token)} times",
            expected="once: the place of the recording",
            remedy="Correct the prompt or the chat template",
        )
    return text


def transcript_request(processor: GraniteSpeechProcessor, prompt: str | None = None, model_type: str | None = None) -> str:
    """The full prompt for a transcript, or for `prompt`. Arguments are those of `request_for`; the prompt may have any number of
    placeholders."""
    _check_prompt(prompt)
    family = _family(processor, model_type)
    return _in_template(processor, family, prompt or family.transcribe)


def window_limit(model_config: Any, task: str) -> float:
    """The longest window that a checkpoint answers well, in seconds: `window_seconds` of its configuration if it has one, otherwise that
    of the releases, 30 s to transcribe and 10 s to translate.

    Args:
        model_config: `GraniteSpeechConfig`.
        task: "transcribe" or "translate".
    """
    check_choice("task", task, TASKS)
    limit = getattr(model_config, "window_seconds", None)
    if isinstance(limit, dict):
        limit = limit.get(task)
    return _WINDOW_LIMITS[task] if limit is None else float(limit)


def _family(processor: GraniteSpeechProcessor, model_type: str | None) -> _Family:
    template = str(processor.chat_template or "")
    if "<|start_of_role|>" in template and model_type is None:
        vocabulary = processor.tokenizer.convert_tokens_to_ids(processor.audio_token) or 0
        return _PLUS if vocabulary >= _VOCABULARY_4 else _THIRD
    if model_type == "granite_speech_plus":
        return _PLUS
    return _THIRD if "<|start_of_role|>" in template else _FOURTH


def _check_family(family: _Family, prompt_mode: str, prefix_text: str | None) -> None:
    """Refuse what a checkpoint was not trained on."""
    remedy = "Load 'ibm-granite/granite-speech-4.1-2b-plus', or omit it"
    if prompt_mode != "default" and prompt_mode not in family.tagged:
        if prompt_mode == "word_timestamps":
            remedy += "; word_timestamps=True gives the times of words with any checkpoint"
        raise InputError(got=f"prompt_mode={prompt_mode!r}", expected="a plus checkpoint, which was trained on it", remedy=remedy)
    if prefix_text and not family.continues:
        raise InputError(got="prefix_text", expected="a plus checkpoint, which was trained to continue a text", remedy=remedy)


def _keywords(keywords: Any, audio_token: str) -> list[str]:
    """Keywords without surrounding space, each once, in order."""
    parts = [keywords] if isinstance(keywords, str) else keywords
    if parts is None:
        return []
    if isinstance(parts, bytes | bytearray) or not isinstance(parts, Iterable):
        raise _wrong_keywords(f"keywords of type {type(keywords).__name__}")
    found = {}
    for part in parts:
        if not isinstance(part, str):
            raise _wrong_keywords(f"a {type(part).__name__} among the keywords")
        if audio_token in part:
            raise _wrong_keywords(f"the keyword {part!r:.40}, which has the place of the recording")
        found |= dict.fromkeys(" ".join(one.split()) for one in part.split(","))
    return [one for one in found if one]


def _wrong_keywords(got: str) -> InputError:
    return InputError(got=got, expected="'a, b', or several strings", remedy="Pass those")


def _with_keywords(words: str, keywords: list[str]) -> str:
    if not keywords:
        return words
    words = words.rstrip()
    return f"{words}{'' if words.endswith(('.', '!', '?', ':', '。', '？', '！')) else '.'} Keywords: {', '.join(keywords)}"


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str | None):
        raise InputError(got=f"a prompt of type {type(prompt).__name__}", expected="text, or None", remedy="Pass those")


def _in_template(processor: GraniteSpeechProcessor, family: _Family, words: str, prefix: str = "") -> str:
    has_place = processor.audio_token in words
    content = words if has_place else f"{processor.audio_token}{family.gap}{words}"
    if not processor.chat_template or (has_place and _is_complete(processor, words)):
        return content + prefix
    conversation = [] if family.system is None else [{"role": "system", "content": family.system}]
    conversation.append({"role": "user", "content": content})
    if prefix and "prefix_text" in str(processor.chat_template):  # that of plus writes it where it belongs
        return processor.apply_chat_template(conversation, add_generation_prompt=True, prefix_text=prefix)
    return processor.apply_chat_template(conversation, add_generation_prompt=True) + prefix


def _is_complete(processor: GraniteSpeechProcessor, prompt: str) -> bool:
    """Whether the prompt ends with what the chat template writes after the user's words."""
    if not processor.chat_template:
        return False
    words = "what?"
    rendered = processor.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)
    _, found, end = rendered.rpartition(words)
    return bool(found and end.strip()) and prompt.rstrip().endswith(end.strip())
