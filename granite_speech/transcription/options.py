"""How recordings are transcribed: the task, the request, the windows, the decoding."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Self

from granite_speech.errors import InputError
from granite_speech.inputs.languages import requested_languages
from granite_speech.inputs.prompt_modes import check_prompt_mode

__all__ = ["SEGMENTATIONS", "SHORTEST_WINDOW", "TranscribeOptions"]

SEGMENTATIONS = ("energy", "vad", "silero", "fixed")
SHORTEST_WINDOW = 0.5  # seconds
_MAX_NEW_TOKENS, _MAX_TAGGED_TOKENS = 400, 2000
# Names that IBM's package and whisper have for the same option.
_ALIASES = {"keyword_biases": "keywords", "initial_prompt": "prompt", "chunk_length_s": "chunk_length"}
_NO_VAD = "Omit it; segmentation='silero' uses silero-vad with its own settings"
# Options of theirs, with the values that mean what happens here anyway (None: any value does), and what to use for others.
_NOTHING_CHANGES: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "beam_size": ((None, 1), "Windows are decoded greedily; call model.generate(num_beams=…) on clips"),
    "num_beams": ((None, 1), "Windows are decoded greedily; call model.generate(num_beams=…) on clips"),
    "best_of": ((None, 1, 5), "Omit it: each window has one answer"),
    "patience": (None, ""),  # it, like the next one, is about beams
    "length_penalty": (None, ""),
    "suppress_tokens": ((None, "", "-1"), "Omit it: no token is suppressed"),
    "carry_initial_prompt": ((None, True), "Omit it: each window gets the whole prompt"),
    "condition_on_previous_text": ((None, False), "Omit it: each window is transcribed on its own"),
    "fp16": ((None, True), "Pass dtype='float32' where the model is loaded"),
    "logprob_threshold": ((None, -1.0), "Omit it: windows are tried again only if their text repeats itself"),
    "no_speech_threshold": ((None, 0.6), "Omit it: silence is found by its energy, before the model runs"),
    "prepend_punctuations": (None, ""),  # it, like the next two, is about times of words: see _OF_WORDS
    "append_punctuations": (None, ""),
    "hallucination_silence_threshold": (None, ""),
    "suppress_blank": ((None, True), "Omit it: no token is suppressed"),
    "without_timestamps": ((None, False), "Omit it: segments have the times of their windows"),
    "max_initial_timestamp": ((None, 1.0), "Omit it: segments have the times of their windows"),
    "vad_threshold": ((None, 0.2), _NO_VAD),
    "vad_min_speech_duration": ((None, 0.2), _NO_VAD),
    "vad_min_silence_duration": ((None, 0.5), _NO_VAD),
    "vad_speech_pad": ((None, 0.2), _NO_VAD),
    "verbose": (None, ""),
}
_WORDS_HAVE_MARKS = "Omit it: words are those between spaces, with their punctuation"
# Those that change the result of whisper together with word_timestamps; in place of the same ones above.
_OF_WORDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "prepend_punctuations": ((None, "\"'“¿([{-"), _WORDS_HAVE_MARKS),
    "append_punctuations": ((None, "\"'.。,，!！?？:：”)]}、"), _WORDS_HAVE_MARKS),
    "hallucination_silence_threshold": ((None,), "Omit it: silence is found by its energy, before the model runs"),
}


@dataclass(frozen=True)
class TranscribeOptions:
    """How recordings are transcribed.

    Attributes:
        task: "transcribe" or "translate".
        language: of the speech, as a name or a code; None: not known.
        target_language: of a translation; English if omitted.
        prompt: the request, in place of the checkpoint's own.
        keywords: names and terms that the speech may contain; a text with commas, or an iterable of texts.
        max_new_tokens: longest answer for a window, in tokens; None: 400, and 2,000 with prompt_mode="word_timestamps", whose answers have
            a tag for each word.
        temperature: 0 for greedy decoding, otherwise of sampling. Of a tuple, as whisper takes it, the first is used.
        segmentation: where windows are cut: "energy" at pauses, and elsewhere where the sound is weakest; "vad" is IBM's name for the
            same; "silero" finds speech with the package silero-vad; "fixed" cuts every `chunk_length` seconds. None: "energy", or "fixed"
            if there is an overlap.
        chunk_length: longest window, in seconds, at least 0.5; None or more than the checkpoint's limit: that limit.
        chunk_overlap: seconds that windows of "fixed" have in common.
        clip_timestamps: start, end, start, end, … in seconds: transcribe only these ranges. Without the last end, until the recording's
            end. A text with commas, numbers, or pairs.
        compression_ratio_threshold: a text that zlib makes this many times smaller repeats itself: its window is cut and tried again.
            None: any text is taken.
        word_timestamps: give each word its time and its confidence. Not of a translation, whose words were not said.
        prompt_mode: of plus checkpoints: "speaker_attributed" says who speaks; "word_timestamps" has the model write the times of words,
            which `word_timestamps` finds with any checkpoint. "default": a plain transcript.
        prefix_text: of plus checkpoints: how the answer to the first window begins, as the answer to the audio before it ended.
        errors: "raise", or "warn" to take the intact part of a damaged file, with a warning.
        chooses_windows: whether segmentation, chunk_length or chunk_overlap is given.

    A checkpoint without a language model, such as TurboCTC's, has no use for task, target_language, prompt, keywords, max_new_tokens,
    temperature, prompt_mode and prefix_text: anything but the default is refused, and so is another language than English. Nor can its
    text repeat itself, so compression_ratio_threshold changes nothing. Unless a call chooses windows, they are as in
    `transcription.ctc_piece`: with them the text is that of the whole recording at once.

    Raises:
        InputError: a value that cannot be used.
    """

    task: str = "transcribe"
    language: str | None = None
    target_language: str | None = None
    prompt: str | None = None
    keywords: str | Iterable[str] | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    segmentation: str | None = None
    chunk_length: float | None = None
    chunk_overlap: float = 0.0
    clip_timestamps: Any = None
    compression_ratio_threshold: float | None = 2.4
    word_timestamps: bool = False
    prompt_mode: str = "default"
    prefix_text: str | None = None
    errors: str = "raise"
    chooses_windows: bool = field(init=False, default=False, repr=False, compare=False)

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> Self:
        """The options of a call, which may use the names of IBM's package and of whisper.

        Raises:
            InputError: an unknown option, or one that would change the result and cannot.
        """
        known, chosen, names = [one.name for one in fields(cls) if one.init], {}, {}
        others = _NOTHING_CHANGES | (_OF_WORDS if call.get("word_timestamps") else {})
        for name, value in call.items():
            own = _ALIASES.get(name, name)
            if own not in known:
                _check_other(name, value, known, others)
            elif value is not None or own == "compression_ratio_threshold":
                if own in chosen:
                    got = f"{names[own]} and {name}"
                    raise InputError(got=got, expected="one of them: they are the same option", remedy=f"Omit {name}")
                chosen[own], names[own] = value, name
        return cls(**chosen)

    def __post_init__(self) -> None:
        self._check_choice("task", ("transcribe", "translate"))
        chooses = self.segmentation is not None or self.chunk_length is not None or bool(self.chunk_overlap)
        object.__setattr__(self, "chooses_windows", chooses)
        if self.segmentation is None:
            object.__setattr__(self, "segmentation", "fixed" if self.chunk_overlap else "energy")
        self._check_choice("segmentation", SEGMENTATIONS)
        self._check_choice("errors", ("raise", "warn"))
        check_prompt_mode(self.prompt_mode, self.prefix_text, task=self.task)
        self._check_choice("word_timestamps", (True, False))
        if self.word_timestamps and self.task == "translate":
            raise InputError(
                got="word_timestamps with task='translate'",
                expected="task='transcribe': the words of a translation were not said",
                remedy="Omit one of them",
            )
        requested_languages(self.task, self.language, self.target_language)
        if isinstance(self.temperature, (list, tuple)) and self.temperature:
            object.__setattr__(self, "temperature", self.temperature[0])
        object.__setattr__(self, "temperature", float(self._number("temperature", 0.0)))
        if self.chunk_length is not None:
            self._number("chunk_length", SHORTEST_WINDOW)
        if self.compression_ratio_threshold is not None:
            self._number("compression_ratio_threshold", 0.0, above=True)
        self._number("chunk_overlap", 0.0)
        tokens = self.max_new_tokens
        if tokens is None:
            tokens = _MAX_TAGGED_TOKENS if self.prompt_mode == "word_timestamps" else _MAX_NEW_TOKENS
        if isinstance(tokens, bool) or not isinstance(tokens, Integral) or tokens < 0:
            raise InputError(got=f"max_new_tokens={tokens!r:.60}", expected="an integer from 0", remedy="Omit it for 400")
        object.__setattr__(self, "max_new_tokens", int(tokens))
        if self.chunk_overlap and self.segmentation != "fixed":
            raise InputError(
                got=f"chunk_overlap={self.chunk_overlap} with segmentation={self.segmentation!r}",
                expected="segmentation='fixed': other windows overlap only where they cut a word",
                remedy="Omit chunk_overlap, or pass segmentation='fixed'",
            )
        object.__setattr__(self, "clip_timestamps", _spans(self.clip_timestamps))

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            expected = ", ".join(map(repr, choices))
            raise InputError(got=f"{name}={value!r:.60}", expected=f"one of {expected}", remedy="Correct it, or omit it")

    def _number(self, name: str, least: float, above: bool = False) -> float:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real) or not least <= value < math.inf or (above and value == least):
            expected = f"a number {'above' if above else 'from'} {least:g}"
            raise InputError(got=f"{name}={value!r:.60}", expected=expected, remedy="Correct it, or omit it")
        return value


def _check_other(name: str, value: Any, known: Iterable[str], others: Mapping[str, tuple[tuple[Any, ...] | None, str]]) -> None:
    """Refuse an option that is unknown, or has a value that changes the result elsewhere."""
    if name not in others:
        raise InputError(got=f"the option {name!r:.60}", expected=f"one of {', '.join(known)}", remedy="Correct the name")
    accepted, remedy = others[name]
    if accepted is not None and not any(value is one or value == one for one in accepted):
        raise InputError(got=f"{name}={value!r:.60}, which is not supported here", expected=" or ".join(map(repr, accepted)), remedy=remedy)


def _spans(given: Any) -> tuple[tuple[float, float | None], ...] | None:
    """Pairs of start and end in seconds, in order; the last end may be None. None: everything."""
    if given is None or (isinstance(given, str) and not given.strip()):
        return None
    points = [point for one in _points(given) for point in (one if isinstance(one, (list, tuple)) else [one])]
    try:
        seconds = [None if point is None else float(point) for point in points]
    except (TypeError, ValueError):
        seconds = [math.nan]
    if seconds == [0.0]:  # whisper's default
        return None
    ends = [math.inf if point is None else point for point in seconds]
    pairs = list(zip(ends[::2], [*ends[1::2], math.inf], strict=False))
    ordered = all(start < end for start, end in pairs) and all(one[1] <= other[0] < math.inf for one, other in pairwise(pairs))
    if not ends or not all(point >= 0 for point in ends) or not ordered:
        raise InputError(
            got=f"clip_timestamps={given!r:.100}",
            expected="start, end, start, end, … in seconds, each later than the one before",
            remedy="Pass for example '10,20,30.5,45'",
        )
    return tuple((start, None if math.isinf(end) else end) for start, end in pairs)


def _points(given: Any) -> Iterable[Any]:
    if isinstance(given, str):
        return [part.strip() for part in given.split(",")]
    return [given] if isinstance(given, Real) or not isinstance(given, Iterable) else list(given)
