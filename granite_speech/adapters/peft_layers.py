"""A model whose linear layers peft has wrapped in its own layers.

peft works on any `nn.Module`. What it knows only of transformers' models is completed here, once it has put its layers in place. It is
recognised by what its layers have, so that nothing here imports it.
"""

from dataclasses import fields
from typing import Any

from torch import nn

from granite_speech.modules.adapter import Lora, LoraLinear
from granite_speech.modules.adapter_config import AdapterConfig
from granite_speech.modules.adapter_targets import matches

__all__ = ["complete", "switch_layers", "wrapped_layers"]


def wrapped_layers(model: nn.Module) -> list[nn.Module]:
    """peft's layers in a model, modules_to_save included."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters") and hasattr(module, "enable_adapters")]


def switch_layers(model: nn.Module, on: bool) -> None:
    """Switch all of peft's adapters on or off."""
    for layer in wrapped_layers(model):
        layer.enable_adapters(on)


def complete(model: nn.Module, head: str, configs: dict[str, Any]) -> None:
    """Finish what peft began, so that the model is as transformers' would be.

    The adapters that the model has of its own move into peft's layers: one with the name of the new adapter gives way to it, others
    stay, inactive. The head gets no adapter if the adapter is for "all-linear", which leaves out the head of transformers' models.

    Args:
        model: with peft's layers.
        head: path of the output head.
        configs: peft's table of configurations by name; own ones become objects of peft's class.
    """
    layers = [layer for layer in wrapped_layers(model) if isinstance(getattr(layer, "base_layer", None), LoraLinear)]
    layers = [layer for layer in layers if hasattr(layer, "lora_A")]
    if not layers:
        return
    newest = layers[0].active_adapters
    config = configs[newest[0]]
    _spare_head(model, head, config)
    for name, one in configs.items():
        if isinstance(one, AdapterConfig):
            known = {field.name for field in fields(config)}
            configs[name] = type(config)(**{key: value for key, value in one.raw.items() if key in known})
    wrapped = {id(layer.base_layer): layer for layer in layers}
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if not isinstance(module, LoraLinear) or not module.adapters:
                continue
            layer = wrapped.get(id(module))
            for name, one in module.adapters.items():
                layer = _moved(module, layer, name, one, type(layers[0]), type(config))
            module.adapters = {}
            module.activate([])
            layer.set_adapter(newest, inference_mode=config.inference_mode)
            if parent is not layer:
                setattr(parent, child, layer)


def _moved(module: LoraLinear, layer: nn.Module | None, name: str, one: Lora, layer_class: type, config_class: type) -> nn.Module:
    """peft's layer around `module`, with this adapter in it unless it has one of this name."""
    rank = one.a.out_features
    options = {"r": rank, "lora_alpha": one.scaling * rank}
    config = config_class(lora_dropout=one.dropout, init_lora_weights=False, **options)
    if layer is None:
        layer = layer_class(module, name, config, **options)
    elif name in layer.lora_A:
        return layer
    else:
        layer.update_layer(name, config=config, **options)
    # Not by assignment, which peft redirects to the meta device under low_cpu_mem_usage.
    layer.lora_A[name]._parameters["weight"], layer.lora_B[name]._parameters["weight"] = one.a.weight, one.b.weight
    return layer


def _spare_head(model: nn.Module, head: str, config: Any) -> None:
    """Take the adapter off the head if every other linear layer has one too, or is excluded: that is what "all-linear" becomes."""
    path, _, leaf = head.rpartition(".")
    owner = model.get_submodule(path) if head else None
    wrapped = None if owner is None else getattr(owner, leaf)
    if not isinstance(config.target_modules, set) or not hasattr(wrapped, "base_layer"):
        return
    linear = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    if all(name.endswith(".base_layer") or matches(name, config.exclude_modules or ()) for name in linear):
        setattr(owner, leaf, wrapped.base_layer)
        config.target_modules = {name for name in config.target_modules if head != name and not head.endswith(f".{name}")}
