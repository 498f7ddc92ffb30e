"""`from_pretrained` and `save_pretrained`: a folder or hub id to a model and back."""

import json
from pathlib import Path
from typing import Any, Self
from warnings import warn

import torch
from torch import nn

from granite_speech.adapters import Adapters
from granite_speech.checkpoints.adapter_folder import base_of_adapter, is_only_adapter, with_adapter
from granite_speech.checkpoints.folder import Checkpoint, load_into, load_json, resolve, save
from granite_speech.checkpoints.weight_names import HEAD, is_lora
from granite_speech.config import GraniteSpeechConfig
from granite_speech.config_values import config_from_dict
from granite_speech.errors import ConfigError, InputError
from granite_speech.modules.adapter import AdapterConfig, LoraLinear, attach_adapter

__all__ = ["Pretrained", "choose_device", "choose_dtype"]


class Pretrained(Adapters):
    """Initialising, loading and saving weights, for the two public models.

    Attributes:
        name_or_path: what the model was loaded from; peft writes it into its adapters' configurations.
        is_gradient_checkpointing: whether the backward pass computes activations again.
    """

    config: GraniteSpeechConfig
    generation_config: dict[str, Any] | None = None
    name_or_path: str = ""
    is_gradient_checkpointing = False

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Random weights distributed as transformers' are: normal with `initializer_range`, zero biases, norms of one."""
        deviation = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
                module.weight.normal_(std=deviation)
            if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
                module.bias.zero_()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        **unknown: Any,
    ) -> Self:
        """Load a checkpoint, adapter included, in evaluation mode.

        Weights go straight to their device and dtype, one tensor at a time. Names and shapes are compared before anything is
        allocated; a weight that is not in the files is an error.

        Args:
            name_or_path: a folder, "embedded", or a hub id such as "ibm-granite/granite-speech-3.3-2b" (`hub.resolve`). It may hold
                only an adapter, as peft saves it; the model named there is then loaded with this adapter in place of its own.
            revision, cache_dir, local_files_only, token: of the hub.
            dtype: of the weights; "auto" and None take the configuration's, or if it has none the file's.
            torch_dtype: the earlier name of `dtype`.
            device: where the weights go; the CPU if omitted.
            device_map: transformers' name for the same: a device, {"": device}, or "auto" (CUDA if available).

        Raises:
            CheckpointNotFoundError: no such folder or hub id.
            CheckpointError: damaged files, or weights that do not match the configuration.
            ConfigError, UnsupportedError: another kind of model, or a value that no model can be built from.
        """
        if unknown:
            raise InputError(
                got=f"unknown options {', '.join(sorted(unknown))} for from_pretrained",
                expected="revision, cache_dir, local_files_only, token, dtype or torch_dtype, device or device_map",
                remedy="Remove them; code from a checkpoint is never run",
            )
        target = choose_device(device, device_map)
        folder = resolve(name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        adapter_folder = folder if is_only_adapter(folder) else None
        if adapter_folder is not None:
            folder, name_or_path = base_of_adapter(folder, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        values = load_json(folder / "config.json")
        config = config_from_dict(values)
        if not isinstance(config, GraniteSpeechConfig):
            raise ConfigError(
                got=f"a config.json of {config.model_type!r}, which is part of a model",
                expected="'granite_speech'",
                remedy="Load the whole model",
            )
        wanted = choose_dtype(dtype if dtype is not None else torch_dtype, values)
        checkpoint = Checkpoint.open(folder)
        if adapter_folder is not None:
            checkpoint = with_adapter(checkpoint, adapter_folder)
        model = cls._load(config, checkpoint, dtype=wanted, device=target, values=values)
        if (folder / "generation_config.json").is_file():
            model.generation_config = load_json(folder / "generation_config.json")
        model.name_or_path = str(name_or_path)
        return model.eval()

    @classmethod
    def _load(
        cls, config: GraniteSpeechConfig, checkpoint: Checkpoint, *, dtype: torch.dtype | None, device: torch.device, values: dict[str, Any]
    ) -> Self:
        model = cls.without_weights(config, checkpoint, values)
        if checkpoint.adapter_config is None and config.has_lora_adapter:
            warn(
                f"{checkpoint.folder} has no adapter, although its configuration has has_lora_adapter; the model runs without one. "
                "If this is a released 3.x model, add adapter_config.json and adapter_model.safetensors.",
                stacklevel=4,
            )
        load_into(model, checkpoint, dtype=dtype, device=device)
        return model

    @classmethod
    def without_weights(cls, config: GraniteSpeechConfig, checkpoint: Checkpoint, values: dict[str, Any]) -> Self:
        """The checkpoint's model on the meta device, its adapter attached.

        Args:
            config: of the model; its `tie_word_embeddings` are set to match the checkpoint.
            checkpoint: the opened files.
            values: the contents of config.json.
        """
        # The weights decide whether the head is tied: the two generations of config.json say so in two places and contradict
        # themselves. A head counts as missing only if both places say "not tied".
        says_untied = values.get("tie_word_embeddings") is False and not config.text_config.tie_word_embeddings
        tied = checkpoint.head_is_tied() and (HEAD in checkpoint.entries or not says_untied)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
        with torch.device("meta"):
            model = cls(config)
        if checkpoint.adapter_config is not None:
            model.adapter_config = AdapterConfig.from_dict(checkpoint.adapter_config)
            suffix = ".lora_A.weight"
            attach_adapter(model, model.adapter_config, [name.removesuffix(suffix) for name in checkpoint.entries if name.endswith(suffix)])
        return model

    def save_pretrained(self, save_directory: str | Path, max_shard_size: int | str = "50GB") -> None:
        """Write config.json, model.safetensors (or shards and an index), and an adapter's two files if there is one.

        The layout is that of the released folders, which every version of transformers reads.

        Args:
            save_directory: created if missing; nothing in it is replaced before everything is written.
            max_shard_size: bytes, or a number with KB, MB or GB.
        """
        if self._adapters.by_peft:
            raise InputError(
                got="a model whose layers peft has wrapped",
                expected="the PeftModel, which saves its adapter, or a model with merged adapters",
                remedy="Call save_pretrained of the PeftModel, or merge_and_unload() first",
            )
        if len(self._adapters.active) > 1:
            raise InputError(
                got=f"the active adapters {self._adapters.active}",
                expected="one active adapter, because a folder holds one",
                remedy="Call set_adapter with each name and save to a folder of its own",
            )
        tensors = self.canonical_state_dict()
        lora = {name: tensor for name, tensor in tensors.items() if is_lora(name)}
        base = {name: tensor for name, tensor in tensors.items() if not is_lora(name)}
        config = self.config.to_dict() | {
            "architectures": [type(self).__name__],
            "has_lora_adapter": bool(lora),
            # The only name that both transformers 4.x and 5.x read.
            "torch_dtype": str(next(iter(base.values())).dtype).removeprefix("torch."),
        }
        config.pop("dtype", None)
        adapter = self._adapter_json() if lora else None
        save(save_directory, base, config=config, adapter_tensors=lora or None, adapter_config=adapter, max_shard_size=max_shard_size)
        if self.generation_config is not None:
            (Path(save_directory) / "generation_config.json").write_text(json.dumps(self.generation_config, indent=2) + "\n")

    def canonical_state_dict(self) -> dict[str, torch.Tensor]:
        """The state dict with the names of the released files, for either model."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def _adapter_json(self) -> dict[str, Any]:
        """The contents of adapter_config.json: as loaded, or made from the attached adapters."""
        if self.adapter_config is not None:
            return self.adapter_config.raw
        modules = {name: module for name, module in self.named_modules() if isinstance(module, LoraLinear) and module.lora_A is not None}
        ranks = {name: module.lora_A.out_features for name, module in modules.items()}
        alphas = {name: module.scaling * ranks[name] for name, module in modules.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
            "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
            "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }


def choose_device(device: torch.device | str | int | None, device_map: Any) -> torch.device:
    """The device that `device` or transformers' `device_map` names."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device is not None and device_map is not None:
        raise InputError(got="device and device_map", expected="one of them", remedy="Pass device")
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = device_map if device is None else device
    try:
        target = torch.device("cpu" if chosen is None else chosen)
        torch.empty(0, device=target)  # a valid name of a device that this machine may not have
    except (AssertionError, RuntimeError, TypeError, NotImplementedError) as error:
        raise InputError(
            got=f"device {chosen!r:.100}, which gives: {str(error).splitlines()[0]:.200}",
            expected="a device of this machine, such as 'cpu', 'cuda' or 'cuda:1'",
            remedy="Pass device='cpu', or install a PyTorch build with that device",
        ) from error
    return target


def choose_dtype(dtype: torch.dtype | str | None, values: dict[str, Any]) -> torch.dtype | None:
    """The dtype of floating-point weights: the requested one or the configuration's; None keeps the file's."""
    requested = (values.get("dtype") or values.get("torch_dtype")) if dtype in (None, "auto") else dtype
    if requested is None:
        return None
    chosen = requested if isinstance(requested, torch.dtype) else getattr(torch, str(requested).removeprefix("torch."), None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point or chosen.itemsize < 2:
        raise InputError(
            got=f"dtype {requested!r:.100}",
            expected="torch.float32, torch.bfloat16, torch.float16 or torch.float64, or their names, or 'auto'",
            remedy="Pass dtype=torch.bfloat16",
        )
    return chosen
