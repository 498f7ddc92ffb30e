"""A request on its way through the engine: what was asked, what has been computed, and which pages and row it has."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from granite_speech.engine.handle import Handle
from granite_speech.engine.pages import prefixes_of
from granite_speech.engine.state import Row
from granite_speech.errors import InputError
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.stop_strings import StopStrings
from granite_speech.modules.forward import SpeechToStates
from granite_speech.modules.packing import host_lengths, pack_clips
from granite_speech.modules.prompts import ModelInputs

__all__ = ["Prompt", "Repetition", "Request", "engine_options"]

# Options of `generate` whose value an engine cannot give a meaning.
_OF_GENERATE_ALONE = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_hidden_states": False,
    "max_time": None,
}

_INPUTS = {"input_ids", "attention_mask", "input_features", "input_features_mask", "input_features_lengths"}


@dataclass(frozen=True)
class Prompt:
    """Input of one request, checked.

    Attributes:
        ids: `(tokens,)` int64 on the host.
        is_audio: `(tokens,)` bool on the host.
        frames: `(frames, input_dim)` of all its clips, packed, on the model's device; None: no audio.
        clips: frames of each clip.
        has_audio: whether the adapter is on.
        prefixes: digests of the pages before any audio (`prefixes_of`).
    """

    ids: Tensor
    is_audio: Tensor
    frames: Tensor | None
    clips: tuple[int, ...]
    has_audio: bool
    prefixes: list[bytes]

    @classmethod
    def of(cls, model: SpeechToStates, inputs: Mapping[str, Any]) -> "Prompt":
        """Check the processor's inputs for one prompt.

        Raises:
            InputError: more than one prompt, or inputs that do not fit together or to the model.
        """
        _check_names(inputs)
        given = ModelInputs(**inputs)
        host = given.on_host()
        ids = _ids(host.input_ids, host.attention_mask)
        frames, clips, vectors = None, (), 0
        if given.input_features is not None:
            features = given.input_features
            lengths = given.input_features_lengths
            if lengths is not None:
                lengths = host_lengths(host.input_features_lengths, len(features), features.shape[1], "input_features_lengths")
            frames, segments = pack_clips(features.to(model.device, model.dtype), None if lengths is None else list(lengths))
            _check_width(frames, model.config.encoder_config.input_dim)
            clips = segments.lengths
            tokens = [model.projector.tokens(one) for one in clips]
            _check_mask(host.input_features_mask, tokens)
            vectors = sum(tokens)
        is_audio = model.audio_tokens(ids, vectors)
        text = int(is_audio.int().argmax()) if vectors else len(ids)
        # The last token is run by the decode step, which stores its key in a page of the request's own.
        prefixes = prefixes_of(ids[: min(text, len(ids) - 1)].tolist(), has_audio=vectors > 0)
        return cls(ids, is_audio, frames, clips, vectors > 0, prefixes)

    @property
    def work(self) -> int:
        """Frames and tokens to compute before the answer begins."""
        return sum(self.clips) + len(self.ids)


class Repetition:
    """Notices that an answer goes round in circles: its last 32 or more tokens are one block of up to 64, at least 4 times."""

    _LONGEST_BLOCK, _TIMES, _TOKENS = 64, 4, 32

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._equal = [0] * (self._LONGEST_BLOCK + 1)  # by distance: how many of the last tokens equal the one so far before them

    def add(self, token: int) -> bool:
        """Add a token; whether the answer repeats itself now."""
        self._tokens.append(token)
        repeats = False
        for distance in range(1, min(self._LONGEST_BLOCK, len(self._tokens) - 1) + 1):
            equal = self._equal[distance] + 1 if self._tokens[-1 - distance] == token else 0
            self._equal[distance] = equal
            # A block that is there n times has n − 1 copies of itself after it.
            repeats |= equal >= max((self._TIMES - 1) * distance, self._TOKENS - distance)
        return repeats


@dataclass(eq=False)
class Request:
    """A request in an engine.

    Attributes:
        prompt: its input.
        options: how to decode.
        seed: of its random numbers.
        handle: what its caller holds.
        stops: its text so far, if it has stop strings.
        repetition: watches its tokens, if it should stop when they repeat.
        wants_ctc: whether its handle gets the log-probabilities of the encoder's CTC head.
        due: the work that the engine should have begun before this request; the smallest comes first.
        vectors: `(audio tokens, hidden)`, once its audio is encoded.
        tokens: of the answer, as far as the host has read.
        pages: that its keys are in.
        keys: stored, or to be stored by steps that are launched.
        place: its row in the decode state.
        computed: on a GPU, after its features.
    """

    prompt: Prompt
    options: GenerationOptions
    seed: int
    handle: Handle
    stops: StopStrings | None
    repetition: Repetition | None = None
    wants_ctc: bool = False
    due: int = 0
    vectors: Tensor | None = None
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    keys: int = 0
    place: int | None = None
    computed: torch.cuda.Event | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return len(self.prompt.ids) + len(self.tokens)

    @property
    def last_keys(self) -> int:
        """Keys with which the answer has its last token."""
        return len(self.prompt.ids) + self.options.max_new_tokens - 1

    @property
    def waits_for_audio(self) -> bool:
        return self.prompt.frames is not None and self.vectors is None

    @property
    def is_prefilled(self) -> bool:
        """Whether all tokens but the last have keys, so that the decode step can go on from there."""
        return self.keys == self.length - 1

    def ids(self, start: int, end: int) -> Tensor:
        """Token ids of prompt and answer, on the host."""
        return torch.cat((self.prompt.ids, torch.tensor(self.tokens, dtype=torch.int64)))[start:end]

    def audio(self, start: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Which of these tokens are audio, `(end − start,)` bool on the host, and their vectors."""
        is_audio = torch.zeros(end - start, dtype=torch.bool)
        own = self.prompt.is_audio[start:end]
        is_audio[: len(own)] = own
        if self.vectors is None or not bool(own.any()):
            return is_audio, None
        first = int(self.prompt.is_audio[:start].sum())
        return is_audio, self.vectors[first : first + int(own.sum())]

    @property
    def last_token(self) -> int:
        return self.tokens[-1] if self.tokens else int(self.prompt.ids[-1])

    @property
    def begins_with_audio(self) -> bool:
        """Whether the token that the decode step runs first is audio."""
        return not self.tokens and bool(self.prompt.is_audio[-1])

    def row(self) -> Row:
        """How it enters the decode state."""
        return Row(
            self.options,
            prompt=len(self.prompt.ids),
            keys=self.keys,
            position=self.keys - 1,
            has_audio=self.prompt.has_audio,
            token=self.last_token,
            seed=self.seed,
        )

    def end_of(self, token: int) -> str | None:
        """Take a token of the answer. The finish reason, if it is the last one."""
        self.tokens.append(token)
        stopped = False
        if self.stops is not None:
            [stopped] = self.stops.ends([0], [token])
            self.stops.extend([0], [token])
        if stopped or token in self.options.eos_token_id:
            return "stop"
        if len(self.tokens) == self.options.max_new_tokens:
            return "length"
        return "repeated" if self.repetition is not None and self.repetition.add(token) else None


def engine_options(call: dict[str, Any], model: Any, columns: int) -> GenerationOptions:
    """The options of a request: those of the call, then those of the checkpoint's generation_config.json.

    A temperature above 0, top_k, top_p or a seed asks for sampling; temperature 0 is greedy.

    Raises:
        InputError: an option that is unknown, out of range, or of `generate` alone.
    """
    given = {name: value for name, value in call.items() if value is not None}
    if given.get("temperature") == 0 and not given.get("do_sample"):
        given = {name: value for name, value in given.items() if name not in ("temperature", "top_k", "top_p", "seed")} | {
            "do_sample": False
        }
    elif given.keys() & {"temperature", "top_k", "top_p", "seed"}:
        given.setdefault("do_sample", True)
    given.pop("seed", None)
    options = GenerationOptions.resolve(given, None, model.generation_config, columns)
    for name, value in _OF_GENERATE_ALONE.items():
        if getattr(options, name) != value:
            raise InputError(
                got=f"a request with {name}={getattr(options, name)!r}",
                expected=f"{name}={value!r}: an engine decodes one answer to each prompt, token by token",
                remedy=f"Call model.generate, or pass {name}={value!r}",
            )
    if options.rules:
        raise InputError(
            got=f"a request with {', '.join(options.rules)}",
            expected="options that a captured step has: sampling with temperature, top_k and top_p, repetition_penalty, min_new_tokens",
            remedy=f"Call model.generate, or omit {', '.join(options.rules)}",
        )
    return options


def _check_names(inputs: Mapping[str, Any]) -> None:
    if not isinstance(inputs, Mapping) or inputs.keys() - _INPUTS:
        got = f"with {sorted(inputs.keys() - _INPUTS)!r:.100}" if isinstance(inputs, Mapping) else f"of type {type(inputs).__name__}"
        raise InputError(got=f"inputs {got}", expected=f"some of {', '.join(sorted(_INPUTS))}", remedy="Pass what the processor returned")


def _ids(ids: Any, mask: Tensor | None) -> Tensor:
    """The tokens `(tokens,)` of one prompt that are not masked."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        got = f"of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"{ids!r:.60}"
        raise InputError(got=f"input_ids {got}", expected="one prompt, (1, tokens)", remedy="Submit each prompt on its own")
    if ids.is_floating_point():
        raise InputError(got=f"input_ids of {ids.dtype}", expected="integers", remedy="Use what the processor returned")
    if mask is not None and mask.shape != ids.shape:
        raise InputError(
            got=f"attention_mask of shape {tuple(mask.shape)}",
            expected=f"that of input_ids, {tuple(ids.shape)}",
            remedy="Use what the processor returned together with input_ids, or omit it",
        )
    ids = ids[0].long() if mask is None else ids[0].long()[mask[0] != 0]
    if len(ids) == 0:
        raise InputError(got="an empty prompt", expected="at least one token", remedy="Give the model a text to continue")
    return ids


def _check_mask(mask: Tensor | None, tokens: list[int]) -> None:
    if mask is not None and mask.sum(-1).tolist() != tokens:
        raise InputError(
            got=f"input_features_mask with {mask.sum(-1).tolist()!r:.100} true values",
            expected=f"{tokens!r:.100}, one for each audio vector",
            remedy="Use what the processor returned together with input_features",
        )


def _check_width(frames: Tensor, expected: int) -> None:
    if frames.shape[1] != expected:
        raise InputError(
            got=f"input_features with {frames.shape[1]} features per frame",
            expected=f"{expected}",
            remedy="Use the processor of this checkpoint",
        )
