"""What of a model trains, and what stays as it is."""

import re
from collections.abc import Sequence

from torch import nn

from granite_speech.checkpoints.weight_names import is_lora
from granite_speech.errors import InputError
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.modules.adapter import AdapterConfig, LoraLinear, attach_adapter
from granite_speech.training.seeds import seeded

__all__ = ["attach_fresh_adapter", "has_adapter", "prepare"]


def prepare(model: GraniteSpeechForConditionalGeneration, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let these parts of a model train, and freeze the others.

    A part that trains is in training mode, with its dropout, and with BatchNorm on the statistics of the batch, which it also keeps. A
    frozen part is in evaluation mode: BatchNorm uses the statistics it has and leaves them as they are. An adapter's matrices belong to
    "adapter" wherever they are attached.

    Args:
        model: changed in place.
        parts: of "encoder", "projector", "adapter" and "language_model"; of an adapter only where the model has one.

    Returns:
        The parameters that train, by name.

    Raises:
        InputError: parts without a parameter.
    """
    if "encoder" in parts:
        # Running statistics move by a tenth of a difference at a time, which bfloat16 would round away.
        for module in model.encoder.modules():
            if isinstance(module, nn.BatchNorm1d) and module.weight.dtype.itemsize < 4:
                module.float()
    trained = {}
    for name, parameter in model.named_parameters():
        part = "adapter" if is_lora(name) else name.partition(".")[0]
        parameter.requires_grad_(part in parts)
        if part in parts:
            trained[name] = parameter
    if not trained:
        raise InputError(
            got=f"{', '.join(parts) or 'nothing'} to train in a model {'with' if has_adapter(model) else 'without'} an adapter",
            expected="parts that have parameters",
            remedy="Name other parts, or attach an adapter first",
        )
    model.encoder.train("encoder" in parts)
    model.projector.train("projector" in parts)
    model.language_model.train("language_model" in parts or "adapter" in parts)
    return trained


def has_adapter(model: nn.Module) -> bool:
    """Whether a LoRA adapter is attached anywhere."""
    return any(isinstance(module, LoraLinear) and module.lora_A is not None for module in model.modules())


def attach_fresh_adapter(
    model: GraniteSpeechForConditionalGeneration, *, rank: int, alpha: float, targets: Sequence[str], seed: int = 0
) -> None:
    """Give the language model an adapter that changes nothing yet.

    Args:
        model: without an adapter.
        rank, alpha: the adapter's product is scaled by alpha / rank.
        targets: names of projections: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
        seed: of the matrices A; B is zero.

    Raises:
        InputError: the model has an adapter, or no such projections.
    """
    if has_adapter(model):
        raise InputError(got="a model with an adapter", expected="one without", remedy="Train the one it has, or merge it first")
    paths = {name: name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    chosen = [name for name, leaf in paths.items() if name.startswith("language_model.") and leaf in targets]
    if missing := sorted(set(targets) - {paths[name] for name in chosen}):
        raise InputError(
            got=f"an adapter for {', '.join(missing)}", expected="projections of the language model", remedy="Name q_proj and v_proj"
        )
    outside = {leaf for name, leaf in paths.items() if not name.startswith("language_model.")}
    config = AdapterConfig.plain(rank, alpha, sorted(targets))
    if outside & set(targets):
        # peft matches names by their end, and would look for an adapter in the encoder's up_proj too. As one string it takes a pattern.
        pattern = rf".*language_model\..*\.(?:{'|'.join(map(re.escape, sorted(targets)))})"
        config = AdapterConfig.from_dict(config.raw | {"target_modules": pattern})
    with seeded(model.device, "adapter", seed):
        attach_adapter(model, config, chosen)
    model.adapter_config = config
