"""`from_pretrained`: a folder or hub id to a model."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Self
from warnings import warn

import torch
from torch import nn

from granite_speech.checkpoints.adapter_folder import base_of_adapter, is_only_adapter, with_adapter
from granite_speech.checkpoints.call_options import check_unused, pop_hub_options
from granite_speech.checkpoints.folder import Checkpoint, load_into, load_json, resolve
from granite_speech.checkpoints.free_memory import return_free_memory
from granite_speech.checkpoints.placement import choose_device, choose_dtype
from granite_speech.checkpoints.weight_names import HEAD, canonical_keys, is_lora, is_optional
from granite_speech.config import GraniteSpeechConfig
from granite_speech.config_base import Config
from granite_speech.config_files import config_from_dict
from granite_speech.errors import CheckpointError, ConfigError, InputError
from granite_speech.generation.config import GenerationConfig
from granite_speech.modules.adapter import attach_adapter
from granite_speech.modules.adapter_config import AdapterConfig
from granite_speech.modules.int8_layers import layers_to_round, pack, round_to_int8
from granite_speech.modules.int8_weight import Int8Weight
from granite_speech.modules.quantized import check_quantize, refuse_quantized
from granite_speech.modules.side_by_side import arrange, destinations
from granite_speech.saving import Saving
from granite_speech.trainer_checkpoints import complete_trainer

__all__ = ["Pretrained", "as_config"]


class Pretrained(Saving):
    """Initialising, loading and saving weights, for the public models."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = self._as_config(config)
        self.config.validate()
        self.config.complete_attention("sdpa")  # what transformers chooses if nothing is given

    @classmethod
    def _as_config(cls, config: Any) -> Config:
        """`as_config`, for the configuration class of this model."""
        return as_config(config, cls.config_class)

    def _arranged(self) -> tuple[nn.Module, nn.Module | None]:
        """The layers whose weights lie side by side, and a head (`side_by_side.arrange`)."""
        return self.decoder, self.get_output_embeddings()

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `forward` takes `num_items_in_batch`. transformers' Trainer asks when it is given the model."""
        complete_trainer()
        return True

    @property
    def _keys_to_ignore_on_save(self) -> list[str] | None:
        """Names in the state dict that model.safetensors does not have: those of the adapter. The Trainer does not miss them there."""
        return [name for name in self.state_dict() if is_lora(name)] or None

    @torch.no_grad()
    def initialize_weights(self, names: Collection[str] | None = None) -> None:
        """Random weights distributed as transformers' are: normal with `initializer_range`, zero biases, norms of one.

        Args:
            names: in the state dict, of the weights to initialise; all linear layers, convolutions and embeddings if omitted.
        """
        deviation = self.config.initializer_range
        for path, module in self.named_modules():
            if names is None and not isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
                continue
            for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if names is not None and f"{path}.{leaf}".removeprefix(".") not in names:
                    continue
                if leaf in ("bias", "running_mean"):
                    tensor.zero_()
                elif leaf == "running_var" or (leaf == "weight" and tensor.ndim == 1):
                    tensor.fill_(1)
                else:
                    tensor.normal_(std=deviation)

    def init_weights(self) -> None:
        """Random weights in place of the present ones; not for int8 weights."""
        refuse_quantized(self, "init_weights")
        self.initialize_weights()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        config: Config | Mapping[str, Any] | str | Path | None = None,
        cache_dir: str | Path | None = None,
        ignore_mismatched_sizes: bool = False,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = "main",
        use_safetensors: bool | None = None,
        weights_only: bool = True,
        fusion_config: dict[str, Any] | None = None,
        disable_mmap: bool | None = None,
        subfolder: str | Path = "",
        variant: str | None = None,
        dtype: torch.dtype | str | dict[str, Any] | None = None,
        torch_dtype: torch.dtype | str | dict[str, Any] | None = None,
        device: torch.device | str | int | None = None,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        generation_config: Any = None,
        output_loading_info: bool = False,
        quantize: str | None = None,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Load a checkpoint, adapter included, in evaluation mode.

        Weights go straight to their device and dtype, one tensor at a time. Names and shapes are compared before anything is
        allocated; a weight that is not in the files is an error.

        Args:
            pretrained_model_name_or_path: a folder, "embedded", or a hub id such as "ibm-granite/granite-speech-3.3-2b"
                (`hub.resolve`). It may hold only an adapter, as peft saves it; the model named there is then loaded with this adapter in
                place of its own. None with `config` and `state_dict`.
            config: replaces the folder's config.json: a configuration of this package or of transformers, a dictionary, or a path.
            cache_dir, force_download, local_files_only, token, revision, subfolder: of the hub.
            ignore_mismatched_sizes: give weights whose shape in the file differs from the model's random values, instead of failing.
            variant: read "model.<variant>.safetensors".
            dtype: of the weights; "auto" and None take the configuration's, or if it has none the file's. "fastest" is bfloat16 on a CPU
                that multiplies it faster than float32, and float32 on others; on a GPU, the configuration's if that has 16 bits,
                otherwise bfloat16.
            torch_dtype: the earlier name of `dtype`.
            device: where the weights go; the CPU if omitted.
            device_map: transformers' name for the same: a device, {"": device}, or "auto" (CUDA if available).
            state_dict: the weights, in place of the folder's, with the names of this package or of transformers.
            generation_config: the options of `generate` that its calls do not set, in place of the folder's.
            output_loading_info: return a tuple of the model and a dictionary of the weights that did not match.
            quantize: "int8" rounds the weights of the language model's layers to 8 bits as they are read (`modules/quantized.py`), so
                that they need half the memory of bfloat16; on a CPU that multiplies 8-bit integers fast, also those of the encoder
                and the projector, and multiplies in 8 bits. Such a model answers; it cannot be trained, merged or saved.
            use_safetensors, weights_only, fusion_config, disable_mmap: of transformers. At their usual values they change nothing here
                (`call_options`).
            kwargs: values that replace those of config.json (`text_config={"attention_dropout": 0.1}`), and transformers' options
                that change nothing here (`attn_implementation`, `trust_remote_code`, `low_cpu_mem_usage` and others).

        Raises:
            CheckpointNotFoundError: no such folder or hub id.
            CheckpointError: damaged files, or weights that do not match the configuration.
            ConfigError, UnsupportedError: another kind of model, or a value that no model can be built from; an option that would
                change the result and is not supported.
            InputError: an unknown option.
        """
        if model_args:
            raise InputError(
                got=f"{len(model_args)} more positional arguments", expected="only the folder or hub id", remedy="Pass them by name"
            )
        check_quantize(quantize)
        target = choose_device(device, device_map)
        kwargs |= {"use_safetensors": use_safetensors, "fusion_config": fusion_config}
        hub = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only, "token": token}
        hub |= {"revision": revision, **pop_hub_options(kwargs)}
        folder = None if pretrained_model_name_or_path is None else resolve(pretrained_model_name_or_path, **hub, subfolder=subfolder)
        adapter_folder = folder if folder is not None and is_only_adapter(folder) else None
        if adapter_folder is not None:
            del hub["revision"]  # of the adapter
            folder, pretrained_model_name_or_path = base_of_adapter(folder, **hub)
        config, values = cls._config_for_call(config, folder, kwargs)
        wanted = choose_dtype(dtype if dtype is not None else torch_dtype, {"dtype": config.dtype}, target)
        mismatched: list[tuple] | None = [] if ignore_mismatched_sizes else None
        if state_dict is not None:
            model = cls._from_state_dict(config, state_dict, dtype=wanted, device=target)
        elif folder is None:
            raise InputError(got="no folder and no state_dict", expected="one of them", remedy="Pass a folder or hub id, or state_dict=")
        else:
            checkpoint = Checkpoint.open(folder, variant=variant)
            if adapter_folder is not None:
                checkpoint = with_adapter(checkpoint, adapter_folder)
            options = {"values": values, "mismatched": mismatched, "quantize": quantize is not None}
            model = cls._load(config, checkpoint, dtype=wanted, device=target, **options)
            _check_tied(kwargs.get("tie_word_embeddings"), model.config)
        if generation_config is not None:
            model.generation_config = generation_config
        elif folder is not None and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        if quantize is not None:
            round_to_int8(model)  # what was not read from a file; and packs
            return_free_memory()
        arrange(*model._arranged())  # what was not read into its place
        model._record_dtype()
        model.name_or_path = pretrained_model_name_or_path or ""
        info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(mismatched or ()), "error_msgs": []}
        return (model.eval(), info) if output_loading_info else model.eval()

    @classmethod
    def _config_for_call(cls, given: Any, folder: Path | None, options: dict[str, Any]) -> tuple[Config, Mapping[str, Any]]:
        """The configuration that a call names, changed by the options of the call; and the contents of its file, if it has one."""
        values: Mapping[str, Any] = {}
        if given is None and folder is None:
            raise InputError(got="no folder and no config", expected="one of them", remedy="Pass config= with state_dict=")
        if given is None:
            values = load_json(folder / "config.json")
        elif isinstance(given, str | Path):
            values = cls.config_class.get_config_dict(given)[0]
        elif isinstance(given, Mapping):
            values = given
        config = config_from_dict(values) if values else copy.deepcopy(cls._as_config(given))
        if not isinstance(config, cls.config_class):
            raise ConfigError(
                got=f"a config.json of {config.model_type!r} for {cls.__name__}",
                expected=f"{cls.config_class.model_type!r}",
                remedy="If it is part of a model, load the whole model; otherwise use the class of that model",
            )
        unused = config.override(options)
        config.refuse_unused(unused, "from_pretrained", known=tuple(signature(cls.from_pretrained).parameters))
        return config, values or config.to_dict()

    @classmethod
    def _from_state_dict(
        cls, config: Config, state_dict: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None, device: torch.device
    ) -> Self:
        """A model with these weights. All must be there, except the head of a tied model."""
        names = canonical_keys(state_dict)
        floating = [tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()]
        model = cls._from_config(config, dtype=dtype or (floating[0] if floating else None))
        own = dict(zip(model.canonical_state_dict(), model.state_dict(), strict=True))
        unknown = [key for key, name in names.items() if name not in own and name not in cls.tied_names]
        found = {own[name]: state_dict[key] for key, name in names.items() if name in own}
        missing = [name for name in model.load_state_dict(found, strict=False).missing_keys if not is_optional(name)]
        if unknown or missing:
            raise CheckpointError(
                got=f"a state_dict with {len(unknown)} unknown names {unknown[:3]} and {len(missing)} missing ones {missing[:3]}",
                expected="the weights of the model that the configuration describes, without LoRA matrices",
                remedy="Check that they belong together; load an adapter from its folder",
            )
        return model.to(device)

    @classmethod
    def _from_config(cls, config: Config, **kwargs: Any) -> Self:
        """A model with random weights.

        Args:
            config: of the whole model.
            kwargs: `dtype` or its earlier name `torch_dtype`, of the weights, as for `from_pretrained`; torch's default if neither it nor
                the configuration says. `attn_implementation` and other options of transformers that change nothing here.

        Raises:
            InputError, UnsupportedError: another option.
        """
        config = cls._as_config(config)
        dtypes = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        if "attn_implementation" in kwargs:
            config._attn_implementation = kwargs["attn_implementation"]
        check_unused(kwargs, "from_config", known=("dtype", "torch_dtype"))
        before, dtype = torch.get_default_dtype(), dtypes[0] if dtypes[0] is not None else dtypes[1]
        torch.set_default_dtype(choose_dtype(dtype, {"dtype": config.dtype}, torch.get_default_device()) or before)
        try:
            model = cls(config)
        finally:
            torch.set_default_dtype(before)
        model._record_dtype()
        return model

    @classmethod
    def _load(
        cls,
        config: Config,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        values: Mapping[str, Any],
        mismatched: list[tuple] | None = None,
        quantize: bool = False,
    ) -> Self:
        model = cls.without_weights(config, checkpoint, values)
        if checkpoint.adapter_config is None and getattr(config, "has_lora_adapter", False):
            warn(
                f"{checkpoint.folder} has no adapter, although its configuration has has_lora_adapter; the model runs without one. "
                "If this is a released 3.x model, add adapter_config.json and adapter_model.safetensors.",
                stacklevel=4,
            )
        names = {module: f"{path}.weight" for path, module in model.named_modules()}
        rounded = list(layers_to_round(model, device)) if quantize else []
        int8 = {names[module]: _int8_store(module, modules, dtype) for modules in rounded for module in modules}
        places = partial(_places, model, device, int8)
        load_into(model, checkpoint, dtype=dtype, device=device, mismatched=mismatched, places=places, store=int8)
        if mismatched:
            model.initialize_weights({name for name, *_ in mismatched})
        return model

    @classmethod
    def without_weights(cls, config: Config, checkpoint: Checkpoint, values: Mapping[str, Any]) -> Self:
        """The checkpoint's model on the meta device, its adapter attached.

        Args:
            config: of the model; its `tie_word_embeddings` are set to match the checkpoint.
            checkpoint: the opened files.
            values: the contents of config.json.
        """
        cls._tie_as_stored(config, checkpoint, values)
        with torch.device("meta"):
            model = cls(config)
        if checkpoint.adapter_config is not None:
            model.adapter_config = AdapterConfig.from_dict(checkpoint.adapter_config)
            suffix = ".lora_A.weight"
            attach_adapter(model, model.adapter_config, [name.removesuffix(suffix) for name in checkpoint.entries if name.endswith(suffix)])
        return model

    @classmethod
    def _tie_as_stored(cls, config: Config, checkpoint: Checkpoint, values: Mapping[str, Any]) -> None:
        """Set the configuration's `tie_word_embeddings` to match the checkpoint, as for `without_weights`.

        The weights decide whether the head is tied: the two generations of config.json say so in two places and contradict themselves. A
        head counts as missing only if both places say "not tied".
        """
        says_untied = values.get("tie_word_embeddings") is False and not config.text_config.tie_word_embeddings
        tied = checkpoint.head_is_tied() and (HEAD in checkpoint.entries or not says_untied)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied


def as_config(config: Any, kind: type[Config] = GraniteSpeechConfig) -> Config:
    """A configuration of this package: the given one, or one with the values of transformers' configuration or a dictionary.

    Args:
        config: any of these.
        kind: the class that it must be of.

    Raises:
        InputError: something else.
    """
    if isinstance(config, kind):
        return config
    values = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    converted = config_from_dict(dict(values)) if values else None
    if not isinstance(converted, kind):
        raise InputError(
            got=f"config of type {type(config).__name__}",
            expected=f"a {kind.__name__}, of this package or of transformers",
            remedy=f"Build it with {kind.__name__}(...), or load it with AutoConfig.from_pretrained",
        )
    return converted


_LARGE = 1 << 24  # bytes of a weight; it takes a millisecond to give memory back


def _int8_store(
    module: Int8Weight, together: Sequence[Int8Weight], dtype: torch.dtype | None
) -> Callable[[torch.Tensor, torch.Tensor | None], None]:
    """Rounds a weight that is read, and packs it with the others of its product as soon as these are there too."""

    def store(values: torch.Tensor, out: torch.Tensor | None) -> None:
        module.store_int8(values, out, dtype)
        pack(together)
        if module.packed is not None and values.nbytes >= _LARGE:
            return_free_memory()

    return store


def _places(model: Pretrained, device: torch.device, int8: Collection[str], dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """Memory for weights that lie side by side, by their names among `dtypes`; those of `int8` become int8."""
    dtypes = dtypes | {name: torch.int8 for name in dtypes if name in int8}
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items() if name in dtypes}
    found = destinations(*model._arranged(), lambda one: dtypes.get(names.get(id(one))), device)
    return {names[id(parameter)]: place for parameter, place in found}


def _check_tied(wanted: bool | None, config: Config) -> None:
    """Refuse a call that contradicts the weights, which decide whether the head is the embedding."""
    if wanted is not None and wanted != config.tie_word_embeddings:
        raise InputError(
            got=f"tie_word_embeddings={wanted}, but the checkpoint's head is{' not' if wanted else ''} its embedding",
            expected="the weights as they are in the checkpoint",
            remedy="Omit it, and change the head after loading",
        )
