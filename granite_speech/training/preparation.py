"""Choosing which parts of a model train, and adding a new adapter."""

import re
from collections.abc import Sequence

from torch import nn

from granite_speech.checkpoints.weight_names import is_lora
from granite_speech.errors import InputError
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.modules.adapter import LoraLinear, attach_adapter
from granite_speech.modules.adapter_config import AdapterConfig
from granite_speech.modules.quantized import refuse_quantized
from granite_speech.training.seeds import seeded

__all__ = ["Model", "attach_fresh_adapter", "has_adapter", "prepare"]

Model = GraniteSpeechForConditionalGeneration | GraniteSpeech5ForCTC

_PART_OF_HEAD = {"ctc_head": "encoder"}


def prepare(model: Model, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """Make these parts of a model trainable, and freeze the others.

    A trainable part is in training mode: dropout is on, and BatchNorm uses the batch's statistics and updates its running ones. A frozen
    part is in evaluation mode, with fixed statistics. An adapter's matrices belong to "adapter", whichever part they are attached to.

    Args:
        model: changed in place.
        parts: any of "encoder", "projector", "adapter" and "language_model", or of a CTC model of "encoder", which includes its head, and
            "adapter".

    Returns:
        The trainable parameters by name.

    Raises:
        InputError: the parts have no parameters.
        UnsupportedError: int8 weights.
    """
    refuse_quantized(model, "training")
    if "encoder" in parts:
        # Running statistics move by a tenth of the difference each time, which bfloat16 would round away.
        for module in model.encoder.modules():
            if isinstance(module, nn.BatchNorm1d) and module.weight.dtype.itemsize < 4:
                module.float()
    trained = {}
    for name, parameter in model.named_parameters():
        part = "adapter" if is_lora(name) else _PART_OF_HEAD.get(name.partition(".")[0], name.partition(".")[0])
        parameter.requires_grad_(part in parts)
        if part in parts:
            trained[name] = parameter
    if not trained:
        raise InputError(
            got=f"{', '.join(parts) or 'nothing'} to train in a model {'with' if has_adapter(model) else 'without'} an adapter",
            expected="parts that have parameters",
            remedy="Choose other parts, or attach an adapter first",
        )
    model.encoder.train("encoder" in parts)
    if isinstance(model, GraniteSpeech5ForCTC):
        for module in model.modules():
            if isinstance(module, LoraLinear):  # whose mode decides over the adapter's dropout alone
                module.train("adapter" in parts)
    else:
        model.projector.train("projector" in parts)
        model.language_model.train("language_model" in parts or "adapter" in parts)
    return trained


def has_adapter(model: nn.Module) -> bool:
    """Whether a LoRA adapter is attached anywhere."""
    return any(isinstance(module, LoraLinear) and module.lora_A is not None for module in model.modules())


def attach_fresh_adapter(model: Model, *, rank: int, alpha: float, targets: Sequence[str], seed: int = 0) -> None:
    """Attach an untrained adapter to the language model, or to a CTC model's encoder. It has no effect until it is trained.

    Args:
        model: one without an adapter.
        rank, alpha: the adapter's product is scaled by alpha / rank.
        targets: any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj; of an encoder the first four, linear1, linear2,
            pointwise_lin1 and pointwise_lin2.
        seed: of the random A matrices; the B matrices are zero.

    Raises:
        InputError: the model already has an adapter, or lacks a projection.
    """
    if has_adapter(model):
        raise InputError(got="a model with an adapter", expected="one without", remedy="Train that adapter, or merge it first")
    paths = {name: name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    part = "encoder" if isinstance(model, GraniteSpeech5ForCTC) else "language_model"
    chosen = [name for name, leaf in paths.items() if name.startswith(f"{part}.") and leaf in targets]
    if missing := sorted(set(targets) - {paths[name] for name in chosen}):
        raise InputError(
            got=f"an adapter for {', '.join(missing)}",
            expected=f"projections of the {part.replace('_', ' ')}",
            remedy="Use q_proj and v_proj",
        )
    outside = {leaf for name, leaf in paths.items() if not name.startswith(f"{part}.")}
    config = AdapterConfig.plain(rank, alpha, sorted(targets))
    if outside & set(targets):
        # peft matches a list of names by suffix, so it would expect an adapter in the encoder's up_proj too. It reads a string as a regex.
        pattern = rf".*{part}\..*\.(?:{'|'.join(map(re.escape, sorted(targets)))})"
        config = AdapterConfig.from_dict(config.raw | {"target_modules": pattern})
    with seeded(model.device, "adapter", seed):
        attach_adapter(model, config, chosen)
    model.adapter_config = config
