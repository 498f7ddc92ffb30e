"""Loading and saving the encoder by itself: from the folder of a whole model, or from one of its own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from granite_speech.checkpoints.call_options import check_unused, pop_hub_options
from granite_speech.checkpoints.folder import Checkpoint, load_into, resolve
from granite_speech.checkpoints.placement import choose_device, choose_dtype
from granite_speech.checkpoints.upload import saving
from granite_speech.checkpoints.weight_names import is_lora
from granite_speech.checkpoints.writing import save
from granite_speech.config import GraniteSpeechEncoderConfig
from granite_speech.config_base import Config
from granite_speech.errors import CheckpointError, UnsupportedError
from granite_speech.modules.model_methods import ModelMethods

__all__ = ["EncoderFiles"]

_PREFIX = "encoder."  # of its weights in the files of a whole model


class EncoderFiles(ModelMethods):
    """`from_pretrained` and `save_pretrained` of the encoders."""

    config: Config
    config_class: ClassVar[type[Config]] = GraniteSpeechEncoderConfig
    main_input_name: ClassVar[str] = "input_features"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: Config | None = None,
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
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load the encoder's weights, in evaluation mode.

        Args:
            pretrained_model_name_or_path: the folder or hub id of a whole model, or of an encoder that `save_pretrained` wrote.
            config: replaces the one in the folder.
            cache_dir, force_download, local_files_only, token, revision: of the hub.
            ignore_mismatched_sizes, use_safetensors, weights_only, fusion_config, disable_mmap: of transformers. At their usual values
                they change nothing here (`call_options`).
            variant, dtype, torch_dtype, device, device_map: as of `GraniteSpeechForConditionalGeneration.from_pretrained`.
            kwargs: `subfolder`, values that replace those of the configuration, and transformers' options that change nothing here.

        Raises:
            CheckpointNotFoundError, CheckpointError, ConfigError, InputError: as there.
            UnsupportedError: the checkpoint's adapter changes the encoder.
        """
        target = choose_device(device, device_map)
        kwargs |= {"use_safetensors": use_safetensors, "fusion_config": fusion_config, "ignore_mismatched_sizes": ignore_mismatched_sizes}
        hub = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only, "token": token}
        folder = resolve(pretrained_model_name_or_path, **hub | {"revision": revision} | pop_hub_options(kwargs))
        config = cls.config_class.from_pretrained(folder) if config is None else config
        config.refuse_unused(config.override(kwargs), f"{cls.__name__}.from_pretrained", known=("config", "variant", "dtype", "device"))
        checkpoint = Checkpoint.open(folder, variant)
        own = {name.removeprefix(_PREFIX): entry for name, entry in checkpoint.entries.items() if name.startswith(_PREFIX)}
        if any(map(is_lora, own)):
            raise UnsupportedError(
                got=f"{str(folder)!r}, whose adapter changes the encoder",
                expected="an encoder without an adapter",
                remedy="Load the whole model, call its merge_adapter(), and use model.encoder",
            )
        with torch.device("meta"):
            encoder = cls(config)
        wanted = choose_dtype(dtype if dtype is not None else torch_dtype, {"dtype": config.dtype}, target)
        load_into(encoder, replace(checkpoint, entries=own or checkpoint.entries), dtype=wanted, device=target)
        encoder._record_dtype()
        encoder.name_or_path = pretrained_model_name_or_path
        return encoder.eval()

    @classmethod
    def _from_config(
        cls, config: Config, dtype: torch.dtype | str | None = None, torch_dtype: torch.dtype | str | None = None, **kwargs: Any
    ) -> Self:
        """An encoder with random weights. kwargs: options of transformers that change nothing here."""
        check_unused(kwargs, "from_config", known=("dtype", "torch_dtype"))
        encoder = cls(config)
        wanted = choose_dtype(dtype if dtype is not None else torch_dtype, {"dtype": config.dtype}, torch.get_default_device())
        return encoder if wanted is None else encoder.to(wanted)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write config.json and model.safetensors, which transformers' class of this name reads.

        Args:
            save_directory, is_main_process, push_to_hub, max_shard_size, variant, token, save_peft_format, save_original_format,
                distributed_checkpoint, kwargs: as of `GraniteSpeechForConditionalGeneration.save_pretrained`.
            state_dict: the values to write in place of the encoder's own.

        Raises:
            CheckpointError: a state_dict of other weights.
            UnsupportedError: the encoder has an adapter.
        """
        own = self.state_dict()
        tensors = {name: tensor.detach() for name, tensor in (own if state_dict is None else state_dict).items()}
        if tensors.keys() != own.keys():
            raise CheckpointError(
                got=f"a state_dict without {sorted(own.keys() - tensors)[:3]} and with unknown names {sorted(tensors.keys() - own)[:3]}",
                expected="all weights of this encoder",
                remedy="Pass the whole state dict, or omit it to save the encoder's own values",
            )
        if any(map(is_lora, tensors)):
            raise UnsupportedError(
                got="an encoder with an adapter",
                expected="an encoder without one",
                remedy="Save the whole model, or call its merge_adapter() first",
            )
        if not is_main_process:
            return
        self.config.architectures = [type(self).__name__]
        self._record_dtype()
        options = kwargs | {"distributed_checkpoint": distributed_checkpoint, "token": token}
        with saving(save_directory, "save_pretrained", push_to_hub=push_to_hub, options=options) as folder:
            save(folder, tensors, config=self.config.to_diff_dict(), max_shard_size=max_shard_size or "50GB", variant=variant)
