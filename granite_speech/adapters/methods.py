"""Adapters by name: transformers' methods `load_adapter`, `add_adapter`, `set_adapter` and the others, without peft.

    model.load_adapter("folder-of-an-adapter", adapter_name="german")
    model.set_adapter("default")                      # back to the one of the checkpoint
    model.add_adapter(LoraConfig(r=16, target_modules=["q_proj"]), "new")     # to train

The active adapter is on for rows with audio. The others are kept aside (`LoraLinear`), so parameters are named as in the released files
whichever adapter is active.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from granite_speech.adapters.peft_layers import complete, switch_layers, wrapped_layers
from granite_speech.adapters.tensors import AdapterLoadInfo, checked_paths, from_folder, from_tensors
from granite_speech.checkpoints.weight_names import canonical_keys, canonical_path, is_lora
from granite_speech.errors import InputError, UnsupportedError
from granite_speech.modules.adapter import LoraLinear, attach_to, merge_adapter
from granite_speech.modules.adapter_config import AdapterConfig
from granite_speech.modules.adapter_targets import ALL_LINEAR, target_paths, target_suffixes

__all__ = ["Adapters"]


_WITHOUT_NAME = re.compile(r"(\.lora_[A-Za-z_]+)\.(weight|bias)$")


@dataclass
class _Record:
    """A model's adapters. A whole model and its headless view share one.

    Attributes:
        configs: by name. After peft has wrapped the model's layers, this is peft's own table.
        shown: the copy that users and peft see. peft writes to it before it knows whether its layers fit.
        active: names of the adapters in use.
        by_peft: whether peft has wrapped the layers.
        switches: whether `generate` switches peft's adapters by whether there is audio, as transformers does if the model had an
            adapter of its own before.
        is_frozen: whether an adapter was added, which freezes the rest of the model.
        hotswap: whether `load_adapter` replaces an adapter of the same name.
    """

    configs: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, Any] | None = None
    active: list[str] = field(default_factory=list)
    by_peft: bool = False
    switches: bool = False
    is_frozen: bool = False
    hotswap: bool = False


class Adapters(nn.Module):
    """Naming, loading, adding and switching adapters, for the two public models."""

    @property
    def _adapters(self) -> _Record:
        return self.__dict__.setdefault("_adapter_record", _Record())

    @property
    def adapter_config(self) -> AdapterConfig | None:
        """Configuration of the active adapter; None without one. Setting it names the adapter that `attach_adapter` attached."""
        record = self._adapters
        return record.configs.get(record.active[0]) if record.active else None

    @adapter_config.setter
    def adapter_config(self, config: AdapterConfig | None) -> None:
        record = self._adapters
        record.shown = None
        if config is None:
            record.configs, record.active = {}, []
        else:
            record.active = record.active[:1] or ["default"]
            record.configs[record.active[0]] = config

    @property
    def peft_config(self) -> dict[str, Any]:
        """Configurations of all adapters by name; without adapters the model has no such attribute."""
        record = self._adapters
        if not record.configs:
            raise AttributeError("the model has no adapter")
        if record.shown is None:
            record.shown = dict(record.configs)
        return record.shown

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        # peft assigns its table after it has wrapped the layers.
        record = self._adapters
        record.switches = record.switches or any(isinstance(module, LoraLinear) and module.adapters for module in self.modules())
        head = next((name for name, module in self.named_modules() if name.endswith("lm_head")), "")
        complete(self, head, configs)
        record.configs, record.shown, record.by_peft, record.active = configs, configs, True, []

    @peft_config.deleter
    def peft_config(self) -> None:
        record = self._adapters
        record.configs, record.shown, record.by_peft, record.active = {}, None, False, []

    @property
    def _hf_peft_config_loaded(self) -> bool:
        return self._adapters.switches or (bool(self._adapters.configs) and not self._adapters.by_peft)

    @_hf_peft_config_loaded.setter
    def _hf_peft_config_loaded(self, value: bool) -> None:
        # Code that puts peft's layers in place itself sets this, so that `generate` switches them as transformers does.
        self._adapters.switches = bool(value)

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Add an untrained adapter, make it the active one, and freeze everything else, as transformers and peft do.

        Args:
            adapter_config: peft's `LoraConfig`, or a dictionary with the contents of an adapter_config.json. `init_lora_weights` may
                be True (the output does not change at first), False or "gaussian".
            adapter_name: "default" if omitted.

        Raises:
            InputError: the name is taken, or no module matches target_modules.
            UnsupportedError: another kind of adapter than plain LoRA, or modules that are not linear layers of the model.
        """
        name = self._new_name(adapter_name)
        config = AdapterConfig.read(adapter_config)
        initial = config.raw.get("init_lora_weights", True)
        if isinstance(initial, str) and initial != "gaussian":
            raise UnsupportedError(
                got=f"init_lora_weights={initial!r}", expected="True, False or 'gaussian'", remedy="Use peft.get_peft_model for the others"
            )
        modules = self._modules_by_path()
        chosen = target_paths(modules, config.raw)
        if str(config.raw["target_modules"]).lower() == ALL_LINEAR:
            config = AdapterConfig.from_dict(config.raw | {"target_modules": target_suffixes(modules, chosen)})
        attach_to({path: modules[path] for path in chosen}, config, name, False if initial is None else initial)
        self._keep(name, config, trainable=True)

    def load_adapter(
        self,
        peft_model_id: str | Path | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        low_cpu_mem_usage: bool = False,
        is_trainable: bool = False,
        hotswap: bool | str = "auto",
        local_files_only: bool = False,
        adapter_kwargs: Mapping[str, Any] | None = None,
        load_config: None = None,
        **kwargs: Any,
    ) -> AdapterLoadInfo:
        """Load an adapter from a folder or the hub, or from tensors, and make it the active one.

        Args:
            peft_model_id: a folder or hub id with adapter_config.json and adapter_model.safetensors.
            adapter_name: "default" if omitted.
            peft_config, adapter_state_dict: the configuration and the tensors, in place of a folder.
            low_cpu_mem_usage: accepted; tensors are always read one at a time.
            is_trainable: whether the adapter's parameters require gradients. The rest of the model is frozen.
            hotswap: True replaces the adapter of this name; "auto" does so after `enable_peft_hotswap`.
            local_files_only: do not ask the hub.
            adapter_kwargs, kwargs: revision, token, cache_dir and subfolder.

        Raises:
            InputError: the name is taken, nothing to load, or an option that is not among these.
            CheckpointNotFoundError, CheckpointError, UnsupportedError: as `from_pretrained`; tensors that do not fit the model.
        """
        options = {"local_files_only": local_files_only, **(adapter_kwargs or {}), **kwargs, "load_config": load_config}
        swaps = self._swaps(hotswap, adapter_name)
        name = adapter_name if swaps else self._new_name(adapter_name)
        if peft_model_id is not None and peft_config is None and adapter_state_dict is None:
            config, tensors = from_folder(peft_model_id, options)
        elif peft_config is not None and adapter_state_dict is not None:
            config, tensors = AdapterConfig.read(peft_config), from_tensors(adapter_state_dict)
        else:
            raise InputError(
                got="neither a folder nor both peft_config and adapter_state_dict",
                expected="peft_model_id, or peft_config and adapter_state_dict",
                remedy="Pass the folder that peft saved",
            )
        layers = self._modules_by_path()
        paths = checked_paths(tensors, layers, config)
        attach_to({path: layers.get(path) for path in paths}, config, name)
        with torch.no_grad():
            for path in paths:
                one = layers[path].adapters[name]
                one.a.weight.copy_(tensors[f"{path}.lora_A.weight"])
                one.b.weight.copy_(tensors[f"{path}.lora_B.weight"])
        if swaps:
            for path in layers.keys() - set(paths):
                getattr(layers[path], "adapters", {}).pop(name, None)
        self._keep(name, config, trainable=is_trainable)
        if not is_trainable:
            self.eval()
        return AdapterLoadInfo()

    def enable_peft_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Let `load_adapter` replace an adapter of the same name. Ranks may differ, so `target_rank` and `check_compiled` do nothing."""
        self._adapters.hotswap = True

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make these adapters the active ones. Their parameters then require gradients, and those of the others do not.

        Raises:
            InputError: a name that the model does not have.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names(names)
        if self._adapters.by_peft:
            for layer in wrapped_layers(self):
                layer.set_adapter(names)
            return
        self._activate(names, trainable=True)

    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        self._check_names([])
        wrapped = wrapped_layers(self) if self._adapters.by_peft else []
        return list(wrapped[0].active_adapters) if wrapped else list(self._adapters.active)

    def active_adapter(self) -> str:
        """Name of the first active adapter."""
        return self.active_adapters()[0]

    def disable_adapters(self) -> None:
        """Turn adapters off for all rows, in `forward` and `generate`, until `enable_adapters`."""
        self._switch(False)

    def enable_adapters(self) -> None:
        """Turn the active adapters on again, for rows with audio."""
        self._switch(True)

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters. If the active one is among them, the first of those left becomes active.

        Raises:
            InputError: a name that the model does not have.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        self._refuse_wrapped("delete_adapter")
        record = self._adapters
        for name in names:
            record.configs.pop(name, None)
            for layer in self._layers():
                layer.adapters.pop(name, None)
        left = [name for name in record.active if name in record.configs] or list(record.configs)[:1]
        self._activate(left, trainable=True)

    def get_adapter_state_dict(self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Tensors of an adapter by their names in the released files.

        Args:
            adapter_name: the active one if omitted.
            state_dict: of this model; the active adapter's tensors are then taken from it.

        Raises:
            InputError: a name that the model does not have.
        """
        name = self.active_adapter() if adapter_name is None else adapter_name
        self._check_names([name])
        self._refuse_wrapped("get_adapter_state_dict")
        if state_dict is not None:
            return {key: state_dict[given] for given, key in canonical_keys(state_dict).items() if is_lora(key)}
        found = {}
        for path, module in self._modules_by_path().items():
            if isinstance(module, LoraLinear) and name in module.adapters:
                one = module.adapters[name]
                found |= {f"{path}.lora_A.weight": one.a.weight.detach(), f"{path}.lora_B.weight": one.b.weight.detach()}
        return found

    def merge_adapter(self) -> None:
        """Add the active adapter to the weights and remove it. It is then on for requests without audio too."""
        self._refuse_wrapped("merge_adapter")
        merge_adapter(self)
        record = self._adapters
        for name in record.active:
            record.configs.pop(name, None)
        record.active, record.shown = [], None

    def _prepare_encoder_decoder_kwargs_for_generation(self, *arguments: Any, **inputs: Any) -> dict[str, Any]:
        return inputs  # peft asks for it under task_type="SEQ_2_SEQ_LM"

    def switch_by_audio(self, has_audio: bool) -> None:
        """What transformers' `generate` does to a model with an adapter of its own, once peft has wrapped its layers."""
        if self._adapters.by_peft and self._adapters.switches:
            switch_layers(self, has_audio)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        # As part of peft's model: adapters trained with transformers have the names of its modules. peft adds the adapter's name only
        # to names that it knows; the newest adapter is the one that it is loading.
        for key in [key for key in state_dict if prefix and key.startswith(prefix)]:
            path = self._own_path(key.removeprefix(prefix))
            if path is not None and f"{prefix}{path}" not in state_dict:
                if self._adapters.by_peft:
                    path = _WITHOUT_NAME.sub(rf"\1.{list(self._adapters.configs)[-1]}.\2", path)
                state_dict[f"{prefix}{path}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _own_path(self, key: str) -> str | None:
        """The name in this model of a weight of transformers' model."""
        return canonical_path(key)

    def _modules_by_path(self) -> dict[str, nn.Module]:
        """Modules by their paths in the whole model."""
        paths = ((name, canonical_path(f"{name}."), module) for name, module in self.named_modules())
        return {name if path is None else path.removesuffix("."): module for name, path, module in paths}

    def _layers(self) -> list[LoraLinear]:
        return [module for module in self.modules() if isinstance(module, LoraLinear)]

    def _new_name(self, given: str | None) -> str:
        self._refuse_wrapped("adding an adapter")
        name = "default" if given is None else given
        if name in self._adapters.configs or any(name in layer.adapters for layer in self._layers()):
            raise InputError(
                got=f"the adapter name {name!r}, which the model has already",
                expected="a new name",
                remedy="Pass another adapter_name, or call delete_adapter first",
            )
        return name

    def _swaps(self, hotswap: bool | str, name: str | None) -> bool:
        if hotswap not in (True, False, "auto"):
            raise InputError(got=f"hotswap={hotswap!r:.60}", expected="True, False or 'auto'", remedy="Omit it")
        has_it = name in self._adapters.configs
        if hotswap is True and not has_it:
            raise InputError(
                got=f"hotswap=True for the adapter {name!r}, which the model does not have",
                expected=f"one of {list(self._adapters.configs)}",
                remedy="Pass the adapter_name to replace, or omit hotswap",
            )
        return hotswap is True or (hotswap == "auto" and self._adapters.hotswap and has_it)

    def _check_names(self, names: Sequence[str]) -> None:
        configs = self._adapters.configs
        unknown = [name for name in names if name not in configs]
        if unknown or not configs:
            raise InputError(
                got=f"the adapter {', '.join(map(repr, unknown))}" if unknown else "a model without adapters",
                expected=f"one of {list(configs)}" if configs else "a model with an adapter",
                remedy="Call load_adapter or add_adapter first",
            )

    def _refuse_wrapped(self, what: str) -> None:
        if self._adapters.by_peft:
            raise UnsupportedError(
                got=f"{what} on a model whose layers peft has wrapped",
                expected="peft's own methods",
                remedy="Call the method of that name on the PeftModel, or merge_and_unload first",
            )

    def _keep(self, name: str, config: AdapterConfig, *, trainable: bool) -> None:
        record = self._adapters
        if not record.is_frozen:
            for parameter in self.parameters():
                parameter.requires_grad_(False)
            record.is_frozen = True
        record.configs[name] = config
        self._activate([name], trainable=trainable)

    def _activate(self, names: Sequence[str], *, trainable: bool) -> None:
        self._adapters.active, self._adapters.shown = list(names), None
        for layer in self._layers():
            layer.activate(names)
            for name, one in layer.adapters.items():
                one.a.requires_grad_(trainable and name in names)
                one.b.requires_grad_(trainable and name in names)

    def _switch(self, on: bool) -> None:
        self._check_names([])
        switch_layers(self, on)
        for layer in self._layers():
            layer.adapter_enabled = on
