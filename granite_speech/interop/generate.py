"""`generate` of an accelerated model: the captured decode step for the calls that it serves, transformers' loop for all others."""

from contextlib import suppress
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from granite_speech.errors import GraniteSpeechError, InputError, UnsupportedError
from granite_speech.generation.config import GenerationConfig
from granite_speech.generation.options import GenerationOptions
from granite_speech.interop.follow import is_known_code, is_own, usual_device
from granite_speech.modules.autocast import autocast_dtype

__all__ = ["generated", "is_customised"]

# The order of transformers' parameters, in all of its versions that have Granite Speech.
_POSITIONAL = ("inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus")
_POSITIONAL += ("assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask")
_TENSORS = ("inputs", "input_ids", "attention_mask", "input_features", "input_features_mask", "inputs_embeds")
_OTHERS = ("generation_config", "streamer", "tokenizer")
# Served only if they are None, False or an empty list.
_THEIRS = (*_POSITIONAL[2:7], *_POSITIONAL[8:], "use_model_defaults", "custom_generate", "position_ids", "past_key_values")
_THEIRS += ("input_features_lengths", "labels", "cache_position")
# Types of options that mean the same everywhere; of others, transformers accepts some for some options.
_PLAIN = (NoneType, bool, int, float, str, list, tuple, dict)
# What transformers' loop calls on the model. If one of these was replaced, its code must run.
_METHODS = ("forward", "prepare_inputs_for_generation", "get_audio_features", "get_merged_audio_embeddings", "_sample")


class _NotServedError(Exception):
    """A call that the captured step does not serve."""


def generated(acceleration: Any, live: nn.Module, own: Any, *arguments: Any, **options: Any) -> Any:
    """What transformers' `generate` returns.

    Args:
        acceleration: of the model.
        live: the model whose method was called: the whole one or, up to transformers 5.9, its language model.
        own: the method.
        arguments, options: of the call.
    """
    with suppress(_NotServedError):
        return _answer(acceleration, live, arguments, options)
    return own(*arguments, **options)


def _answer(acceleration: Any, live: nn.Module, arguments: tuple[Any, ...], call: dict[str, Any]) -> Tensor:
    is_wrong = len(arguments) > len(_POSITIONAL) or not call.keys().isdisjoint(_POSITIONAL[: len(arguments)])
    if is_wrong or live.training or autocast_dtype(live.device) is not None or any(map(is_customised, acceleration.whole)):
        raise _NotServedError
    inputs, others, settings = _sorted(live, dict(zip(_POSITIONAL, arguments, strict=False)) | call)
    of_model, of_call = _set_values(live.generation_config), _set_values(others.get("generation_config"))
    [columns, *others_columns] = {inputs[name].shape[1] for name in ("input_ids", "inputs_embeds") if name in inputs}
    if others_columns:
        raise _NotServedError
    options = _resolved(settings, of_call, of_model, columns)
    if not _is_captured(options, inputs.get("input_ids"), inputs.get("attention_mask")):
        raise _NotServedError
    is_whole = live is acceleration.live
    if is_whole and getattr(live, "_hf_peft_config_loaded", False):
        # As transformers' own method does.
        live.enable_adapters() if "input_features" in inputs else live.disable_adapters()
    if not acceleration.generates():
        raise _NotServedError
    twin = acceleration.twin if is_whole else acceleration.twin.language_model
    if "input_features" in inputs and not acceleration.encodes():
        inputs = _embedded(acceleration.speech, inputs)
    streamer = _Streamer(others["streamer"]) if "streamer" in others else None
    try:
        with usual_device():
            inputs["position_ids"] = _positions(inputs, options)
            answer = twin.generate(**inputs, generation_config=options, tokenizer=others.get("tokenizer"), streamer=streamer)
    except (InputError, UnsupportedError) as error:
        if streamer is not None and streamer.has_begun:
            raise
        raise _NotServedError from error  # transformers may accept it, or has an error of its own
    if streamer is not None:
        streamer.close()
    return answer


@torch.no_grad()
def _embedded(speech: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prompts whose audio transformers' own encoder and projector turn into embeddings."""
    inputs = dict(inputs)
    found = speech.get_audio_features(inputs.pop("input_features").to(speech.dtype))
    vectors = found if isinstance(found, Tensor) else found.pooler_output
    kept = inputs.pop("input_features_mask", None)
    return inputs | {"inputs_embeds": speech.get_merged_audio_embeddings(inputs["input_ids"], vectors, kept)}


def _positions(inputs: dict[str, Tensor], options: GenerationOptions) -> Tensor | None:
    """`(rows, columns)`: transformers does not count masked columns, inside a prompt either. None if there are none."""
    mask, pad = inputs.get("attention_mask"), options.pad_token_id
    if mask is None and "input_ids" in inputs and pad is not None and pad not in options.eos_token_id:
        mask = inputs["input_ids"] != pad
    return None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)


def is_customised(module: nn.Module) -> bool:
    """Whether somebody else's method would run in transformers' loop."""
    kind = type(module)
    if any(callable(one) and hasattr(kind, name) and not is_own(module, name) for name, one in vars(module).items()):
        return True
    known, others = {}, {}
    for one in kind.__mro__:
        home = one.__module__.partition(".")[0]
        (known if home in ("transformers", "torch") else {} if home == "granite_speech" else others).update(vars(one))
    if any(name in known and callable(one) and not name.startswith("__") for name, one in others.items()):
        return True
    found = (getattr(kind, name, None) for name in _METHODS)
    return not all(is_known_code(one) for one in found if one is not None)


def _sorted(live: nn.Module, call: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """A call's prompts, objects, and options by name."""
    for name in _THEIRS:
        value = call.pop(name, None)
        if value is not None and value is not False and not (isinstance(value, list) and not value):
            raise _NotServedError
    inputs, others = ({name: call.pop(name) for name in names if call.get(name) is not None} for names in (_TENSORS, _OTHERS))
    if "inputs" in inputs:
        inputs.setdefault("input_ids", inputs.pop("inputs"))
    is_served = all(isinstance(one, Tensor) and one.device == live.device for one in inputs.values())
    if not is_served or "inputs" in inputs or not inputs.keys() & {"input_ids", "inputs_embeds"}:
        raise _NotServedError
    ranks = {"input_ids": 2, "attention_mask": 2, "inputs_embeds": 3}
    if any(one.dim() != ranks.get(name, one.dim()) for name, one in inputs.items()):
        raise _NotServedError
    if {"inputs_embeds", "input_features"} <= inputs.keys():
        raise _NotServedError
    types = {"input_ids": torch.int64, "input_features_mask": torch.bool}  # with others, transformers' answer is another one
    if any(one.dtype != types.get(name, one.dtype) or 0 in one.shape for name, one in inputs.items()):
        raise _NotServedError
    settings = {name: value for name, value in call.items() if name not in (*_TENSORS, *_OTHERS)}
    if not all(hasattr(live.generation_config, name) for name in settings):
        raise _NotServedError  # an argument of `forward`, or an option that this version of transformers does not have
    return inputs, others, settings


def _set_values(config: Any) -> GenerationConfig | None:
    """A configuration of transformers without its defaults, which in its version 4 look like values that somebody chose."""
    if config is None:
        return None
    if not callable(getattr(config, "to_diff_dict", None)):
        raise _NotServedError
    return GenerationConfig(**config.to_diff_dict())


def _resolved(settings: dict[str, Any], of_call: GenerationConfig | None, of_model: GenerationConfig, columns: int) -> GenerationOptions:
    given = {name: value for one in (of_model, of_call) if one is not None for name, value in vars(one).items() if value is not None}
    given |= settings
    # A temperature of 0 is an error of transformers. The others change nothing here, but in transformers the rounding, and in its version
    # 4.56 the answer: it runs the prompt in pieces without the audio. 5.23 refuses to split a prompt with audio.
    if not all(isinstance(one, _PLAIN) for one in given.values()):
        raise _NotServedError
    if given.get("temperature") == 0 or not given.get("use_cache", True) or given.get("prefill_chunk_size"):
        raise _NotServedError
    try:
        return GenerationOptions.resolve(settings, of_call, of_model, columns, warns=False)
    except GraniteSpeechError as error:
        raise _NotServedError from error


def _is_captured(options: GenerationOptions, ids: Tensor | None, mask: Tensor | None) -> bool:
    """Whether a captured step could serve a call. Without graphs, transformers' own loop is as fast as one here."""
    if options.num_beams > 1 or options.return_dict_in_generate or options.rules or options.max_new_tokens == 0:
        return False
    # Here a penalty leaves padding out, so that an answer does not depend on its neighbours. transformers 4.56 and 5.17 punish it, and 5.23
    # does not punish the tokens of an answer to embeddings that are padded.
    if options.repetition_penalty == 1 or (ids is None and mask is None):
        return True
    return bool((ids != options.fill if mask is None else mask).all())


class _Streamer:
    """A caller's streamer. Its end waits until it is certain that transformers' loop does not run as well."""

    def __init__(self, streamer: Any):
        self.put, self._streamer, self.has_begun = self._put, streamer, False

    def _put(self, value: Tensor) -> None:
        self.has_begun = True
        self._streamer.put(value)

    def end(self) -> None:
        """Called by `generate`; `close` ends the stream."""

    def close(self) -> None:
        self._streamer.end()
