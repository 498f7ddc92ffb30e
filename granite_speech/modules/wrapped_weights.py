"""Weights that the encoder reads instead of calling the module, if peft has wrapped the module in a layer of its own."""

from torch import Tensor, nn

from granite_speech.errors import UnsupportedError

__all__ = ["weight_of"]


def weight_of(module: nn.Module) -> Tensor:
    """A module's weight, with the products of peft's active LoRA adapters added.

    Raises:
        UnsupportedError: an adapter that is not added to the weight: of another kind, DoRA, or with dropout in training.
    """
    if type(module) in (nn.Conv1d, nn.Embedding) or not hasattr(module, "base_layer"):
        return module.weight  # peft's wrapper of modules_to_save gives the weight of the module in use
    weight = module.weight
    if module.disable_adapters or module.merged:
        return weight
    is_lora = hasattr(module, "use_dora")
    for name in module.active_adapters:
        if is_lora and name not in module.scaling:
            continue
        if not is_lora or module.use_dora.get(name) or _drops(module, name):
            raise UnsupportedError(
                got=f"the adapter {name!r} of a {type(module.base_layer).__name__} of the encoder, in a {type(module).__name__}",
                expected="plain LoRA without dropout on convolutions and position embeddings",
                remedy="Leave these modules out of target_modules, or merge the adapter first",
            )
        weight = weight + module.get_delta_weight(name)
    return weight


def _drops(module: nn.Module, name: str) -> bool:
    return module.training and isinstance(module.lora_dropout[name], nn.Dropout) and isinstance(module.base_layer, nn.Conv1d)
