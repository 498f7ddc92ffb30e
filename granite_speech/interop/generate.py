"""`generate` of an accelerated model: the captured decode step for the calls that it serves, transformers' loop for all others."""

import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from granite_speech.errors import GraniteSpeechError, InputError, UnsupportedError
from granite_speech.generation.config import GenerationConfig
from granite_speech.generation.options import GenerationOptions
from granite_speech.modules.autocast import autocast_dtype

__all__ = ["generated"]

# The order of transformers' parameters, in all of its versions that have Granite Speech.
_POSITIONAL = ("inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus")
_POSITIONAL += ("assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask")
_TENSORS = ("inputs", "input_ids", "attention_mask", "input_features", "input_features_mask", "inputs_embeds")
_OTHERS = ("generation_config", "streamer", "tokenizer")
# Served only if they are None, False or an empty list.
_THEIRS = (*_POSITIONAL[2:7], *_POSITIONAL[8:], "use_model_defaults", "custom_generate", "position_ids", "past_key_values")
_THEIRS += ("input_features_lengths", "labels", "cache_position")
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


def _answer(acceleration: Any, live: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    if len(arguments) > len(_POSITIONAL) or live.training or autocast_dtype(live.device) is not None or _is_customised(live):
        raise _NotServedError
    inputs, others, settings = _sorted(live, dict(zip(_POSITIONAL, arguments, strict=False)) | options)
    of_model, of_call = _set_values(live.generation_config), _set_values(others.get("generation_config"))
    prompts = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
    options = _resolved(settings, of_call, of_model, prompts.shape[1])
    if not _is_captured(options, prompts, inputs.get("attention_mask")):
        raise _NotServedError
    is_whole = live is acceleration.live
    if is_whole and getattr(live, "_hf_peft_config_loaded", False):
        # As transformers' own method does.
        live.enable_adapters() if "input_features" in inputs else live.disable_adapters()
    if not acceleration.generates():
        raise _NotServedError
    twin = acceleration.twin
    if not is_whole or "inputs_embeds" in inputs or not acceleration.encodes():
        inputs, twin = _embedded(acceleration.speech, inputs), twin.language_model
    twin.generation_config = of_model
    streamer = _Streamer(others["streamer"]) if "streamer" in others else None
    try:
        answer = twin.generate(**inputs, **settings, generation_config=of_call, tokenizer=others.get("tokenizer"), streamer=streamer)
    except (InputError, UnsupportedError) as error:
        if streamer is not None and streamer.has_begun:
            raise
        raise _NotServedError from error  # transformers may accept it, or has an error of its own
    if streamer is not None:
        streamer.close()
    return answer


@torch.no_grad()
def _embedded(speech: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prompts whose audio, if they have any, transformers' own encoder and projector turn into embeddings."""
    if "input_features" not in inputs:
        return inputs
    inputs = dict(inputs)
    found = speech.get_audio_features(inputs.pop("input_features").to(speech.dtype))
    vectors = found if isinstance(found, Tensor) else found.pooler_output
    kept = inputs.pop("input_features_mask", None)
    return inputs | {"inputs_embeds": speech.get_merged_audio_embeddings(inputs["input_ids"], vectors, kept)}


def _is_customised(live: nn.Module) -> bool:
    """Whether somebody else's method would run in transformers' loop."""
    if any(name in vars(live) for name in _METHODS):
        return True
    found = (getattr(type(live), name, None) for name in _METHODS)
    # Where a function was written, not its __module__, which functools.wraps copies. Decorators of torch are transformers' choice.
    homes = (one.__globals__["__name__"] for one in found if one is not None)
    return not all(home.startswith(("transformers.", "torch.")) for home in homes)


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
    if "input_ids" in inputs and inputs["input_ids"].dtype != torch.int64:
        raise _NotServedError  # transformers' answer has the dtype of its new tokens
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
    # 4.56 the answer: it runs the prompt in pieces without the audio.
    if given.get("temperature") == 0 or given.get("use_cache") is False or given.get("prefill_chunk_size"):
        raise _NotServedError
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `generate` resolves them again, and warns then
        try:
            return GenerationOptions.resolve(settings, of_call, of_model, columns)
        except GraniteSpeechError as error:
            raise _NotServedError from error


def _is_captured(options: GenerationOptions, prompts: Tensor, mask: Tensor | None) -> bool:
    """Whether a captured step could serve a call. Without graphs, transformers' own loop is as fast as one here."""
    if options.num_beams > 1 or options.return_dict_in_generate or options.rules or options.max_new_tokens == 0:
        return False
    # Here a penalty leaves padding out, so that an answer does not depend on its neighbours; in transformers it does not.
    return options.repetition_penalty == 1 or bool((mask if mask is not None else prompts != options.fill).all())


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
