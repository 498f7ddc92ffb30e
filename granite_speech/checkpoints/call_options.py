"""transformers' options of `from_pretrained` and `save_pretrained` that change nothing here.

They are accepted, so that a call written for transformers runs unchanged. At a value that would change the result, an option is
refused by name; an unknown option is refused with the closest known one.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from granite_speech.errors import InputError, UnsupportedError

__all__ = ["HUB_OPTIONS", "check_unused", "hub_options", "pop_hub_options"]

# Accepted with any value.
_WITHOUT_EFFECT = {
    # Code from a checkpoint is never run, and pickles are never opened.
    *("trust_remote_code", "code_revision", "weights_only"),
    # How files are found, read and counted. Weights are always read straight to their place.
    *("low_cpu_mem_usage", "disable_mmap", "resume_download", "mirror", "local_dir_use_symlinks", "user_agent", "tqdm_class"),
    *("_fast_init", "_from_auto", "_from_pipeline", "_commit_hash", "config"),
    # Where weights wait while a model is spread over devices. Here a model is on one.
    *("max_memory", "offload_folder", "offload_state_dict", "offload_buffers"),
    # The kernels are always those of this package, and every implementation computes the same.
    *("use_fast", "use_flash_attention_2", "use_kernels", "allow_all_kernels", "kernel_config", "experts_implementation"),
    # Saved folders have the layout that all versions of transformers and peft read. Only weights are split into shards.
    *("save_peft_format", "save_original_format", "max_shard_size"),
}

_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
_ONE_DEVICE = "Omit it; a model runs on one device here"
_NO_PICKLES = "Omit it, or pass True; only safetensors files are read and written, because a pickle can run code when it is opened"
_NOT_QUANTISED = "Omit it, and pass quantize='int8' to a model's from_pretrained, or dtype=torch.bfloat16, for smaller weights"

# Option: the values other than None that change nothing, and the remedy for any other value.
_AT_THESE_VALUES: dict[str, tuple[tuple, str]] = {
    "use_safetensors": ((True,), _NO_PICKLES),
    "safe_serialization": ((True,), _NO_PICKLES),
    "from_tf": ((False,), "Convert the weights to safetensors with an earlier transformers"),
    "from_flax": ((False,), "Convert the weights to safetensors with an earlier transformers"),
    "load_in_8bit": ((False,), _NOT_QUANTISED),
    "load_in_4bit": ((False,), _NOT_QUANTISED),
    "quantization_config": ((), _NOT_QUANTISED),
    "gguf_file": ((), "Load the safetensors weights that the file was made from"),
    "proxies": (({},), "Set the environment variable HTTPS_PROXY"),
    "tp_plan": ((), _ONE_DEVICE),
    "tp_size": ((1,), _ONE_DEVICE),
    "device_mesh": ((), _ONE_DEVICE),
    "distributed_config": ((), _ONE_DEVICE),
    "distributed_checkpoint": ((False,), "Omit it; gather the weights on one process and pass them as state_dict="),
    "fusion_config": (({},), "Omit it; the kernels are already fused"),
    "key_mapping": (({},), "Rename the weights in the file, or load them with load_state_dict"),
    "adapter_kwargs": (({},), "Download the adapter's folder, and load the adapter from there"),
    "adapter_name": (("default",), "Load the adapter after the model, under its name"),
    "variant": (("",), "Omit it; only the weights of a model have variants"),
    "state_dict": ((), "Load the model first, and call its load_state_dict"),
    "output_loading_info": ((False,), "Omit it; only a model returns loading information"),
    "ignore_mismatched_sizes": ((False,), "Omit it, and correct the configuration"),
}

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def pop_hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of `hub.resolve` from a call's options and return them. `use_auth_token` is an earlier name of `token`."""
    found = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    earlier = options.pop("use_auth_token", None)
    if found.get("token") is None and earlier is not None:
        found["token"] = earlier
    return found


def hub_options(options: dict[str, Any], call: str) -> dict[str, Any]:
    """The options of `hub.resolve` among a call's options; the others must be those that change nothing here.

    Raises:
        InputError, UnsupportedError: as `check_unused`.
    """
    options = dict(options)
    found = pop_hub_options(options)
    check_unused(options, call)
    return found


def check_unused(options: Mapping[str, Any], call: str, known: Iterable[str] = ()) -> None:
    """Accept options that change nothing here, and refuse all others.

    Args:
        options: name → value, of those that the call itself does not use.
        call: the name of the call, for the message.
        known: names of the options that the call uses, to be suggested for a misspelled one.

    Raises:
        UnsupportedError: an option of transformers at a value that would change the result.
        InputError: an unknown option.
    """
    for name, value in options.items():
        if name in _WITHOUT_EFFECT or (value is None and name in _AT_THESE_VALUES):
            continue
        if name in ("attn_implementation", "_attn_implementation"):
            _check_attention(name, value)
        elif name in _AT_THESE_VALUES:
            accepted, remedy = _AT_THESE_VALUES[name]
            if not any(type(value) is type(one) and value == one for one in accepted):
                raise UnsupportedError(
                    got=f"{name}={value!r:.100} for {call}", expected=" or ".join(map(repr, (None, *accepted))), remedy=remedy
                )
        else:
            raise _unknown(name, call, {*known, *HUB_OPTIONS, *_WITHOUT_EFFECT, *_AT_THESE_VALUES, "attn_implementation"})


def _check_attention(name: str, value: Any) -> None:
    """The names that transformers knows, one for each part of the model, or that of a kernel's repository."""
    for one in value.values() if isinstance(value, dict) else [value]:
        known = one is None or (isinstance(one, str) and (one.removeprefix("paged|") in _ATTENTION or "/" in one))
        if not known:
            raise InputError(
                got=f"{name}={value!r:.100}",
                expected=f"one of {', '.join(_ATTENTION)}, which all compute the same here",
                remedy="Omit it",
            )


def _unknown(name: str, call: str, known: set[str]) -> InputError:
    close = get_close_matches(str(name), [one for one in known if not one.startswith("_")], n=1)
    return InputError(
        got=f"unknown option {name!r} for {call}",
        expected="the options of transformers' call of this name",
        remedy=f"Did you mean {close[0]!r}?" if close else "Remove it",
    )
