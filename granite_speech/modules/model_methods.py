"""Methods that transformers gives every model: counting parameters, and settings of its other implementations."""

from collections.abc import Iterable
from typing import Any, ClassVar
from warnings import warn

import torch
from torch import nn

from granite_speech.checkpoints.call_options import check_unused
from granite_speech.checkpoints.upload import PushToHub
from granite_speech.config import GraniteSpeechConfig
from granite_speech.config_base import Config

__all__ = ["ModelMethods"]


class ModelMethods(nn.Module, PushToHub):
    """Parameters in numbers and bytes, where the model came from, and options that change nothing here."""

    config: Config
    config_class: ClassVar[type[Config]] = GraniteSpeechConfig
    base_model_prefix: ClassVar[str] = "model"
    main_input_name: ClassVar[str] = "input_ids"
    loss_type: ClassVar[str] = "ForConditionalGeneration"  # tells transformers' Trainer that a row's first label is not predicted
    _no_split_modules: ClassVar[set[str]] = {"GraniteDecoderLayer"}  # units that FSDP and accelerate keep on one device

    @property
    def base_model(self) -> nn.Module:
        """The model without its head; the model itself if it has none."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def name_or_path(self) -> str:
        """Where the weights came from: a folder or a hub id; "" if from neither."""
        return self.config.name_or_path

    @name_or_path.setter
    def name_or_path(self, value: Any) -> None:
        self.config.name_or_path = value
        self.__dict__["name_or_path"] = self.config.name_or_path  # where peft looks for it

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; a tied one counts once.

        Args:
            only_trainable: count only those that require a gradient.
            exclude_embeddings: leave out the weights of embedding layers.
        """
        embeddings = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}
        return sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if (parameter.requires_grad or not only_trainable) and not (exclude_embeddings and name in embeddings)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the buffers unless `return_buffers` is False."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def add_model_tags(self, tags: str | Iterable[str]) -> None:
        """Add tags that `push_to_hub` writes into the model card."""
        new = [tags] if isinstance(tags, str) else list(tags)
        self.model_tags = list(dict.fromkeys([*(self.model_tags or ()), *new]))

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False) -> None:
        """Accepts transformers' names, which all compute the same here; `config._attn_implementation` records it.

        Raises:
            InputError: an unknown name.
        """
        check_unused({"attn_implementation": attn_implementation}, "set_attn_implementation")
        self.config._attn_implementation = attn_implementation

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Accepted: this family has no experts."""

    def set_use_kernels(self, use_kernels: bool, kernel_config: Any = None, mode: Any = None) -> None:
        """Accepted: the kernels are always those of this package."""

    def warn_if_padding_and_no_attention_mask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Warn if `input_ids` `(batch, sequence)` seem to be padded and there is no mask to say where."""
        padding = getattr(self.config.get_text_config(), "pad_token_id", None)
        if attention_mask is None and padding is not None and bool((input_ids[:, [0, -1]] == padding).any()):
            warn("input_ids seem to be padded; pass the attention_mask that the processor returned with them.", stacklevel=2)

    def get_parameter_or_buffer(self, target: str) -> torch.Tensor:
        """The parameter or buffer at this path.

        Raises:
            AttributeError: there is none.
        """
        path, _, name = target.rpartition(".")
        tensor = getattr(self.get_submodule(path), name, None)
        if not isinstance(tensor, torch.Tensor):
            raise AttributeError(f"{type(self).__name__} has no parameter and no buffer {target!r}")
        return tensor

    def post_init(self) -> None:
        """transformers initialises a model's weights here; a model of this package has done so."""

    def _record_dtype(self) -> None:
        """Write the weights' dtype into the configuration and its parts, as transformers does."""
        dtype = next((one.dtype for one in self.parameters() if one.is_floating_point()), torch.get_default_dtype())
        for config in (self.config, *(getattr(self.config, name) for name in self.config.sub_configs)):
            config.dtype = dtype
